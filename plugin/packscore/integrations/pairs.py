"""Pairs of query and document on their way to a launch, or to a call that is not packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from packscore.errors import InputError, InputTypeError, UnsupportedModelError
from packscore.inputs import short
from packscore.scoring import MultiItemScorer
from packscore.text.chat_template import PROBES
from packscore.text.encoding import group_by_query
from packscore.text.tokenizer import PieceTokenizer

Pair = tuple[str, str]
# Any document will do to look at a query.
SOME_DOCUMENT = "a"


def is_text_pair(entry: Any) -> bool:
    """Whether it is two strings."""
    is_pair = isinstance(entry, list | tuple) and len(entry) == 2
    return is_pair and all(isinstance(text, str) for text in entry)


def check_inputs(inputs: Sequence[Any]) -> None:
    """Refuse what is no text at all.

    Raises:
      InputTypeError: an entry is neither a pair of strings, nor a string, nor messages.
    """
    for i, entry in enumerate(inputs):
        is_messages = isinstance(entry, list) and all(map(_is_message, entry)) and entry
        if not (isinstance(entry, str) or is_messages or _is_message(entry) or is_text_pair(entry)):
            raise InputTypeError(
                f"inputs[{i}]={short(entry)} must be a pair of strings, (query, document), or one "
                "text or list of messages"
            )


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and "content" in entry


def launches_of(pairs: list[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of the pairs of each launch: whole queries, together at most `batch_size` pairs.

    A query with more documents than that is a launch of its own: packed, they cost less memory than
    a padded batch, and its own chunks bound what runs at a time.
    """
    launch: list[int] = []
    for group in group_by_query(pairs):
        if launch and len(launch) + len(group) > batch_size:
            yield launch
            launch = []
        launch = [*launch, *group]
    if launch:
        yield launch


def refused_pairs(scorer: MultiItemScorer, pairs: list[Pair], index: list[int]) -> list[int]:
    """Those of `index` whose query the scorer refuses: empty, or without room for a document."""
    found: list[int] = []
    for group in group_by_query([pairs[i] for i in index]):
        try:
            scorer.encode(pairs[index[group[0]]][0], [SOME_DOCUMENT])
        except InputError:
            found += [index[k] for k in group]
    return found


def check_no_special_tokens(tokenizer: Any, inputs: Sequence[Any]) -> None:
    """Refuse pairs whose texts a call that is not packed would take for the prompt's own frame.

    Raises:
      InputError: a text holds a special token's.
    """
    pieces = PieceTokenizer(tokenizer)
    for pair in filter(is_text_pair, inputs):
        if any(map(pieces.mentions_special, pair)):
            raise InputError(
                f"{short(pair)} holds a special token's text, which would act in a call that is "
                "not packed; pass split_special_tokens=False to let it"
            )


def check_joins(tokenizer: Any) -> None:
    """Whether a tokenizer without a chat template joins the ids of query and document.

    Raises:
      UnsupportedModelError: it puts tokens of its own between or behind them.
    """
    pieces = PieceTokenizer(tokenizer)
    leading, trailing = pieces.leading_ids, pieces.trailing_ids
    for query, document in PROBES:
        found = tokenizer(query, document)["input_ids"]
        parts = tokenizer([query, document], add_special_tokens=False)["input_ids"]
        if found != [*leading, *parts[0], *parts[1], *trailing]:
            raise UnsupportedModelError(
                f"tokenizer={type(tokenizer).__name__} has no chat template and adds "
                "tokens of its own to a pair; pass template=PromptSpec(...) that spells them"
            )
