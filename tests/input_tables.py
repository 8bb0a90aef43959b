"""Two tables, made by asking: what options may be, and what the calls take; `--write` renews docs.

python tests/input_tables.py --write
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, ValuesView
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

from packscore import (
    InputError,
    InputTypeError,
    MultiItemScorer,
    PackscoreError,
    Prefix,
    patch_model,
    shipped_model_path,
    verify_parity,
)
from packscore.inputs import OPTIONS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "inputs.md"
TEXTS = ["tea", "a boat"]
ASKED = {"a": {"type": "noul", "instructions": "Is it tea?"}}
# wrong values of each kind of option; what must be refused at every call that has it
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["apply_softmax", "item_first", "plain_calls", "show"], ("false", 0, None, [])),
    **dict.fromkeys(
        ["return_usage", "return_documents", "return_items", "return_exceptions"],
        ("no", 1, None, {}),
    ),
    "show_progress_bar": ("yes", 1, None),
    "split_special_tokens": ("false", 0, []),
    **dict.fromkeys(["top_k", "max_items", "max_tokens", "batch_size"], (0, -1, 2.0, "3", True)),
    **dict.fromkeys(["num_labels", "permutations"], (0, -1, 2.0, "3", True)),
    "prefix_cache_bytes": (-1, 1.5, "1G", True),
    "flow": ("fast", 1, True, ["packed"]),
    **dict.fromkeys(["mask_impl", "on_long", "on_non_finite"], ("other", None, 1, True)),
    "activation_fn": ("sigmoid", 3, lambda x: x[:1], lambda x: x.sum(), lambda x: [0.5, 0.5]),
    **dict.fromkeys(["local_files_only", "trust_remote_code"], ("false", 0, None, [])),
    **dict.fromkeys(["instruction", "revision", "device"], (5, b"x", ["x"])),
    **dict.fromkeys(["compile_cache", "cache_dir"], (5, ["x"])),
    "dtype": ("int8", "fp16", None, torch.int8, 16),
    "model_kwargs": ("sdpa", ["sdpa"], 1),
    "seconds": (0, -1, float("nan"), "5", True),
    "max_requests": (0, -1, None, 2.0, "3", True),
    "window_seconds": (-1, None, float("nan"), "5", False),
}
KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: [*TEXTS],
    "tuple": lambda: (*TEXTS,),
    "generator": lambda: (x for x in TEXTS),
    "iterator of a dict's values": lambda: {1: "tea", 2: "a boat"}.values(),
    "numpy array of texts": lambda: np.array(TEXTS),
    "numpy array of objects": lambda: np.array(TEXTS, object),
    "pandas Series": lambda: pd.Series(TEXTS, index=[7, 3]),
    "Dataset column": lambda: datasets.Dataset.from_dict({"text": TEXTS})["text"],
    "pandas DataFrame": lambda: pd.DataFrame({"text": TEXTS}),
    "Dataset": lambda: datasets.Dataset.from_dict({"text": TEXTS}),
    "dict": lambda: {"tea": 1, "a boat": 2},
    "UserDict": lambda: UserDict({"tea": 1}),
    "BatchEncoding": lambda: BatchEncoding({"input_ids": [[1]]}),
    "set": lambda: {*TEXTS},
    "frozenset": lambda: frozenset(TEXTS),
    "one text": lambda: "tea",
    "bytes": lambda: b"tea",
    "None": lambda: None,
    "a number": lambda: 5,
    "Path in a list": lambda: [Path("tea")],
    "None in a list": lambda: ["tea", None],
    "number in a list": lambda: ["tea", 3.5],
    "half a surrogate pair in a list": lambda: ["tea", "a\ud800"],
    "10 MB of text in a list": lambda: ["tea", "word " * 2_000_000],
}
Call = Callable[[MultiItemScorer, Any], Any]
CALLS: dict[str, Call] = {
    "score": lambda scorer, x: scorer.score("tea?", x),
    "rank": lambda scorer, x: scorer.rank("tea?", x),
    "async_score": lambda scorer, x: asyncio.run(scorer.async_score("tea?", x)),
    "score_stream": lambda scorer, x: list(scorer.score_stream("tea?", x)),
    "score_many": lambda scorer, x: scorer.score_many([("tea?", x)]),
    "predict": lambda scorer, x: scorer.predict(_pairs(x)),
    "prefix.score": lambda scorer, x: scorer.prefix("tea?").score(x),
    "encode": lambda scorer, x: scorer.encode("tea?", x),
    "explain": lambda scorer, x: scorer.explain("tea?", x),
}


def _pairs(x: Any) -> Any:
    """The same kind of thing, of pairs where it holds texts."""
    if isinstance(x, list):
        return [("tea?", text) for text in x]
    if isinstance(x, np.ndarray):
        return np.array([["tea?", text] for text in x], x.dtype)
    if isinstance(x, tuple):
        return tuple(("tea?", text) for text in x)
    if inspect.isgenerator(x):
        return (("tea?", text) for text in x)
    if isinstance(x, pd.Series):
        return pd.Series([("tea?", text) for text in x], index=x.index)
    if isinstance(x, datasets.arrow_dataset.Column):
        return datasets.Dataset.from_dict({"pair": [["tea?", text] for text in x]})["pair"]
    if isinstance(x, ValuesView):
        return {text: ("tea?", text) for text in x}.values()
    return x


def options_of() -> Iterator[tuple[str, str, Callable[[MultiItemScorer, Any], Any]]]:
    """(call, option, a call with that option) of every public call and every option it has."""
    base: dict[str, tuple[Any, Callable[..., Any]]] = {
        "MultiItemScorer": (
            MultiItemScorer,
            lambda scorer, **o: MultiItemScorer(scorer.model, tokenizer(), **o),
        ),
        "from_pretrained": (
            MultiItemScorer.from_pretrained,
            lambda _, **o: MultiItemScorer.from_pretrained(
                shipped_model_path(), **{"device": "cpu", **o}
            ),
        ),
        "score": (MultiItemScorer.score, lambda s, **o: s.score("q", TEXTS, **o)),
        "rank": (MultiItemScorer.rank, lambda s, **o: s.rank("q", TEXTS, **o)),
        "predict": (MultiItemScorer.predict, lambda s, **o: s.predict([("q", "a")], **o)),
        "score_many": (
            MultiItemScorer.score_many,
            lambda s, **o: s.score_many([("q", TEXTS)], **o),
        ),
        "score_stream": (
            MultiItemScorer.score_stream,
            lambda s, **o: s.score_stream("q", TEXTS, **o),
        ),
        "async_score": (
            MultiItemScorer.async_score,
            lambda s, **o: asyncio.run(s.async_score("q", TEXTS, **o)),
        ),
        "async_rank": (
            MultiItemScorer.async_rank,
            lambda s, **o: asyncio.run(s.async_rank("q", TEXTS, **o)),
        ),
        "async_decide": (
            MultiItemScorer.async_decide,
            lambda s, **o: asyncio.run(s.async_decide("q", ASKED, **o)),
        ),
        "start_batcher": (MultiItemScorer.start_batcher, lambda s, **o: s.start_batcher(**o)),
        "decide": (MultiItemScorer.decide, lambda s, **o: s.decide("q", ASKED, **o)),
        "decide_many": (
            MultiItemScorer.decide_many,
            lambda s, **o: s.decide_many([("q", ASKED)], **o),
        ),
        "decide_stream": (
            MultiItemScorer.decide_stream,
            lambda s, **o: s.decide_stream("q", ASKED, **o),
        ),
        "encode_questions": (
            MultiItemScorer.encode_questions,
            lambda s, **o: s.encode_questions("q", ASKED, **o),
        ),
        "calibrate": (MultiItemScorer.calibrate, lambda s, **o: s.calibrate(**o)),
        "prefix.score": (Prefix.score, lambda s, **o: s.prefix("q").score(TEXTS, **o)),
        "patch_model": (patch_model, lambda s, **o: patch_model(s.model, **o)),
        "verify_parity": (
            verify_parity,
            lambda s, **o: verify_parity(s.model, tokenizer(), **{"show": False, **o}),
        ),
    }
    for name, (signed, call) in base.items():
        for option in inspect.signature(signed).parameters:
            if option in OPTIONS:
                yield name, option, _with(call, option)


def _with(call: Callable[..., Any], option: str) -> Callable[[MultiItemScorer, Any], Any]:
    return lambda scorer, value: call(scorer, **{option: value})


def outcome(call: Call, scorer: MultiItemScorer, given: Any) -> str:
    """ "taken", or the class of the refusal."""
    try:
        call(scorer, given)
    except PackscoreError as error:
        return type(error).__name__
    return "taken"


def forwards(model: nn.Module, call: Callable[[], Any]) -> int:
    """How often the model's decoder ran during a call."""
    count = 0

    def seen(*_: Any) -> None:
        nonlocal count
        count += 1

    decoder: Any = model.get_decoder()
    hook = decoder.register_forward_hook(seen)
    try:
        call()
    except (InputError, InputTypeError):
        pass
    finally:
        hook.remove()
    return count


