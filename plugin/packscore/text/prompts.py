"""Prompts as templates of three parts: what all items share, the item, and what ends every item."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from packscore.errors import InputError
from packscore.telling import cut, telling
from packscore.text.chat_template import STRIPS, frame_of

SHARED_FIELDS = ("query", "instruction")
ITEM_FIELD = "item"
# No text: the ids of what is before it and behind it are encoded apart.
CUT_FIELD = "cut"
# Fields that came later, which `spelled` tells only where they say something.
LATER = {"later": True}


@dataclass(frozen=True)
class PromptSpec:
    """A prompt as `prefix | item | suffix`, each a template with fields in braces.

    The text of one item is `prefix + item + suffix`. Cut the template before a space, not after
    it (`"Document:"` | `" {item}"`): then the shared part is the same tokens for every item and is
    encoded once. Any other cut is exact too, but encodes the whole text once for every item.

    Args:
      prefix: may use `{query}` and `{instruction}`; shared by all items of a query.
      item: uses `{item}` exactly once.
      suffix: ends every item and survives truncation; may use what the prefix may use, for a prompt
        with the document before the query.
      instruction: default for `{instruction}`.
      labels: default labels, as texts or as token ids; two mean (negative, positive).
      max_tokens: budget of prefix + item + suffix; None is the model's own maximum.
      joins_ids: encode prefix and item on their own and join the ids, also where a tokenizer would
        merge characters across the cut. Inside a prefix or suffix, `{cut}` does so at its place.
      adds_special_tokens: with the special tokens that the tokenizer puts before and behind a text
        (a BOS, an EOS), where the prompt does not spell them. False is for a prompt that is whole
        as it is, as a chat template's is.
      instruction_frame: what `{instruction}` becomes, with `{instruction}` in it; nothing where the
        instruction is empty.
      scale: `rank` and `predict` give sigmoid(scale * x), where x is the log-odds of two labels or
        the logit of the only one; None gives x itself.
      strips: what goes off the texts first: "" nothing, "blanks" those at both ends of query and
        item, "item newlines" those before the item.

    Raises:
      InputError: a field is unknown, missing or in the wrong part, or a value that cannot be.
    """

    prefix: str
    item: str
    suffix: str = ""
    instruction: str = ""
    labels: tuple[str, ...] | tuple[int, ...] = ()
    max_tokens: int | None = None
    joins_ids: bool = False
    adds_special_tokens: bool = True
    instruction_frame: str = field(default="{instruction}", metadata=LATER)
    scale: float | None = field(default=1.0, metadata=LATER)
    strips: str = field(default="", metadata=LATER)

    def __post_init__(self) -> None:
        _check_fields("prefix", self.prefix, (*SHARED_FIELDS, CUT_FIELD))
        _check_fields("suffix", self.suffix, (*SHARED_FIELDS, CUT_FIELD))
        _check_fields("item", self.item, (ITEM_FIELD,))
        _check_fields("instruction_frame", self.instruction_frame, ("instruction",))
        if template_fields(self.item) != [ITEM_FIELD]:
            raise InputError(f"item={self.item!r} must use {{item}} exactly once")
        frame = self.instruction_frame
        if template_fields(frame) != ["instruction"]:
            raise InputError(f"instruction_frame={frame!r} must use {{instruction}} exactly once")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens} must be at least 1, or None")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise InputError(f"scale={self.scale} must be a positive number, or None")
        if len(set(map(type, self.labels))) > 1:
            raise InputError(f"labels={self.labels} must be texts, or token ids, and not both")
        if self.strips not in STRIPS:
            raise InputError(
                f"strips={self.strips!r} must be one of {', '.join(map(repr, STRIPS))}"
            )

    @classmethod
    def from_chat_template(
        cls,
        tokenizer: Any,
        *,
        user: str,
        system: str | None = None,
        assistant: str | None = None,
        answer: str = "",
        instruction: str = "",
        labels: tuple[str, ...] | tuple[int, ...] = (),
        max_tokens: int | None = None,
        scale: float | None = 1.0,
        enable_thinking: bool = False,
    ) -> Self:
        """The prompt that a tokenizer's chat template makes of messages with fields in braces.

        >>> PromptSpec.from_chat_template(          # doctest: +SKIP
        ...     tokenizer, system="{query}", user="{item}", labels=("No", "Yes")
        ... )

        Args:
          tokenizer: has a `chat_template`.
          user, system: messages, which may use `{query}`, `{item}` and `{instruction}`, each once
            in all of them, and `{item}` in one.
          assistant: the reply, for a model that scores one; None opens a turn for the answer.
          answer: what the answer begins with, before the place where labels are read.
          instruction, labels, max_tokens, scale: of the prompt.
          enable_thinking: for the template, which may open an answer without a thought for False.

        Raises:
          UnsupportedModelError: the template drops, repeats or changes the texts.
          InputError: a message uses another field, or one twice.
        """
        messages = {"system": system, "user": user, "assistant": assistant}
        given = {role: text for role, text in messages.items() if text is not None}
        for role, text in given.items():
            _check_fields(role, text, (*SHARED_FIELDS, ITEM_FIELD))
        used = [name for text in given.values() for name in template_fields(text)]
        if used.count(ITEM_FIELD) != 1 or len(set(used)) < len(used):
            raise InputError(
                f"messages use the fields {used}; they must use {{item}}, and each only once"
            )

        def render(**values: str) -> str:
            chat = [{"role": role, "content": filled(text, values)} for role, text in given.items()]
            found: str = tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=assistant is None,
                enable_thinking=enable_thinking,
            )
            return found

        return replace(
            cls.from_render(render, tuple(used), answer=answer),
            instruction=instruction,
            labels=labels,
            max_tokens=max_tokens,
            scale=scale,
        )

    @classmethod
    def from_render(
        cls,
        render: Callable[..., str],
        names: tuple[str, ...] = ("query", "item"),
        *,
        answer: str = "",
    ) -> Self:
        """The prompt whose text is `render`'s, cut before the blank in front of the item.

        Args:
          render: the whole text for the values of its fields, which are keywords.
          names: those fields, `item` among them.
          answer: what comes behind the text.

        Raises:
          UnsupportedModelError: the text is not one of the values in a frame.
        """
        frame = frame_of(render, names)
        literals = list(map(_escape, frame.literals))
        behind = [f"{{{name}}}{text}" for name, text in zip(frame.names, literals[1:], strict=True)]
        at = frame.names.index(ITEM_FIELD)
        before = "".join([literals[0], *behind[:at]])
        suffix = "".join([literals[at + 1], *behind[at + 1 :]])
        prefix = before.rstrip(" ")
        return cls(
            prefix=prefix,
            item=f"{before[len(prefix) :]}{{item}}",
            suffix=suffix + _escape(answer),
            adds_special_tokens=False,
            strips=frame.strips,
        )

    @telling
    def __repr__(self) -> str:
        given = ((f.name, f.default, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={cut(x)}" for name, default, x in given if x != default)

    @property
    def spelled(self) -> str:
        """All of it, so that no other spec is spelled so; what a run on files keeps of it."""
        told = (
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if not f.metadata or getattr(self, f.name) != f.default
        )
        return f"PromptSpec({', '.join(f'{name}={x!r}' for name, x in told)})"

    @property
    def shared_fields(self) -> frozenset[str]:
        """Which of `{query}` and `{instruction}` have a place in it."""
        used = {*template_fields(self.prefix), *template_fields(self.suffix)}
        return frozenset(used.intersection(SHARED_FIELDS))

    @property
    def num_ranked(self) -> int:
        """How many labels a rank score is made of: one, or two that are compared."""
        return 1 if len(self.labels) == 1 else 2

    def stripped(self, query: str, items: list[str]) -> tuple[str, list[str]]:
        """The texts without what `strips` takes off them."""
        of_query, of_item = STRIPS[self.strips]
        return of_query(query), list(map(of_item, items))


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Cut a template into (literal text, field behind it or None); a brace is written twice."""
    parts: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            raise ValueError(f"the field {name!r} has a format, and texts go in as they are")
        parts.append((literal, name))
    return parts


def template_fields(template: str) -> list[str]:
    """Names of the fields of a template, in order."""
    return [name for _, name in parse_template(template) if name is not None]


def filled(template: str, values: dict[str, str]) -> str:
    """The text of a template for the values of its fields."""
    return "".join(text + values.get(name or "", "") for text, name in parse_template(template))


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _check_fields(part: str, template: str, allowed: tuple[str, ...]) -> None:
    try:
        used = template_fields(template)
    except ValueError as error:
        raise InputError(f"{part}={template!r} is not a template: {error}") from error
    for one in used:
        if one not in allowed:
            may = " or ".join(f"{{{name}}}" for name in allowed)
            raise InputError(
                f"{part}={template!r} uses {{{one}}}; it may use {may} "
                "(write a literal brace twice)"
            )
