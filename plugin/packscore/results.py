"""What scoring returns beside the scores: the tokens it took and what it did to the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NotRequired, TypedDict, TypeVar

from packscore.telling import cut, telling

T = TypeVar("T")

Flow = Literal["packed", "extend", "chunked", "plain"]
FLOWS: tuple[Flow, ...] = ("packed", "extend", "chunked", "plain")
# what a scorer does about scores that are no numbers
NonFiniteChoice = Literal["raise", "report"]
# how a scorer is asked to keep items apart, and what ran
MaskChoice = Literal["auto", "segment", "dense"]
MaskImpl = Literal["segment", "dense", "causal", "mixed"]


@dataclass(frozen=True)
class Usage:
    """What one call computed.

    Args:
      prompt_tokens: tokens that scoring the items one by one would compute, each again for every
        beginning of labels of several tokens that no other continues.
      computed_tokens: tokens that ran through the model, padding apart.
      computed_prefix_tokens: those of them that are a prefix's; 0 where all were in pages.
      prefix_tokens_saved: prompt_tokens - computed_tokens: the prefix tokens that items shared, the
        item tokens that the beginnings of labels did, and all of an item that came before.
      padding_tokens: padding that ran through the model beside them.
      truncated_items: indices of items that lost their end to the budget.
      special_token_items: indices of items whose text holds a special token's.
      non_finite_items: indices of items with a label's logit, or what normalises it, that is NaN or
        infinite; their scores are NaN.
      flow: "packed" (prefix and items in one launch), "extend" (the prefix was in pages, items
        only), "chunked" (the prefix once, the items in several launches), "plain" (nothing shared),
        or "mixed" over queries.
      mask_impl: the attention that ran: "segment", "dense", or "causal" where one sequence alone
        needs no other mask; "mixed" over queries.
      cached_tokens: prefix tokens that were in pages, and did not run.
      last_layer_tokens: those of the computed tokens that ran through the whole last layer: the
        rows that are read, or all where `explain` says so. Of the others it gave keys and values.
    """

    prompt_tokens: int
    computed_tokens: int
    computed_prefix_tokens: int
    prefix_tokens_saved: int
    padding_tokens: int
    truncated_items: tuple[int, ...]
    special_token_items: tuple[int, ...]
    flow: Flow | Literal["mixed"]
    mask_impl: MaskImpl
    non_finite_items: tuple[int, ...] = ()
    cached_tokens: int = 0
    last_layer_tokens: int = 0

    @property
    def input_tokens(self) -> int:
        """Tokens of the input, what items share once: those that ran, and those read from pages."""
        return self.computed_tokens + self.cached_tokens

    @property
    def output_tokens(self) -> int:
        """0: scores are read where the input ends, and nothing is generated."""
        return 0

    @telling
    def __repr__(self) -> str:
        lists = (
            f"{name}={cut(getattr(self, name))}"
            for name in ("truncated_items", "special_token_items", "non_finite_items")
            if getattr(self, name)
        )
        computed = f"{self.computed_tokens:,} of {self.prompt_tokens:,} tokens computed"
        return ", ".join([computed, f"flow={self.flow!r}", f"mask_impl={self.mask_impl!r}", *lists])


@dataclass(frozen=True)
class ScoreResult(Generic[T]):
    """Scores together with the usage that `return_usage=True` asks for."""

    scores: T
    usage: Usage

    @telling
    def __repr__(self) -> str:
        return f"scores={cut(self.scores)}, usage={self.usage!r}"


class RankedDocument(TypedDict):
    """One entry of `rank`: index among the documents, score, and the text when asked for."""

    corpus_id: int
    score: float
    text: NotRequired[str]


def merge_usages(usages: Sequence[Usage], indices: Sequence[Sequence[int]]) -> Usage:
    """The usage of several queries; `indices[g][i]` is where item i of query g was in the input."""

    def where(name: str) -> tuple[int, ...]:
        found = (
            index[i]
            for usage, index in zip(usages, indices, strict=True)
            for i in getattr(usage, name)
        )
        return tuple(sorted(found))

    def total(name: str) -> int:
        return sum(getattr(usage, name) for usage in usages)

    flows = {usage.flow for usage in usages}
    masks = {usage.mask_impl for usage in usages}
    return Usage(
        prompt_tokens=total("prompt_tokens"),
        computed_tokens=total("computed_tokens"),
        computed_prefix_tokens=total("computed_prefix_tokens"),
        prefix_tokens_saved=total("prefix_tokens_saved"),
        padding_tokens=total("padding_tokens"),
        truncated_items=where("truncated_items"),
        special_token_items=where("special_token_items"),
        non_finite_items=where("non_finite_items"),
        flow=flows.pop() if len(flows) == 1 else "mixed",
        mask_impl=masks.pop() if len(masks) == 1 else "mixed",
        cached_tokens=total("cached_tokens"),
        last_layer_tokens=total("last_layer_tokens"),
    )
