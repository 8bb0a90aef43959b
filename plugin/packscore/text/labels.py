"""Labels as token ids: of one token or of several, and how scores of tokens become theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch

from packscore.errors import InputError, InputTypeError
from packscore.inputs import as_list, short, token_ids
from packscore.text.tokenizer import PieceTokenizer

# One id a label, or a sequence of ids a label.
LabelIds: TypeAlias = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Labels:
    """What items are scored for; a classifier's labels are sequences of one class id each.

    A label's log-probability is the sum over its tokens of log P(token | query, item, the label's
    tokens before it). Those tokens before are a *context*. Labels share contexts: all of them the
    empty one, which alone is left where every label is one token.

    Args:
      sequences: ids of every label, distinct, none empty.
    """

    sequences: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def token_ids(self) -> list[int]:
        """The distinct ids of all labels: for labels of one token these, in their order."""
        return list(dict.fromkeys(i for sequence in self.sequences for i in sequence))

    @cached_property
    def leaves(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The contexts that no other continues, and of each the lengths of those first seen there.

        They run behind an item; at the ends of these lengths all contexts are read once.
        """
        beginnings = dict.fromkeys(seq[:-1] for seq in self.sequences)
        begun = {longer[:end] for longer in beginnings for end in range(len(longer))}
        seen: set[tuple[int, ...]] = set()
        found = []
        for leaf in beginnings:
            if leaf in begun:
                continue
            new = tuple(end for end in range(len(leaf) + 1) if leaf[:end] not in seen)
            seen |= {leaf[:end] for end in new}
            found.append((leaf, new))
        return tuple(found)

    @cached_property
    def contexts(self) -> tuple[tuple[int, ...], ...]:
        """The distinct proper beginnings of all labels, leaf by leaf; the empty one is first."""
        return tuple(leaf[:end] for leaf, ends in self.leaves for end in ends)

    @property
    def are_single(self) -> bool:
        """Whether every label is one token, read where the item ends."""
        return len(self.contexts) == 1

    @property
    def num_extra_tokens(self) -> int:
        """Tokens that the longest context puts behind an item."""
        return max(map(len, self.contexts))

    @property
    def ids(self) -> list[int] | list[list[int]]:
        """One id a label where every label is one token, else one list a label."""
        return self.token_ids if self.are_single else [list(ids) for ids in self.sequences]

    @property
    def are_exclusive(self) -> bool:
        """Whether no label begins another one."""
        return set(self.contexts).isdisjoint(self.sequences)

    def check_exclusive(self) -> None:
        """Refuse to compare a label with one that it begins, for it can never score lower.

        Raises:
          InputError: a label begins another one.
        """
        for beginning in self.contexts:
            if beginning in self.sequences:
                raise InputError(
                    f"labels: token ids {list(beginning)} are a label and begin another one, so "
                    "they cannot score lower; to compare the two, end both with the text that "
                    "would follow (a newline), or score over the vocabulary"
                )

    def log_probs(
        self,
        logits: torch.Tensor,  # float32[num_items, num_contexts, num_token_ids]
        normalizer: torch.Tensor,  # float32[num_items, num_contexts], over the vocabulary
        *,
        is_mean: bool = False,
    ) -> torch.Tensor:
        """Log-probabilities of the labels, of the logits of `token_ids` behind all `contexts`.

        Args:
          logits: behind every context, of every token.
          normalizer: behind every context.
          is_mean: the mean over a label's tokens instead of the sum.

        Returns:
          float32[num_items, num_labels].
        """
        each = logits - normalizer[..., None]
        row = {context: i for i, context in enumerate(self.contexts)}
        column = {token: i for i, token in enumerate(self.token_ids)}
        sums = [
            torch.stack([each[:, row[ids[:at]], column[token]] for at, token in enumerate(ids)])
            for ids in self.sequences
        ]
        return torch.stack([parts.mean(0) if is_mean else parts.sum(0) for parts in sums], 1)


def read_labels(
    labels: Sequence[str] | None,
    label_token_ids: LabelIds | None,
    tokenizer: PieceTokenizer | None,
    limit: int,
) -> Labels | None:
    """Labels given as text or as ids; None where neither is given.

    A text's ids are those of the text alone; they come behind the ids of the prompt.

    Args:
      labels: texts.
      label_token_ids: ids instead.
      tokenizer: of the texts.
      limit: ids must be below it.

    Raises:
      InputError, InputTypeError: the labels are not distinct tokens, or runs of tokens, below
        `limit`.
    """
    if labels is not None and label_token_ids is not None:
        raise InputError("labels and label_token_ids are two ways to say one thing; pass one")
    if isinstance(label_token_ids, np.ndarray | torch.Tensor):
        label_token_ids = label_token_ids.tolist()
    if labels is not None:
        sequences = _of_texts(as_list("labels", labels), tokenizer)
    elif label_token_ids is not None:
        sequences = _of_ids(as_list("label_token_ids", label_token_ids), limit)
    else:
        return None
    found = Labels(tuple(sequences))
    if len(set(sequences)) < len(sequences):
        given = [list(ids) if len(ids) > 1 else ids[0] for ids in sequences]
        raise InputError(f"labels: token ids {given} hold one label twice; name each label once")
    if max(found.token_ids) >= limit:
        raise InputError(
            f"labels: token id {max(found.token_ids)} must be below {limit}, the size of the "
            "model's vocabulary; use the model's own tokenizer"
        )
    return found


def _of_texts(labels: list[object], tokenizer: PieceTokenizer | None) -> list[tuple[int, ...]]:
    if tokenizer is None:
        raise InputError(f"labels={short(labels)} needs a tokenizer; pass label_token_ids")
    sequences = []
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise InputTypeError(
                f"labels[{i}]={short(label)} must be a string; ids go to label_token_ids"
            )
        (ids,) = tokenizer.encode([[(label, True)]])
        if not len(ids):
            raise InputError(f"labels[{i}]={label!r} is 0 tokens; a label must have at least one")
        sequences.append(tuple(ids.tolist()))
    return sequences


def _of_ids(values: list[Any], limit: int) -> list[tuple[int, ...]]:
    are_sequences = [isinstance(x, list | tuple | np.ndarray | torch.Tensor) for x in values]
    if not any(are_sequences):
        return [(i,) for i in token_ids("label_token_ids", values, limit).tolist()]
    sequences = []
    for i, value in enumerate(values):
        if not are_sequences[i]:
            raise InputTypeError(
                f"label_token_ids[{i}]={short(value)} is one id and others are lists; pass one "
                "id for each label, or one list for each"
            )
        sequences.append(tuple(token_ids(f"label_token_ids[{i}]", value, limit).tolist()))
        if not sequences[-1]:
            raise InputError(f"label_token_ids[{i}]=[] is 0 tokens; a label must have one or more")
    return sequences
