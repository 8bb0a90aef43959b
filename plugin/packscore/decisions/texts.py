"""JSON as text, and text inside a frame that it cannot imitate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from packscore.errors import InputError, InputTypeError
from packscore.inputs import is_text, short

# str, int, float, bool, None, and lists and dicts of these
Json: TypeAlias = Any

MAX_DEPTH = 64
INDENT = "  "
# what json.dumps leaves as it is and str.splitlines, or a reader, takes for the end of a line
UNESCAPED = re.compile("[\x7f-\x9f\u2028\u2029]")


def checked_json(name: str, value: Any, depth: int = 0) -> Json:
    """A copy of a JSON value that nobody else can change.

    Raises:
      InputTypeError: something in it is no JSON.
      InputError: it holds half of a surrogate pair, NaN, an infinity or a huge number, or is too
        deep.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"{name} is nested more than {MAX_DEPTH} deep (does it hold itself?)")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        is_text(name, value)
        return str(value)
    if isinstance(value, int | float):
        return _checked_number(name, value)
    if isinstance(value, list | tuple):
        return [checked_json(f"{name}[{i}]", x, depth + 1) for i, x in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            check_key(name, key)
        return {str(k): checked_json(f"{name}[{short(k)}]", x, depth + 1) for k, x in value.items()}
    raise InputTypeError(
        f"{name}={short(value)} is a {type(value).__name__}; it must be text or JSON (str, int, "
        "float, bool, None, list, dict), so convert it first"
    )


def check_key(name: str, key: Any) -> None:
    """Refuse a key that is no text: JSON would make text of it, perhaps of two of them the same.

    Raises:
      InputTypeError, InputError: it is no string, or half of a surrogate pair is in it.
    """
    if not isinstance(key, str):
        raise InputTypeError(f"{name} has the key {short(key)}; keys must be strings")
    is_text(f"{name}: the key {short(key)}", key)


def _checked_number(name: str, value: float) -> float:
    try:
        repr(value)
    except ValueError:  # more digits than Python writes
        raise InputError(f"{name} is an int of too many digits; pass it as text") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}={value} is no JSON number; pass None, or text that says it")
    return value


def json_of(value: Json) -> str:
    """A value as JSON in exactly one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return UNESCAPED.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def text_of(value: Json) -> str:
    """What the model reads of a state, of instructions, of a description.

    A string is read as it is; anything else as JSON in one line. Lines of "key: value" would read
    the same for {"a": "b: c"} and {"a": {"b": "c"}}, for 1 and "1", for a text of two lines and a
    list; JSON is never the same for two values, and models have seen much of it.
    """
    return value if isinstance(value, str) else json_of(value)


def indented(text: str) -> str:
    """The text with two blanks before every line: no line of it begins as a line of the frame.

    A frame's own lines begin with a letter, a digit or a mark, never with a blank. So nothing
    inside a text can be a heading, an option or the last line. Ends of lines stay what they are;
    all that `str.splitlines` knows count as such.
    """
    lines = f"{text}.".splitlines(keepends=True)  # the full stop, for an empty last line counts
    return "".join(INDENT + line for line in lines)[:-1]


def hanging(text: str) -> str:
    """The same for a text that begins behind something on the frame's own line."""
    return indented(text)[len(INDENT) :]


def is_blank(value: Json) -> bool:
    """Whether it says nothing: null, no character but blanks, nothing in it."""
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())