def kinds_table(scorer: MultiItemScorer) -> list[str]:
    """Rows of the table: what each call does with each kind of items."""
    rows = [f"| items | {', '.join(f'`{name}`' for name in CALLS)} |", "|---|---|"]
    for kind, make in KINDS.items():
        found = {name: outcome(call, scorer, make()) for name, call in CALLS.items()}
        unlike = ", ".join(f"`{name}`: {what}" for name, what in found.items())
        one = len({*found.values()}) == 1
        rows.append(f"| {kind} | {found['score'] if one else unlike} |")
    return rows


def options_table() -> list[str]:
    """Rows of the table: which calls have each option, and what was tried and refused."""
    where: dict[str, list[str]] = {}
    for call, option, _ in options_of():
        where.setdefault(option, []).append(call)
    rows = ["| option | of | refused, among others |", "|---|---|---|"]
    for option, calls in where.items():
        tried = ", ".join(f"`{_shown(value)}`" for value in WRONG[option])
        rows.append(f"| `{option}` | {', '.join(f'`{call}`' for call in calls)} | {tried} |")
    return rows


def _shown(value: Any) -> str:
    return "another shape" if callable(value) else repr(value)


def page(scorer: MultiItemScorer) -> str:
    """The page as it should be."""
    head = PAGE.read_text().partition("## Options")[0]
    options = "\n".join(options_table())
    kinds = "\n".join(kinds_table(scorer))
    return f"{head}## Options\n\n{options}\n\n## Items\n\n{kinds}\n"


@functools.cache
def tokenizer() -> Any:
    """The shipped model's."""
    return AutoTokenizer.from_pretrained(shipped_model_path())


def make_scorer() -> MultiItemScorer:
    """Of the shipped model, small and quick."""
    path = shipped_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return MultiItemScorer(patch_model(model), tokenizer(), prompt="yes-no", max_tokens=200)


if __name__ == "__main__":
    found = page(make_scorer())
    if "--write" in sys.argv:
        PAGE.write_text(found)
    print(found)
