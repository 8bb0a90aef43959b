"""Checks of what users pass: typed errors that name the argument, its value and the remedy."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch

from packscore.encoded import TokenIds
from packscore.errors import InputError, InputTypeError
from packscore.results import FLOWS, MaskChoice, NonFiniteChoice

CallT = TypeVar("CallT", bound=Callable[..., Any])
TokenIdsLike: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"
Text: TypeAlias = "str | TokenIdsLike"


def short(value: object) -> str:
    """A value's repr, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_list(name: str, values: Iterable[Any], *, may_be_empty: bool = False) -> list[Any]:
    """The elements of a list-like argument.

    Raises:
      InputTypeError: it is None, one string, not iterable, or has no order or no single column.
      InputError: it is empty, and may not be.
    """
    _check_listed(name, values)
    found = list(values)
    if not found and not may_be_empty:
        raise InputError(f"{name}=[] is empty; pass at least one")
    return found


def _check_listed(name: str, values: Any) -> None:
    """Refuse what looks like a list and gives something else, or in any order."""
    columns = getattr(values, "column_names", None)  # a table of datasets or pyarrow
    columns = getattr(values, "columns", None) if columns is None else columns  # a DataFrame
    if columns is not None and not isinstance(values, np.ndarray):
        column = next(iter(columns), "text")
        raise InputTypeError(
            f"{name} is a {type(values).__name__}, which has columns; pass one, such as "
            f"{name}=table[{column!r}]"
        )
    if isinstance(values, Mapping | Set):
        kind = "has keys" if isinstance(values, Mapping) else "has no order"
        raise InputTypeError(
            f"{name}={short(values)} is a {type(values).__name__}, which {kind}; pass a list with "
            "one entry each"
        )
    if values is None or isinstance(values, str | bytes) or not np.iterable(values):
        raise InputTypeError(
            f"{name}={short(values)} is a {type(values).__name__}; pass a list with one entry each"
        )


