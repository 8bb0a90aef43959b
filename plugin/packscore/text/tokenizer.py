"""Text to token ids by a tokenizer that is copied, never changed, never fooled by a document."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from packscore.encoded import TokenIds

Pieces = list[tuple[str, bool]]  # (text, whether special tokens in it count as such)


class PieceTokenizer:
    """Encodes texts made of pieces, in some of which special tokens are ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._special_ids = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.vocab_size = len(tokenizer)
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, texts: Sequence[Pieces]) -> list[TokenIds]:
        """Token ids of every text, i64[num_tokens] each, without added special tokens."""
        all_runs = [self._runs(pieces) for pieces in texts]
        strings = [run for runs in all_runs for run in runs if isinstance(run, str)]
        ids = iter(self.encode_strings(strings))
        return [
            np.array(
                [x for run in runs for x in ([run] if isinstance(run, int) else next(ids))],
                np.int64,
            )
            for runs in all_runs
        ]

    def encode_strings(
        self, texts: list[str], *, split_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of plain strings, in one call of the tokenizer."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=split_special_tokens,
            verbose=False,
        )["input_ids"]
        return encoded

    def mentions_special(self, text: str) -> bool:
        """Whether the text of a special token occurs in `text`."""
        return self._special_pattern.search(text) is not None

    @cached_property
    def leading_ids(self) -> list[int]:
        """The special tokens that this tokenizer puts before a text, such as a BOS."""
        with_special = list(self._tokenizer("a", verbose=False)["input_ids"])
        (plain,) = self.encode_strings(["a"])
        for start in range(len(with_special) - len(plain) + 1):
            if with_special[start : start + len(plain)] == plain:
                return with_special[:start]
        return []

    def _runs(self, pieces: Pieces) -> list[str | int]:
        """Text between special tokens as strings, special tokens as their ids.

        A special token ends a run of text for the tokenizer, so that runs encoded one by one are
        the whole text encoded at once.
        """
        runs: list[str | int] = []
        text = ""
        for piece, specials_count in pieces:
            start = 0
            for match in self._special_pattern.finditer(piece) if specials_count else ():
                runs += [text + piece[start : match.start()], self._special_ids[match.group()]]
                text, start = "", match.end()
            text += piece[start:]
        return [run for run in [*runs, text] if run != ""]
