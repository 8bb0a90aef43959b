"""Query and items to token ids: exactly those of the whole text, encoded as little as possible."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import InputError, InputTypeError
from packscore.inputs import all_text, is_text, short, token_ids
from packscore.text.named import resolve_prompt
from packscore.text.prompts import CUT_FIELD, PromptSpec, parse_template
from packscore.text.tokenizer import Pieces, PieceTokenizer

# Texts on which the cut of a template is tried once for every tokenizer: what often merges with a
# neighbour (blanks, newlines, punctuation, digits, combining marks) and what never should.
PROBES = ("a", "", " a", "\na", "'s", "-1", "9", ").", "\u0301a", "本", "🐼", "a \n", "a'")


@dataclass(frozen=True)
class ArgumentNames:
    """What the caller calls the query and item i, for error messages."""

    query: str = "query"
    item: Callable[[int], str] = "items[{}]".format


class Vocabulary(Protocol):
    """What knows the model's vocabulary, which may change."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has an embedding for."""
        ...


class RequestEncoder(Protocol):
    """What turns the arguments of `score` into token ids."""

    @property
    def takes_text(self) -> bool:
        """Whether texts can be encoded; else they must come as ids."""
        ...

    def encode(
        self,
        query: Any,
        items: list[Any],
        names: ArgumentNames,
        *,
        item_first: bool = False,
        extra: int = 0,
    ) -> EncodedRequest:
        """Token ids of a query and its items, with room for `extra` tokens behind each."""
        ...


@dataclass(frozen=True)
class Budget:
    """How many tokens prefix and one item may have, and what happens to an item that has more."""

    max_tokens: int
    on_long: str
    model_limit: int = sys.maxsize  # at least as many

    def beside(self, extra: int) -> Budget:
        """The budget that leaves the model room for `extra` tokens."""
        return replace(self, max_tokens=min(self.max_tokens, self.model_limit - extra))

    def check_room(self, prefix_len: int, tail_len: int, names: ArgumentNames) -> int:
        """Tokens left for an item behind its prefix.

        Raises:
          InputError: the query alone leaves none.
        """
        room = self.max_tokens - prefix_len
        if room <= tail_len:
            raise InputError(
                f"{names.query} and its prompt have {prefix_len + tail_len} tokens, which leaves "
                f"none of max_tokens={self.max_tokens} for an item; shorten the query"
            )
        return room

    def fit(self, body: TokenIds, tail: TokenIds, room: int, name: str) -> TokenIds:
        """`body + tail` in `room` tokens: the body loses its end, the tail nothing.

        Raises:
          InputError: it is longer, and `on_long` is "error".
        """
        length = len(body) + len(tail)
        if length > room and self.on_long == "error":
            raise InputError(
                f"{name} has {length} tokens, {length - room} over max_tokens={self.max_tokens} "
                "with its query; shorten it or pass on_long='truncate'"
            )
        return np.concatenate([body[: max(0, room - len(tail))], tail])


