"""Score batches of requests with the Hugging Face pipeline and the model inside packscore.

    python examples/pipeline.py

Reranking first, then the probability of single-token labels for the same texts.
"""

from __future__ import annotations

from transformers import pipeline
from transformers.utils import logging

from packscore import register_pipelines, shipped_model_path

REQUESTS = [
    {
        "query": "delete a directory tree",
        "items": ["Rename a file or directory.", "Recursively delete a directory tree."],
    },
    {
        "query": "shuffle a list",
        "items": [
            "Shuffle list x in place, and return None.",
            "Open a file in binary or text mode.",
            "Return a random element of a sequence.",
        ],
    },
]


def main() -> None:
    """Score and print."""
    logging.disable_progress_bar()
    register_pipelines()
    model = str(shipped_model_path())
    pipe = pipeline("multi-item-scoring", model=model, prompt="qwen3-reranker", batch_size=2)

    for request, entries in zip(REQUESTS, pipe(REQUESTS, top_k=2, return_items=True), strict=True):
        print(request["query"])
        for entry in entries:
            print(f"  {entry['score']:.3f}  {entry['item']}")

    print("\nlabels of each item")
    for entry in pipe(REQUESTS[1], labels=["yes", "no"], return_items=True):
        print(f"  {entry['label']:>3} {entry['score']:.3f}  {entry['item']}")


if __name__ == "__main__":
    main()
