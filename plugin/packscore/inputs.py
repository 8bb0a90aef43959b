"""Checks of what users pass: typed errors that name the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from packscore.encoded import TokenIds
from packscore.errors import InputError, InputTypeError

TokenIdsLike: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"
Text: TypeAlias = "str | TokenIdsLike"


def short(value: object) -> str:
    """A value's repr, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_list(name: str, values: Iterable[Any]) -> list[Any]:
    """The elements of a list-like argument.

    Raises:
      InputTypeError: it is None, one string, a mapping, or not iterable.
      InputError: it is empty.
    """
    if values is None or isinstance(values, str | bytes | dict | set) or not np.iterable(values):
        raise InputTypeError(
            f"{name}={short(values)} is a {type(values).__name__}; pass a list with one entry each"
        )
    found = list(values)
    if not found:
        raise InputError(f"{name}=[] is empty; pass at least one")
    return found


def is_text(name: str, value: object) -> bool:
    """True for a string, False for a sequence of token ids.

    Raises:
      InputTypeError: it is neither.
    """
    if isinstance(value, str):
        return True
    if isinstance(value, list | tuple | np.ndarray | torch.Tensor):
        return False
    raise InputTypeError(
        f"{name}={short(value)} is a {type(value).__name__}; it must be a string or token ids"
    )


def all_text(name: Callable[[int], str], values: Sequence[object]) -> bool:
    """Whether all entries are strings (True) or all are token ids (False); `name(i)` names one.

    Raises:
      InputTypeError: an entry is neither, or the entries are mixed.
    """
    kinds = [is_text(name(i), value) for i, value in enumerate(values)]
    if any(kinds) and not all(kinds):
        odd = kinds.index(not kinds[0])
        raise InputTypeError(
            f"{name(odd)}={short(values[odd])} and {name(0)}={short(values[0])} mix text and token "
            "ids; pass one kind in one argument"
        )
    return kinds[0]


def token_ids(name: str, values: Any, vocab_size: int) -> TokenIds:
    """Token ids as i64[num_tokens].

    Raises:
      InputTypeError: an id is a bool, a float or another type, or the ids are not one flat row.
      InputError: an id is negative or >= `vocab_size`.
    """
    if isinstance(values, list | tuple):
        for i, value in enumerate(values):
            if type(value) is not int and not isinstance(value, np.integer):
                raise InputTypeError(
                    f"{name}[{i}]={short(value)} is a {type(value).__name__}; token ids must be int"
                )
        if any(not -(2**63) <= value < 2**63 for value in values):
            raise InputError(f"{name}={short(values)} has an id that no vocabulary holds")
        ids = np.asarray(values, np.int64)
    else:
        ids = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InputTypeError(
                f"{name} is {ids.dtype}{list(ids.shape)}; token ids must be one row of integers"
            )
        ids = ids.astype(np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise InputError(
            f"{name}[{bad[0]}]={ids[bad[0]]} is not in the vocabulary; "
            f"ids must be 0 to {vocab_size - 1}"
        )
    return ids


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of `choices`.

    Raises:
      InputError: it is not.
    """
    if value not in choices:
        raise InputError(f"{name}={short(value)} must be one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: object, at_most: int | None = None, *, least: int = 1) -> None:
    """Refuse what is neither None nor an integer from `least` to `at_most`.

    Raises:
      InputTypeError: it is of another type.
      InputError: it is out of range.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name}={short(value)} must be an int or None")
    if value < least or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise InputError(f"{name}={value} must be at least {least}{upper}")


def as_pairs(name: str, values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """(query, document) pairs, each of two entries.

    Raises:
      InputTypeError: an entry is not a pair.
      InputError: there are none.
    """
    found = as_list(name, values)
    for i, pair in enumerate(found):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputTypeError(f"{name}[{i}]={short(pair)} must be (query, document)")
    return [(query, document) for query, document in found]


def as_requests(name: str, values: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """(query, items) each.

    Raises:
      InputTypeError: an entry is not such a pair.
      InputError: there are none, or one has no items.
    """
    found = as_list(name, values)
    for i, entry in enumerate(found):
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise InputTypeError(f"{name}[{i}]={short(entry)} must be (query, items)")
    return [(query, as_list(f"{name}[{i}][1]", items)) for i, (query, items) in enumerate(found)]


def as_iterator(name: str, values: Iterable[Any]) -> Iterator[Any]:
    """An iterator over values that need not end.

    Raises:
      InputTypeError: it is a single text, or nothing to iterate over.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise InputTypeError(f"{name}={short(values)} must be an iterable of texts or token ids")
    return iter(values)
