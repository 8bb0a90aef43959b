"""Rank as any model of the `rerankers` library does.

pip install '.[rerankers]' && python examples/rerankers_rank.py
"""

from __future__ import annotations

from transformers.utils import logging

from packscore import shipped_model_path
from packscore.integrations.rerankers import PackscoreRanker

DOCUMENTS = [
    "Rename a file or directory.",
    "Recursively delete a directory tree.",
    "Suspend execution of the calling thread for some seconds.",
]


def main() -> None:
    """Rank and print."""
    logging.disable_progress_bar()
    ranker = PackscoreRanker(str(shipped_model_path()))
    results = ranker.rank("delete a directory tree", DOCUMENTS, doc_ids=["os", "shutil", "time"])
    for result in results.top_k(2):
        print(f"{result.rank}  {result.score:.3f}  {result.document.doc_id}: {result.text}")


if __name__ == "__main__":
    main()