class PlainEncoder:
    """`query + item` or `item + query`, joined as ids; each part is text or token ids."""

    def __init__(
        self,
        tokenizer: PieceTokenizer | None,
        budget: Budget,
        vocabulary: Vocabulary,
        *,
        split_special_tokens: bool | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._budget = budget
        self._vocabulary = vocabulary
        # the caller supplies the whole text: it is encoded as the tokenizer would
        self._split_special_tokens = bool(split_special_tokens)

    @property
    def takes_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def encode(
        self,
        query: Any,
        items: list[Any],
        names: ArgumentNames,
        *,
        item_first: bool = False,
        extra: int = 0,
    ) -> EncodedRequest:
        """Token ids of `query` and `items`; the tokenizer's BOS comes first, its EOS last.

        Raises:
          InputTypeError, InputError: they are not text or ids that can be scored.
        """
        query_is_text, items_are_text = is_text(names.query, query), all_text(names.item, items)
        (query_ids,) = self._to_ids([query], query_is_text, lambda _: names.query, not item_first)
        item_ids = self._to_ids(items, items_are_text, names.item, item_first)
        nothing = np.zeros(0, np.int64)
        prefix, tail = (nothing, query_ids) if item_first else (query_ids, nothing)
        budget = self._budget.beside(extra)
        room = budget.check_room(len(prefix), len(tail), names)
        fitted = [budget.fit(ids, tail, room, names.item(i)) for i, ids in enumerate(item_ids)]
        for i, ids in enumerate(fitted):
            if not len(prefix) and not len(ids):
                raise InputError(
                    f"{names.item(i)} and {names.query} are both empty, so there is no token to "
                    "score at; give one of them a token"
                )
        truncated = [i for i, ids in enumerate(item_ids) if len(ids) + len(tail) > room]
        special = [
            i
            for i, item in enumerate(items)
            if items_are_text and self._tokenizer and self._tokenizer.mentions_special(item)
        ]
        return EncodedRequest(prefix, fitted, truncated, special)

    def _to_ids(
        self, values: list[Any], are_text: bool, name: Callable[[int], str], comes_first: bool
    ) -> list[TokenIds]:
        if not are_text:
            limit = self._vocabulary.vocab_size
            return [token_ids(name(i), ids, limit) for i, ids in enumerate(values)]
        if self._tokenizer is None:
            raise InputTypeError(
                f"{name(0)}={short(values[0])} is text and the scorer has no tokenizer; "
                "pass token ids, or give MultiItemScorer a tokenizer"
            )
        leading = self._tokenizer.leading_ids if comes_first else []
        trailing = [] if comes_first else self._tokenizer.trailing_ids
        encoded = self._tokenizer.encode_strings(
            values, split_special_tokens=self._split_special_tokens
        )
        return [np.array([*leading, *ids, *trailing], np.int64) for ids in encoded]


class PromptEncoder:
    """Query and items in the frame of a prompt: the ids of the whole text, shared where they agree.

    Raises:
      InputError: the tokenizer changes blanks around the template's special tokens.
    """

    takes_text = True

    def __init__(
        self,
        tokenizer: PieceTokenizer,
        budget: Budget,
        spec: PromptSpec,
        *,
        instruction: str,
        split_special_tokens: bool | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._budget = budget
        self._spec = spec
        self._instruction = instruction
        # the frame is ours: documents are text, and can forge nothing of it
        self._split_special_tokens = split_special_tokens is None or split_special_tokens
        (self._item_head, _), *rest = parse_template(spec.item)
        # what follows the document in the item's template survives truncation like the suffix
        self._item_rest = "".join(literal for literal, _ in rest)
        self._tokenizer.remember([self._prefix("a"), [*self._body("a"), *self._tail("a")]])
        self._before, self._behind = self._added()
        self._cut_is_exact = self._try_cut()

    def encode(
        self,
        query: Any,
        items: list[Any],
        names: ArgumentNames,
        *,
        item_first: bool = False,
        extra: int = 0,
    ) -> EncodedRequest:
        """Token ids of the prompt for `query` and each of `items`.

        Raises:
          InputTypeError, InputError: they are not text that can be scored in this prompt.
        """
        if item_first:
            raise InputError("item_first=True has no meaning in a prompt; pass prompt='plain'")
        if not is_text(names.query, query) or not all_text(names.item, items):
            raise InputTypeError(
                f"{names.query} and items must be text for this prompt; pass prompt='plain' for ids"
            )
        asks = "query" in self._spec.shared_fields
        if asks and not query.strip():
            raise InputError(f"{names.query}={query!r} is empty, and the prompt asks about it")
        if query.strip() and not asks:
            raise InputError(
                f"{names.query}={short(query)} has no place in this prompt; pass an empty text, or "
                "a prompt with {query}"
            )
        query, items = self._spec.stripped(query, items)
        prefix_pieces, tail_pieces = self._prefix(query), self._tail(query)
        shared = [] if self._cut_is_exact else prefix_pieces
        # the tail is encoded with its item, for they may merge where no special token starts it
        texts = [[*shared, *self._body(item)] for item in items]
        first, last, *each = self._tokenizer.encode(
            [prefix_pieces, tail_pieces, *([*text, *tail_pieces] for text in texts)]
        )
        prefix, tail = np.append(self._before, first), np.append(last, self._behind)
        budget = self._budget.beside(extra)
        room = budget.check_room(len(prefix), len(tail), names)
        limit = room if self._cut_is_exact else room + len(prefix)
        before = self._before[:0] if self._cut_is_exact else self._before
        encoded = [np.concatenate([before, ids, self._behind]) for ids in each]
        truncated = [i for i, ids in enumerate(encoded) if len(ids) > limit]
        for i, body in zip(
            truncated, self._tokenizer.encode([texts[i] for i in truncated]), strict=True
        ):
            encoded[i] = budget.fit(np.append(before, body), tail, limit, names.item(i))
        if not self._cut_is_exact:
            shared_len = common_prefix_len(encoded)
            prefix, encoded = encoded[0][:shared_len], [ids[shared_len:] for ids in encoded]
        special = [i for i, item in enumerate(items) if self._tokenizer.mentions_special(item)]
        return EncodedRequest(prefix, encoded, truncated, special)

    def _prefix(self, query: str) -> Pieces:
        return self._pieces(self._spec.prefix, query)

    def _tail(self, query: str) -> Pieces:
        return [(self._item_rest, True), *self._pieces(self._spec.suffix, query)]

    def _pieces(self, template: str, query: str) -> Pieces:
        pieces: Pieces = []
        for literal, name in parse_template(template):
            pieces.append((literal, True))
            if name == CUT_FIELD:
                pieces.append(None)
            elif name == "query":
                pieces.append((query, not self._split_special_tokens))
            elif name == "instruction" and self._instruction:
                (head, _), *rest = parse_template(self._spec.instruction_frame)
                pieces += [(head, True), (self._instruction, not self._split_special_tokens)]
                pieces += [(behind, True) for behind, _ in rest]
        return pieces

    def _added(self) -> tuple[TokenIds, TokenIds]:
        """What the tokenizer puts around a text, where the prompt does not spell it itself."""
        before, behind = self._tokenizer.leading_ids, self._tokenizer.trailing_ids
        first, last = self._tokenizer.encode([self._prefix("a"), self._tail("a")])
        adds = self._spec.adds_special_tokens
        is_spelled = first[: len(before)].tolist() == before
        ends_so = last[len(last) - len(behind) :].tolist() == behind
        return (
            np.array(before if adds and not is_spelled else [], np.int64),
            np.array(behind if adds and not ends_so else [], np.int64),
        )

    def _body(self, item: str) -> Pieces:
        return [(self._item_head, True), (item, not self._split_special_tokens)]

    def _try_cut(self) -> bool:
        """Whether prefix and item, encoded apart, are the whole text encoded at once.

        Byte-level tokenizers start a new token at a space after other text, so a template cut there
        is exact; the probes catch the tokenizers that do otherwise.
        """
        prefix, tail = self._prefix("a"), self._tail("a")
        bodies = [[*self._body(probe), *tail] for probe in PROBES]
        composed = [[*prefix, *body] for body in bodies]
        parts = [_between_cuts(pieces) for pieces in composed]
        encode = functools.partial(self._tokenizer.encode_strings, split_special_tokens=False)
        whole = [[x for ids in encode(texts) for x in ids] for texts in parts]
        found = self._tokenizer.encode(composed)
        added = [np.concatenate([self._before, ids, self._behind]).tolist() for ids in found]
        is_added = (len(self._before) or len(self._behind)) and max(map(len, parts)) == 1
        expected = self._tokenizer.encode_whole(["".join(one) for one in parts]) if is_added else []
        if [ids.tolist() for ids in found] != whole or (is_added and added != expected):
            raise InputError(
                "prompt: this tokenizer changes the text around the template's special tokens; "
                "pass token ids, or a template without them"
            )
        is_cut = (prefix or [("", True)])[-1] is None
        if not is_cut and (not self._item_head.startswith(" ") or self._spec.prefix[-1:].isspace()):
            return False
        (prefix_ids,) = self._tokenizer.encode([prefix])
        return [[*prefix_ids, *ids] for ids in self._tokenizer.encode(bodies)] == whole


def _between_cuts(pieces: Pieces) -> list[str]:
    """The texts that are encoded apart."""
    texts = [""]
    for piece in pieces:
        if piece is None:
            texts.append("")
        else:
            texts[-1] += piece[0]
    return texts


def request_encoder(
    prompt: str | PromptSpec | None,
    tokenizer: PieceTokenizer | None,
    budget: Budget,
    vocabulary: Vocabulary,
    *,
    instruction: str | None,
    split_special_tokens: bool | None,
) -> RequestEncoder:
    """What encodes requests in a prompt's way; an instruction of None is the prompt's.

    Raises:
      InputError: the prompt does not exist, is text without a tokenizer, or does not suit it.
    """
    spec = resolve_prompt(prompt)
    if spec.joins_ids:
        return PlainEncoder(
            tokenizer, budget, vocabulary, split_special_tokens=split_special_tokens
        )
    if tokenizer is None:
        raise InputError(f"prompt={short(prompt)} is text, which needs a tokenizer; pass one")
    return PromptEncoder(
        tokenizer,
        budget,
        spec,
        instruction=spec.instruction if instruction is None else instruction,
        split_special_tokens=split_special_tokens,
    )


def common_prefix_len(sequences: Sequence[TokenIds]) -> int:
    """How many leading token ids all `sequences` share."""
    first, shared = sequences[0], len(sequences[0])
    for ids in sequences[1:]:
        shared = min(shared, len(ids))
        differs = np.flatnonzero(ids[:shared] != first[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


def group_by_query(pairs: Sequence[tuple[Any, Any]]) -> list[list[int]]:
    """Indices of the pairs of every distinct query, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for i, (query, _) in enumerate(pairs):
        is_array = isinstance(query, np.ndarray | torch.Tensor)
        groups.setdefault(repr(query.tolist() if is_array else query), []).append(i)
    return list(groups.values())
