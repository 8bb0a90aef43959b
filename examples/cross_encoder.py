"""Change one import of a sentence-transformers program, and each query is computed once.

    pip install '.[sentence-transformers]' && python examples/cross_encoder.py

It ranks with both and prints how far the scores are apart.
"""

from __future__ import annotations

import sentence_transformers
import torch
from transformers.utils import logging

from packscore import CrossEncoder, shipped_model_path

QUERY = "open a compressed file"
DOCUMENTS = [
    "Rename a file or directory.",
    "Open a gzip-compressed file in binary or text mode.",
    "Recursively delete a directory tree.",
    "Suspend execution of the calling thread for some seconds.",
]


def main() -> None:
    """Rank with both and print."""
    logging.disable_progress_bar()
    options = {"model_kwargs": {"dtype": torch.float32}}
    model = CrossEncoder(str(shipped_model_path()), **options)
    for entry in model.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True):
        print(f"{entry['corpus_id']}  {entry['score']:.3f}  {entry['text']}")

    theirs = sentence_transformers.CrossEncoder(str(shipped_model_path()), **options)
    pairs = [(QUERY, document) for document in DOCUMENTS]
    difference = abs(model.predict(pairs) - theirs.predict(pairs)).max()
    print(f"largest difference to sentence-transformers: {difference:.0e}")


if __name__ == "__main__":
    main()
