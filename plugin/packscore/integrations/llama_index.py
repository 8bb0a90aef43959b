"""A LlamaIndex node postprocessor: query engines rerank with it."""

from __future__ import annotations

import os
from typing import Any

from packscore.errors import InputError, MissingPackageError
from packscore.integrations.loading import Ranking, load_scorer

try:
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise MissingPackageError("packscore.integrations.llama_index", "llama-index") from error


class PackscoreRerank(BaseNodePostprocessor):
    """Keeps the nodes that score best for the query, best first.

    Args:
      scorer: a `MultiItemScorer` or a `packscore.CrossEncoder`.
      top_n: how many nodes to keep.
      keep_retrieval_score: put the retriever's score into the metadata, as "retrieval_score".

    Raises:
      InputTypeError: `scorer` cannot rank.
      pydantic.ValidationError: a field is unknown, or `top_n` is below 1.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    scorer: Any = Field(exclude=True)
    top_n: int = Field(default=2, ge=1)
    keep_retrieval_score: bool = False
    _ranking: Ranking = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Look at the scorer once the fields are there."""
        super().model_post_init(context)
        self._ranking = Ranking(self.scorer)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike[str],
        *,
        top_n: int = 2,
        keep_retrieval_score: bool = False,
        **options: Any,
    ) -> PackscoreRerank:
        """A reranker from a model's name or folder.

        Args:
          model_name_or_path: of a reranker.
          top_n: as in the constructor.
          keep_retrieval_score: as in the constructor.
          **options: of `MultiItemScorer.from_pretrained`, and of the model's own; `prompt` is
            "qwen3-reranker" by default.

        Returns:
          The reranker.
        """
        scorer = load_scorer(model_name_or_path, **options)
        return cls(scorer=scorer, top_n=top_n, keep_retrieval_score=keep_retrieval_score)

    @classmethod
    def class_name(cls) -> str:
        """The name LlamaIndex keeps it under."""
        return "PackscoreRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("query_bundle=None: pass query_str='...' or a QueryBundle")
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.class_name(),
            EventPayload.QUERY_STR: query_bundle.query_str,
            EventPayload.TOP_K: self.top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            # what LlamaIndex's own rerankers read: the text with the metadata meant for models
            texts = [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]
            ranked = self._ranking(query_bundle.query_str, texts, self.top_n)
            found = [self._scored(nodes[i], score) for i, score in ranked]
            event.on_end(payload={EventPayload.NODES: found})
        return found

    def _scored(self, found: NodeWithScore, score: float) -> NodeWithScore:
        node = found.node
        if self.keep_retrieval_score:
            metadata = {**node.metadata, "retrieval_score": found.score}
            node = node.model_copy(update={"metadata": metadata})
        return NodeWithScore(node=node, score=score)
