"""What users of each client of rerankers write, and what the client then hands them.

A call is a function of the server's root URL that builds the client as its own documentation does,
and reads what it says from the client's own objects. Those of decisions are in `decision_calls`,
which enters them into the same table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clients.wire import Answers, Ranks

MODEL, KEY = "shipped", "a-key-of-the-clients"
QUERY = "delete a directory tree"
DOCUMENTS = [
    "Return the size of a file.",
    "Recursively delete a directory tree.",
    "Copy data and mode bits, “quoted” and naïve.",
    "Remove a file.",
]
STATE = {"subject": "Parcel never came", "body": "I write for the third time. Refund me!"}
TEXT = "Parcel never came. I write for the third time. Refund me!"
REFUND = "Does the customer ask for money back?"
TOPICS = {"shipping": "parcels", "billing": "charges", "other": None}
URGENCIES = ["can wait", "this week", "today"]


@dataclass(frozen=True)
class Call:
    """A call of a client.

    Args:
      distribution: what pip calls its client.
      ask: the call.
      state: what is asked about, where the body has it in other words.
    """

    distribution: str
    ask: Callable[[str], Ranks | Answers]
    state: Any = None


CALLS: dict[str, Call] = {}


def client(distribution: str, state: Any = None) -> Callable[[Any], Any]:
    """Enter a call into the table, under its name."""

    def enter(ask: Callable[[str], Ranks | Answers]) -> Callable[[str], Ranks | Answers]:
        CALLS[ask.__name__] = Call(distribution, ask, state)
        return ask

    return enter


@client("cohere")
def cohere_v2(root: str) -> Ranks:
    import cohere

    co = cohere.ClientV2(api_key=KEY, base_url=root)
    found = co.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=3)
    return [(result.index, result.relevance_score) for result in found.results]


@client("cohere")
def cohere_v1(root: str) -> Ranks:
    import cohere

    co = cohere.Client(api_key=KEY, base_url=root)
    documents = [{"text": document} for document in DOCUMENTS]
    found = co.rerank(model=MODEL, query=QUERY, documents=documents, return_documents=True)
    for result in found.results:
        assert result.document.text == DOCUMENTS[result.index]
    return [(result.index, result.relevance_score) for result in found.results]


@client("cohere")
def cohere_async(root: str) -> Ranks:
    import cohere

    async def ask() -> Ranks:
        async with cohere.AsyncClientV2(api_key=KEY, base_url=root) as co:
            found = await co.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS)
        return [(result.index, result.relevance_score) for result in found.results]

    return asyncio.run(ask())


@client("langchain-cohere")
def langchain_cohere(root: str) -> Ranks:
    from langchain_cohere import CohereRerank

    reranker = CohereRerank(model=MODEL, cohere_api_key=KEY, base_url=root, top_n=2)
    found = reranker.rerank(DOCUMENTS, QUERY)
    return [(result["index"], result["relevance_score"]) for result in found]


@client("langchain-community")
def langchain_jina(root: str) -> Ranks:
    from langchain_community.document_compressors import JinaRerank, jina_rerank
    from langchain_core.documents import Document

    jina_rerank.JINA_API_URL = f"{root}/v1/rerank"  # it has no argument for it
    reranker = JinaRerank(model=MODEL, jina_api_key=KEY, top_n=3)
    given = [Document(text) for text in DOCUMENTS]
    found = reranker.compress_documents(given, QUERY)
    return [
        (DOCUMENTS.index(document.page_content), document.metadata["relevance_score"])
        for document in found
    ]


def _nodes() -> list[Any]:
    from llama_index.core.schema import NodeWithScore, TextNode

    return [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]


@client("llama-index-postprocessor-tei-rerank")
def llama_index_tei(root: str) -> Ranks:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    reranker = TextEmbeddingInference(top_n=3, base_url=root, auth_token=f"Bearer {KEY}")
    found = reranker.postprocess_nodes(_nodes(), query_str=QUERY)
    return [(DOCUMENTS.index(node.text), node.score) for node in found]


@client("llama-index-postprocessor-jinaai-rerank")
def llama_index_jina(root: str) -> Ranks:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    reranker = JinaRerank(top_n=3, model=MODEL, base_url=f"{root}/v1", api_key=KEY)
    found = reranker.postprocess_nodes(_nodes(), query_str=QUERY)
    return [(DOCUMENTS.index(node.text), node.score) for node in found]


def _rerankers(provider: str, url: str) -> Ranks:
    from rerankers import Reranker

    reranker = Reranker(MODEL, model_type="APIRanker", api_provider=provider, api_key=KEY, url=url)
    found = reranker.rank(QUERY, DOCUMENTS)
    return [(one.document.doc_id, one.score) for one in found.results]


@client("rerankers")
def rerankers_jina(root: str) -> Ranks:
    return _rerankers("jina", f"{root}/v1/rerank")


@client("rerankers")
def rerankers_tei(root: str) -> Ranks:
    return _rerankers("text-embeddings-inference", f"{root}/rerank")


def _litellm_rerank(provider: str, root: str) -> Ranks:
    import litellm

    found = litellm.rerank(
        f"{provider}/{MODEL}", QUERY, DOCUMENTS, top_n=3, api_key=KEY, api_base=root
    )
    return [(one["index"], one["relevance_score"]) for one in found.results]


@client("litellm")
def litellm_cohere(root: str) -> Ranks:
    return _litellm_rerank("cohere", root)


@client("litellm")
def litellm_jina(root: str) -> Ranks:
    return _litellm_rerank("jina_ai", f"{root}/v1/rerank")


@client("litellm")
def litellm_vllm(root: str) -> Ranks:
    return _litellm_rerank("hosted_vllm", root)
