"""Rank documents through compiled programs: on a TPU, or the same programs on jax's CPU.

    pip install '.[tpu]' && python examples/rerank_tpu.py --device tpu
    python examples/rerank_tpu.py --device jax
    python examples/rerank_tpu.py --model Qwen/Qwen3-Reranker-0.6B --compile-cache programs

Without --device it is a TPU where jax sees one, and torch elsewhere. With --compile-cache the next
process loads its programs from that folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from packscore import MultiItemScorer, patch_model, program_of, shipped_model_path

DOCUMENTS = [
    "Rename a file or directory.",
    "Recursively delete a directory tree.",
    "Open a gzip-compressed file in binary or text mode.",
    "Shuffle list x in place, and return None.",
    "Return the path of the current working directory.",
]
QUERIES = ["delete a directory tree", "shuffle a list"]


def main() -> None:
    """Compile, rank twice, and say what was compiled for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "tpu", "jax"], default="auto")
    parser.add_argument("--model", default=str(shipped_model_path()), help="name or folder")
    parser.add_argument("--max-tokens", type=int, default=256, help="of the longest request")
    parser.add_argument("--compile-cache", type=Path, help="folder that keeps programs")
    args = parser.parse_args()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # on the CPU: programs put the weights on their device themselves
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    patch_model(model, device=args.device, compile_cache=args.compile_cache)
    scorer = MultiItemScorer(model, tokenizer, prompt="qwen3-reranker")

    program = program_of(model)
    if program is None:
        print("jax sees no TPU: scored in torch")
    else:
        count = program.warmup(max_tokens=args.max_tokens)
        print(f"{count} programs on {program.device.device_kind}")
        program.strict = True  # whatever is longer is an error now, and no compile

    for query in QUERIES:
        print(query)
        result = scorer.rank(query, DOCUMENTS, top_k=2, return_documents=True, return_usage=True)
        for entry in result.scores:
            print(f"  {entry['score']:.3f}  {entry['text']}")
        usage = result.usage
        print(f"  {usage.computed_tokens} tokens computed instead of {usage.prompt_tokens}")


if __name__ == "__main__":
    main()
