"""A LangChain document compressor: `ContextualCompressionRetriever` reranks with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from packscore.errors import MissingPackageError
from packscore.integrations.loading import Ranking, load_scorer

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import ConfigDict, Field, PrivateAttr
except ImportError as error:
    raise MissingPackageError("packscore.integrations.langchain", "langchain") from error


class PackscoreReranker(BaseDocumentCompressor):
    """Keeps the documents that score best for the query, best first.

    Args:
      scorer: a `MultiItemScorer` or a `packscore.CrossEncoder`.
      top_n: how many documents to keep; None keeps all.

    Raises:
      InputTypeError: `scorer` cannot rank.
      pydantic.ValidationError: a field is unknown, or `top_n` is below 1.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    scorer: Any = Field(exclude=True)
    top_n: int | None = Field(default=3, ge=1)
    _ranking: Ranking = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Look at the scorer once the fields are there."""
        super().model_post_init(context)
        self._ranking = Ranking(self.scorer)

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | os.PathLike[str], *, top_n: int | None = 3, **options: Any
    ) -> PackscoreReranker:
        """A reranker from a model's name or folder.

        Args:
          model_name_or_path: of a reranker.
          top_n: as in the constructor.
          **options: of `MultiItemScorer.from_pretrained`, and of the model's own; `prompt` is
            "qwen3-reranker" by default.

        Returns:
          The reranker.
        """
        return cls(scorer=load_scorer(model_name_or_path, **options), top_n=top_n)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents, as copies with the score in their metadata as "relevance_score".

        Args:
          documents: what a retriever found.
          query: the query it was asked.
          callbacks: LangChain's, which this step has no use for.

        Returns:
          At most `top_n` documents, best first.
        """
        ranked = self._ranking(query, [d.page_content for d in documents], self.top_n)
        return [_with_score(documents[i], score) for i, score in ranked]


def _with_score(document: Document, score: float) -> Document:
    metadata = {**document.metadata, "relevance_score": score}
    return document.model_copy(update={"metadata": metadata})
