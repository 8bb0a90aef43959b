"""Where a chat model's answer stands: what its template writes around a message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from packscore.errors import UnsupportedModelError

# Private characters, which no template contains.
REPLY = "\ue000reply\ue000"
MESSAGE = "message \ue001."
# Messages that a template must leave as they are. Ours begin with a letter and end with a full
# stop, so that it may strip them.
PROBES = ("a\n\n  b\n.", "a <b>'\"& {c} {{d}} {% e %} <|im_end|> .", "a " + "9" * 50 + ".")
# How templates open and close a block of thoughts: <think> </think>, [THINK] [/THINK],
# <seed:think>, <|START_THINKING|> <|END_THINKING|>, <|channel>thought <channel|>, ...
NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis)"
THOUGHTS = re.compile(
    rf"(?P<opens>[<\[◁]\|?(?:(?:start|begin)_(?:of_)?)?(?:\w+:)?{NAMES}\|?[>\]▷]|<\|channel>thought)"
    rf"|[<\[◁]\|?(?:/|end_(?:of_)?)(?:\w+:)?{NAMES}\|?[>\]▷]|<channel\|>",
    re.IGNORECASE,
)
OTHERWISE = "give the tokenizer a chat_template that does not, or None for a plain frame"


@dataclass(frozen=True)
class Frame:
    """What stands around one user's message, up to the first token of the reply.

    Args:
      head: before the message.
      tail: behind it; the reply follows.
      ending: what ends a reply.
      adds_leading: whether the tokenizer's BOS comes first; a chat template spells its own.
    """

    head: str
    tail: str
    ending: str
    adds_leading: bool


PLAIN_FRAME = Frame(head="", tail="\n\nAnswer:\n", ending="\n", adds_leading=True)


def frame_of(tokenizer: Any) -> Frame:
    """The frame of the tokenizer's chat template with thinking off; a plain one without template.

    Raises:
      UnsupportedModelError: the template fails, changes messages, leaves a block of thoughts open,
        or puts a reply elsewhere than behind its generation prompt.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return PLAIN_FRAME
    whole = _render(tokenizer, MESSAGE)
    if whole.count(MESSAGE) != 1:
        raise UnsupportedModelError(
            f"chat_template writes the user's message {whole.count(MESSAGE)} times and it must be "
            f"once; {OTHERWISE}"
        )
    head, _, tail = whole.partition(MESSAGE)
    for message in PROBES:
        if _render(tokenizer, message) != head + message + tail:
            raise UnsupportedModelError(
                f"chat_template changes what it frames, such as {message!r}; {OTHERWISE}"
            )
    _check_no_thoughts(tail)
    before, mark, behind = _render(tokenizer, MESSAGE, REPLY).partition(REPLY)
    if not mark or _bare(before) != _bare(whole):
        raise UnsupportedModelError(
            f"chat_template puts a reply behind {before[-60:]!r} and its generation prompt ends "
            f"with {tail[-60:]!r}, so that an answer is not what follows; {OTHERWISE}"
        )
    if before.startswith(whole):  # a reply on a line of its own, which the model would begin
        blanks = before[len(whole) :]
        tail += blanks[: blanks.rfind("\n") + 1]
    return Frame(head, tail, ending=_first_special(tokenizer, behind), adds_leading=False)


def _render(tokenizer: Any, message: str, reply: str | None = None) -> str:
    messages = [{"role": "user", "content": message}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=reply is None,
            enable_thinking=False,
        )
    except Exception as error:  # whatever a template raises
        what = "a user's message" if reply is None else "a reply"
        raise UnsupportedModelError(
            f"chat_template fails on {what} ({error}); {OTHERWISE}"
        ) from error
    return text


def _first_special(tokenizer: Any, text: str) -> str:
    """The first special token in a text; a line's end where there is none."""
    specials = [str(x) for x in tokenizer.added_tokens_decoder.values() if x.special]
    found = [
        (text.index(special), -len(special), special) for special in specials if special in text
    ]
    return min(found)[-1] if found else "\n"


def _check_no_thoughts(tail: str) -> None:
    *_, last = [None, *THOUGHTS.finditer(tail)]
    if last is not None and last["opens"]:
        raise UnsupportedModelError(
            f"chat_template leaves {last.group()} open with enable_thinking=False, so that "
            f"thoughts would follow and no answer; {OTHERWISE}"
        )


def _bare(text: str) -> str:
    """Without blocks of thoughts, which a template may put before a reply or not, and blanks."""
    return "".join(THOUGHTS.sub("", text).split())
