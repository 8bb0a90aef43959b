"""A ranker of the `rerankers` library."""

from __future__ import annotations

import os
from typing import Any

from packscore.errors import MissingPackageError
from packscore.integrations.loading import Ranking, load_scorer

try:
    from rerankers.documents import Document
    from rerankers.models.ranker import BaseRanker
    from rerankers.results import RankedResults, Result
    from rerankers.utils import prep_docs
except ImportError as error:
    raise MissingPackageError("packscore.integrations.rerankers", "rerankers") from error


class PackscoreRanker(BaseRanker):  # type: ignore[misc]  # rerankers has no types
    """Ranks as `rerankers.Reranker(...)` does, with one query computed once for all documents.

    Args:
      model_name_or_path: of a reranker; or a `MultiItemScorer` or `packscore.CrossEncoder`.
      **options: of `MultiItemScorer.from_pretrained`, and of the model's own; `prompt` is
        "qwen3-reranker" by default.

    Raises:
      InputTypeError: it is neither a name nor a scorer.
    """

    def __init__(self, model_name_or_path: Any, **options: Any) -> None:
        named = isinstance(model_name_or_path, str | os.PathLike)
        scorer = load_scorer(model_name_or_path, **options) if named else model_name_or_path
        self._ranking = Ranking(scorer)

    def score(self, query: str, doc: str) -> float:
        """The score of one document."""
        ((_, score),) = self._ranking(query, [doc], None)
        return score

    def rank(
        self,
        query: str,
        docs: str | list[str] | Document | list[Document],
        doc_ids: list[str] | list[int] | None = None,
        metadata: list[dict[str, Any]] | None = None,
    ) -> RankedResults:
        """All documents, best first.

        Args:
          query: the query.
          docs: texts, or `rerankers` documents.
          doc_ids: their ids; None counts them.
          metadata: one dict for each text.

        Returns:
          Results with `document`, `score` and `rank`, which counts from 1.
        """
        documents = prep_docs(docs, doc_ids, metadata) if docs else []
        ranked = self._ranking(query, [document.text for document in documents], None)
        results = [
            Result(document=documents[i], score=score, rank=rank)
            for rank, (i, score) in enumerate(ranked, start=1)
        ]
        return RankedResults(results=results, query=query, has_scores=True)
