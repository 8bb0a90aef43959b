"""A reranker's chat template as a `PromptSpec`: what frames the query and the document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from packscore.errors import UnsupportedModelError
from packscore.text.prompts import PromptSpec
from packscore.text.tokenizer import PieceTokenizer

Render = Callable[[str, str], str]  # (query, document) -> the whole text

# Private-use characters, which no template contains.
QUERY_MARK = "\ue000query\ue000"
DOCUMENT_MARK = "\ue001document\ue001"
# Pairs on which the spec must give what the template gives: blanks at either end, which a template
# may strip, quotes and angle brackets, which it may escape, and nothing.
PROBES = (("a", ""), ("", "b"), (" a\n", "\n b "), ("<a>'\"&", "{b}<|im_end|>"), ("A", "9" * 50))


def spec_of_chat_template(render: Render) -> PromptSpec:
    """The prompt that a chat template makes of a query and a document.

    Args:
      render: the template's text for a query and a document.

    Returns:
      A spec whose text equals the template's, cut before the blank in front of the document.

    Raises:
      UnsupportedModelError: the template drops, repeats, reorders or changes the texts.
    """
    whole = render(QUERY_MARK, DOCUMENT_MARK)
    for name, mark in (("query", QUERY_MARK), ("document", DOCUMENT_MARK)):
        if whole.count(mark) != 1:
            raise UnsupportedModelError(
                f"chat_template puts the {name} in {whole.count(mark)} times and it must be once; "
                f"pass template='qwen3-reranker' or a PromptSpec"
            )
    head, _, rest = whole.partition(QUERY_MARK)
    middle, _, suffix = rest.partition(DOCUMENT_MARK)
    if DOCUMENT_MARK in head:
        raise UnsupportedModelError(
            "chat_template puts the document before the query, so that nothing could be shared; "
            "pass template=PromptSpec(...) with the query first"
        )
    shared = middle.rstrip(" ")
    spec = PromptSpec(
        prefix=f"{_escape(head)}{{query}}{_escape(shared)}",
        item=f"{middle[len(shared) :]}{{item}}",
        suffix=_escape(suffix),
        adds_special_tokens=False,
    )
    for query, document in PROBES:
        if render(query, document) != head + query + middle + document + suffix:
            raise UnsupportedModelError(
                f"chat_template changes what it frames, such as {query!r} and {document!r}; "
                "pass template=PromptSpec(...) and texts as they should be"
            )
    return spec


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


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
