"""Rerank as Cohere's and Jina's clients send it, which vLLM also takes.

Source: docs.cohere.com/reference/rerank, api.jina.ai/redoc, and vllm/entrypoints/pooling/scoring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from packscore.results import RankedDocument
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import NOT_SERVED, Body, Family, Kind


class Document(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(extra="ignore", strict=True)

    text: str


class RerankBody(Body):
    """Documents to put in order."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    use_activation: bool | None = None


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    # Cohere's clients read `message`, Jina's `detail`
    return {"id": request_id, "message": refusal.message, "detail": refusal.message}


FAMILY = Family("Cohere, Jina", 422, _error)


async def _answer(call: Call, body: RerankBody, *, echo: bool) -> Callable[[], Any]:
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    ranked = await call.rank(body.query, texts, raw=body.use_activation is False)
    echo = echo if body.return_documents is None else body.return_documents

    def result(one: RankedDocument) -> dict[str, Any]:
        found = {"index": one["corpus_id"], "relevance_score": one["score"]}
        return found | ({"document": {"text": texts[one["corpus_id"]]}} if echo else {})

    return lambda: {
        "id": call.id,
        "object": "list",
        "model": call.model,
        "results": [result(one) for one in ranked[: body.top_n]],
        "usage": call.usage(),
        "meta": {"api_version": {"version": "2"}},
    }


def _kind(name: str, *, echo: bool) -> Kind:
    return Kind(
        name=name,
        family=FAMILY,
        body=RerankBody,
        needs=("documents",),
        answer=functools.partial(_answer, echo=echo),
        example={
            "query": "parse a json string",
            "documents": ["Deserialize a str to a Python object.", "Return the cosine of x."],
            "top_n": 2,
        },
        unserved=NOT_SERVED
        | {
            "max_doc_length": ((), "shorten the documents, or leave it out"),
            "max_chunks_per_doc": ((), "send the chunks as documents, or leave it out"),
            "rank_fields": ((["text"],), 'send documents as text, or as {"text": ...}'),
            "relevant_spans": (([],), "documents are scored whole; leave it out"),
            "return_embeddings": ((False,), "there are none; leave it out"),
            "images": ((), "only text is scored; leave them out"),
        },
    )


# Jina's clients and vLLM's read the documents in the answer; Cohere's have them already
RERANK = _kind("rerank", echo=True)
RERANK_V2 = _kind("rerank, version 2", echo=False)