def is_text(name: str, value: object) -> bool:
    """True for a string, False for a sequence of token ids.

    Raises:
      InputTypeError: it is neither.
      InputError: it has half of a surrogate pair.
    """
    if isinstance(value, str):
        _check_characters(name, value)
        return True
    if isinstance(value, list | tuple | np.ndarray | torch.Tensor):
        return False
    raise InputTypeError(
        f"{name}={short(value)} is a {type(value).__name__}; it must be a string or token ids"
    )


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half of a surrogate pair ({text[error.start]!r}) at character "
            f"{error.start}, which is no text; repair it, for one by text.encode('utf-16', "
            "'surrogatepass').decode('utf-16', 'replace')"
        ) from None


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
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InputTypeError(f"{name}={short(value)} must be an int or None")
    if value < least or (at_most is not None and value > at_most):
        upper = "" if at_most is None else f" and at most {at_most}"
        raise InputError(f"{name}={value} must be at least {least}{upper}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a text such as "false" would count as true.

    Raises:
      InputTypeError: it is of another type.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputTypeError(f"{name}={short(value)} must be True or False")


def check_activation(name: str, value: Any) -> None:
    """Refuse what does not give one score for each, tried on two.

    Raises:
      InputTypeError: it cannot be called with a tensor, or gives none.
      InputError: it gives another shape.
    """
    if value is None:
        return
    if not callable(value):
        raise InputTypeError(f"{name}={short(value)} must be a function of a tensor, or None")
    try:
        with torch.inference_mode():
            found = value(torch.tensor([0.5, -0.5]))
    except Exception as error:
        if isinstance(error, RuntimeError) and "device" in str(error):
            return  # its weights are on the model's
        raise InputTypeError(
            f"{name}={short(value)} fails on a tensor of two numbers ({error}); it must give one "
            "score for each, and nothing else"
        ) from error
    if not isinstance(found, torch.Tensor):
        raise InputTypeError(f"{name}={short(value)} gives a {type(found).__name__}, not a tensor")
    if tuple(found.shape) != (2,):
        raise InputError(
            f"{name}={short(value)} gives the shape {list(found.shape)} for 2 scores; it must give "
            "one for each"
        )


def _or_none(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    return lambda name, value: None if value is None else check(name, value)


def _check_string(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputTypeError(f"{name}={short(value)} must be a string, or None")


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        raise InputTypeError(f"{name}={short(value)} must be a path, or None")


def _check_device(name: str, value: object) -> None:
    if not isinstance(value, str | torch.device | list | tuple):
        raise InputTypeError(f"{name}={short(value)} must be a string, a torch.device, or None")


def _check_dtype(name: str, value: object) -> None:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(
            f"{name}={short(value)} must be 'auto', or a floating dtype of torch or its name, such "
            "as torch.bfloat16 or 'bfloat16'"
        )


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise InputTypeError(f"{name}={short(value)} must be a dict, or None")


def _check_seconds(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number:
        raise InputTypeError(f"{name}={short(value)} must be a number")
    if not 0 < value < float("inf"):
        raise InputError(f"{name}={value} must be above 0")


def _check_window(name: str, value: Any) -> None:
    if type(value) is not int or value:  # 0 does not wait
        _check_seconds(name, value)


def _check_number(name: str, value: Any) -> None:
    if value is None:
        raise InputTypeError(f"{name}=None must be an int")
    check_count(name, value)


def _check_one_of(*choices: str) -> Callable[[str, Any], None]:
    return lambda name, value: check_choice(name, value, choices)


# What every option of the public calls may be, wherever it stands.
OPTIONS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(["apply_softmax", "item_first", "plain_calls", "show"], check_flag),
    **dict.fromkeys(
        ["return_usage", "return_documents", "return_items", "return_exceptions"], check_flag
    ),
    "show_progress_bar": check_flag,
    "split_special_tokens": _or_none(check_flag),
    **dict.fromkeys(
        ["top_k", "max_items", "batch_size", "num_labels", "permutations"], check_count
    ),
    # the type alone: the scorer knows what the model holds, and says it
    "max_tokens": functools.partial(check_count, least=-sys.maxsize),
    "prefix_cache_bytes": functools.partial(check_count, least=0),
    "flow": _or_none(_check_one_of(*FLOWS)),
    "mask_impl": _check_one_of(*get_args(MaskChoice)),
    "on_long": _check_one_of("truncate", "error"),
    "on_non_finite": _check_one_of(*get_args(NonFiniteChoice)),
    "activation_fn": check_activation,
    **dict.fromkeys(["local_files_only", "trust_remote_code"], check_flag),
    **dict.fromkeys(["instruction", "revision"], _or_none(_check_string)),
    **dict.fromkeys(["compile_cache", "cache_dir"], _or_none(_check_path)),
    "device": _or_none(_check_device),
    "dtype": _check_dtype,
    "model_kwargs": _or_none(_check_mapping),
    "seconds": _check_seconds,
    "max_requests": _check_number,
    "window_seconds": _check_window,
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a wrong type or value, by `OPTIONS`.

    Raises:
      InputTypeError, InputError: naming the option, its value and what it must be.
    """
    for name, value in options.items():
        if name in OPTIONS:
            OPTIONS[name](name, value)


def checked(call: CallT) -> CallT:
    """A public call whose keyword options are checked before anything runs."""

    @functools.wraps(call)
    def checking(*args: Any, **options: Any) -> Any:
        check_options(options)
        return call(*args, **options)

    return cast(CallT, checking)


def as_pairs(
    name: str, values: Iterable[Any], *, may_be_empty: bool = False
) -> list[tuple[Any, Any]]:
    """(query, document) pairs, each of two entries.

    Raises:
      InputTypeError: an entry is not a pair.
      InputError: there are none, and may not be none.
    """
    found = as_list(name, values, may_be_empty=may_be_empty)
    for i, pair in enumerate(found):
        if not _is_row(pair) or len(pair) != 2:
            raise InputTypeError(f"{name}[{i}]={short(pair)} must be (query, document)")
    return [(query, document) for query, document in found]


def as_requests(name: str, values: Iterable[Any]) -> list[tuple[Any, list[Any]]]:
    """(query, items) each; there may be none, of either.

    Raises:
      InputTypeError: an entry is not such a pair.
    """
    found = as_list(name, values, may_be_empty=True)
    for i, entry in enumerate(found):
        if not _is_row(entry) or len(entry) != 2:
            raise InputTypeError(f"{name}[{i}]={short(entry)} must be (query, items)")
    return [
        (query, as_list(f"{name}[{i}][1]", items, may_be_empty=True))
        for i, (query, items) in enumerate(found)
    ]


def _is_row(value: Any) -> bool:
    """Whether it is a row of two things, also one of a numpy array of texts."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "UOT"
    return isinstance(value, list | tuple)


def as_iterator(name: str, values: Iterable[Any]) -> Iterator[Any]:
    """An iterator over values that need not end.

    Raises:
      InputTypeError: as `as_list` raises it.
    """
    _check_listed(name, values)
    return iter(values)
