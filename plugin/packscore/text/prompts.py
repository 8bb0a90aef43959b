"""Prompts as templates of three parts: what all items share, the item, and what ends every item."""

from __future__ import annotations

import string
from dataclasses import dataclass, fields

from packscore.errors import InputError
from packscore.telling import cut, telling

SHARED_FIELDS = ("query", "instruction")
ITEM_FIELD = "item"


@dataclass(frozen=True)
class PromptSpec:
    """A prompt as `prefix | item | suffix`, each a template with fields in braces.

    The text of one item is `prefix + item + suffix`. Cut the template before a space, not after
    it (`"Document:"` | `" {item}"`): then the shared part is the same tokens for every item and is
    encoded once. Any other cut is exact too, but encodes the whole text once for every item.

    Args:
      prefix: may use `{query}` and `{instruction}`; shared by all items of a query.
      item: uses `{item}` exactly once.
      suffix: has no field; ends every item and survives truncation.
      instruction: default for `{instruction}`.
      labels: default label texts; two labels mean (negative, positive).
      max_tokens: budget of prefix + item + suffix; None is the model's own maximum.
      joins_ids: encode prefix and item on their own and join the ids, also where a tokenizer would
        merge characters across the cut.
      adds_special_tokens: with the special tokens that the tokenizer puts before and behind a text
        (a BOS, an EOS), where the prompt does not spell them. False is for a prompt that is whole
        as it is, as a chat template's is.

    Raises:
      InputError: a field is unknown, missing or in the wrong part.
    """

    prefix: str
    item: str
    suffix: str = ""
    instruction: str = ""
    labels: tuple[str, ...] = ()
    max_tokens: int | None = None
    joins_ids: bool = False
    adds_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_fields("prefix", self.prefix, SHARED_FIELDS)
        _check_fields("item", self.item, (ITEM_FIELD,))
        _check_fields("suffix", self.suffix, ())
        if template_fields(self.item) != [ITEM_FIELD]:
            raise InputError(f"item={self.item!r} must use {{item}} exactly once")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens} must be at least 1, or None")

    @telling
    def __repr__(self) -> str:
        given = ((f.name, f.default, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={cut(x)}" for name, default, x in given if x != default)

    @property
    def spelled(self) -> str:
        """All of it, so that no other spec is spelled so; what a run on files keeps of it."""
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"PromptSpec({', '.join(given)})"


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Cut a template into (literal text, field behind it or None); a brace is written twice."""
    parts: list[tuple[str, str | None]] = []
    for literal, field, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            raise ValueError(f"the field {field!r} has a format, and texts go in as they are")
        parts.append((literal, field))
    return parts


def template_fields(template: str) -> list[str]:
    """Names of the fields of a template, in order."""
    return [field for _, field in parse_template(template) if field is not None]


def _check_fields(part: str, template: str, allowed: tuple[str, ...]) -> None:
    try:
        fields = template_fields(template)
    except ValueError as error:
        raise InputError(f"{part}={template!r} is not a template: {error}") from error
    for field in fields:
        if field not in allowed:
            may = " or ".join(f"{{{name}}}" for name in allowed) or "no field"
            raise InputError(
                f"{part}={template!r} uses {{{field}}}; it may use {may} "
                "(write a literal brace twice)"
            )


# Byte for byte the recipe of the Qwen3-Reranker model cards.
# Source: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B, "Transformers Usage".
QWEN3_RERANKER = PromptSpec(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"
    ),
    item=" {item}",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    labels=("no", "yes"),
    max_tokens=8192,
)

YES_NO = PromptSpec(
    prefix="{instruction}\nQuestion: {query}\nText:",
    item=" {item}",
    suffix="\nAnswer:\n",
    instruction="Answer the question about the text with yes or no.",
    labels=("no", "yes"),
)

PLAIN = PromptSpec(prefix="{query}", item="{item}", joins_ids=True)

PROMPTS = {"plain": PLAIN, "qwen3-reranker": QWEN3_RERANKER, "yes-no": YES_NO}


def resolve_prompt(prompt: str | PromptSpec | None) -> PromptSpec:
    """The spec behind a name; None is `plain`.

    Raises:
      InputError: the name is not built in.
    """
    if isinstance(prompt, PromptSpec):
        return prompt
    name = "plain" if prompt is None else prompt
    if not isinstance(name, str) or name not in PROMPTS:
        raise InputError(
            f"prompt={prompt!r} must be a PromptSpec or one of {', '.join(sorted(PROMPTS))}"
        )
    return PROMPTS[name]
