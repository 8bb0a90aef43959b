"""Text to token ids by a tokenizer that is copied, never changed, never fooled by a document."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from packscore.encoded import TokenIds
from packscore.errors import InputError
from packscore.inputs import short

# What markup begins and ends with, where it was added as no special token: <think>, [DOC].
MARKS = frozenset("<>[]{}|")
# What stands for a mark where texts hold none: private characters, and still found in a text.
UNWRITTEN = "\ue000{}\ue000"
# Characters up to which texts are encoded by the calling thread, one by one.
ALONE = 4000
# (text, whether special tokens in it count as such); None is where the text is cut in two that are
# encoded apart.
Pieces = list[tuple[str, bool] | None]


class PieceTokenizer:
    """Encodes texts made of pieces, in some of which special tokens are ordinary text.

    So are, in those, tokens that were merely added and look like markup: `<think>` frames an answer
    as `<|im_end|>` ends a turn. Words that were added stay tokens everywhere.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._marks = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or _is_mark(str(token))
        }
        self.vocab_size = len(tokenizer)
        self._known: dict[str, list[int]] = {}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._mark_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, texts: Sequence[Pieces]) -> list[TokenIds]:
        """Token ids of every text, i64[num_tokens] each, without added special tokens."""
        all_runs = [self._runs(pieces) for pieces in texts]
        known = self._known | self._ids_of_runs(all_runs)
        return [
            np.array(
                [x for run in runs for x in ([run] if isinstance(run, int) else known[run])],
                np.int64,
            )
            for runs in all_runs
        ]

    def remember(self, texts: Sequence[Pieces]) -> None:
        """Keep the token ids of what lies between special tokens, as all later texts repeat it."""
        self._known |= self._ids_of_runs([self._runs(pieces) for pieces in texts])

    def _ids_of_runs(self, all_runs: list[list[str | int]]) -> dict[str, list[int]]:
        """Token ids of the strings that are not known yet, each encoded once."""
        runs = dict.fromkeys(run for runs in all_runs for run in runs if isinstance(run, str))
        strings = [run for run in runs if run not in self._known]
        return dict(zip(strings, self.encode_strings(strings), strict=True))

    def encode_strings(
        self, texts: list[str], *, split_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of plain strings, in one call of the tokenizer.

        Args:
          texts: the strings.
          split_special_tokens: read special tokens, and others that look like markup, as text.

        Raises:
          InputError: a text spells one that the tokenizer's own model holds, so that it cannot.
        """
        if not texts:
            return []
        if not split_special_tokens:
            return self._call(texts, split_special_tokens=False)
        if self._text_only is None:
            encoded = self._call(texts, split_special_tokens=True)
        else:
            encoded = _ids_of(self._text_only, texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.mentions_special(text):
                self._check_split(text, ids)
        return encoded

    def encode_whole(self, texts: list[str]) -> list[list[int]]:
        """What the tokenizer makes of each text by itself, with what it adds before and behind."""
        return [self._tokenizer(text, verbose=False)["input_ids"] for text in texts]

    def _call(self, texts: list[str], **options: Any) -> list[list[int]]:
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )["input_ids"]
        return encoded

    def _check_split(self, text: str, ids: list[int]) -> None:
        for mark in self._mark_pattern.findall(text):
            if self._marks[mark] in ids:
                raise InputError(
                    f"{short(text)} spells {mark!r}, which this tokenizer cannot read as text; "
                    "take it out, or pass split_special_tokens=False"
                )

    @cached_property
    def _text_only(self) -> Tokenizer | None:
        """The tokenizer without its marks; None where it is written in Python."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        parts = json.loads(backend.to_str())
        parts |= {"truncation": None, "padding": None}
        for token in parts["added_tokens"]:  # they stay, for the others' ids count them
            if token["content"] in self._marks:
                token["content"] = UNWRITTEN.format(token["content"])
        found: Tokenizer = Tokenizer.from_str(json.dumps(parts))
        return found

    def mentions_special(self, text: str) -> bool:
        """Whether `text` spells a special token, or another that looks like markup."""
        return self._mark_pattern.search(text) is not None

    @property
    def leading_ids(self) -> list[int]:
        """The special tokens that this tokenizer puts before a text, such as a BOS."""
        return self._around[0]

    @property
    def trailing_ids(self) -> list[int]:
        """Those that it puts behind one, such as an EOS."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        ((whole,), (plain,)) = self.encode_whole(["a"]), self.encode_strings(["a"])
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def _runs(self, pieces: Pieces) -> list[str | int]:
        """Text between special tokens as strings, special tokens as their ids.

        A special token ends a run of text for the tokenizer, so that runs encoded one by one are
        the whole text encoded at once; a cut ends one by itself.
        """
        runs: list[str | int] = []
        text = ""
        for found in pieces:
            if found is None:
                runs, text = [*runs, text], ""
                continue
            piece, specials_count = found
            start = 0
            for match in self._mark_pattern.finditer(piece) if specials_count else ():
                runs += [text + piece[start : match.start()], self._marks[match.group()]]
                text, start = "", match.end()
            text += piece[start:]
        return [run for run in [*runs, text] if run != ""]


def _ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if sum(map(len, texts)) < ALONE:  # other threads would take longer to wake
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _is_mark(token: str) -> bool:
    """Whether an added token looks like markup, and not like a word that was added."""
    return token[:1] in MARKS and token[-1:] in MARKS
