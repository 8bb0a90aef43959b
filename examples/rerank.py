"""Rank real documents for a query with the model that ships inside packscore.

    python examples/rerank.py
    python examples/rerank.py "open a compressed file" --top-k 3
    python examples/rerank.py "a panda?" --documents lines.txt --model Qwen/Qwen3-Reranker-0.6B

The documents are what Python's own standard library says of some well-known functions; a file with
one document on each line takes their place.
"""

from __future__ import annotations

import argparse
import inspect
import random
import shutil
import socket
import textwrap
import threading
from collections.abc import Callable
from datetime import timedelta
from gzip import open as gzip_open
from json import dumps
from os import getenv, listdir, rename
from pathlib import Path
from re import sub
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from packscore import MultiItemScorer, patch_model, shipped_model_path

FUNCTIONS: list[Callable[..., Any]] = [
    *(dumps, getenv, gzip_open, listdir, rename, sub, timedelta),
    *(random.shuffle, random.choice, random.gauss),
    *(shutil.rmtree, shutil.copyfile, shutil.make_archive, shutil.disk_usage),
    *(socket.create_connection, threading.Lock, threading.Timer),
]


def standard_library_documents() -> list[str]:
    """The first paragraph of each function's docstring."""
    paragraphs = [(inspect.getdoc(function) or "").split("\n\n")[0] for function in FUNCTIONS]
    return [" ".join(paragraph.split()) for paragraph in paragraphs]


def main() -> None:
    """Rank and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("query", nargs="?", default="delete a directory tree")
    parser.add_argument("--documents", type=Path, help="a text file with one document on each line")
    parser.add_argument("--model", default=str(shipped_model_path()), help="name or folder")
    parser.add_argument("--top-k", type=int, default=5)
    args = parser.parse_args()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    patch_model(model)
    scorer = MultiItemScorer(model, tokenizer, prompt="qwen3-reranker")

    lines = args.documents.read_text().splitlines() if args.documents else None
    documents = lines or standard_library_documents()
    result = scorer.rank(
        args.query, documents, top_k=args.top_k, return_documents=True, return_usage=True
    )

    print(f"query: {args.query}\n\nrank  score  document")
    for rank, entry in enumerate(result.scores, start=1):
        print(f"{rank:4}  {entry['score']:.3f}  {textwrap.shorten(entry['text'], 78)}")
    usage = result.usage
    saved = usage.prefix_tokens_saved / usage.prompt_tokens
    print(
        f"\n{len(documents)} documents, {usage.computed_tokens:,} tokens computed instead of "
        f"{usage.prompt_tokens:,}: packing saved {saved:.0%}"
    )


if __name__ == "__main__":
    main()
