"""Launches that are running, and their results on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import torch

from packscore.flows.engine import Readout, RowValues
from packscore.programs.sizes import HEAD_ROWS, MOST_LABELS

Float32 = npt.NDArray[np.float32]
# (hidden states, label ids, whether over the vocabulary) to logits, log-sum-exp and largest
LabelHead = Callable[[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int32]], Any]


def stops_before_head(readout: Readout) -> bool:
    """Whether hidden states are read of the program, which the head then reads by itself."""
    return readout.hidden or not 0 < len(readout.label_ids) <= MOST_LABELS


@dataclass(frozen=True, eq=False)
class Launched:
    """A program that is running, and which of its results are real.

    Args:
      parts: of the first rows and of others: hidden states, or float32 logits of labels with the
        log-sum-exp and the largest of the vocabulary's.
      num_rows: how many are real.
      readout: what is read.
      head: of hidden states; None where the program itself has it.
    """

    parts: tuple[Any, ...]
    num_rows: int
    readout: Readout
    head: LabelHead | None = None

    @property
    def is_done(self) -> bool:
        """Whether all that it gives is there."""
        return all(part.is_ready() for part in jax.tree.leaves(self.parts))

    def read(self) -> RowValues:
        """Wait for the program, and what was read."""
        if self.head is not None:
            return self._of_hidden(fetched(self.parts, self.num_rows), self.head)
        logits, *of_vocabulary = (
            torch.from_numpy(fetched(part, self.num_rows).copy()) for part in self._wanted()
        )
        return RowValues(logits[:, : len(self.readout.label_ids)], *of_vocabulary)

    def _wanted(self) -> list[tuple[jax.Array, ...]]:
        each = list(zip(*self.parts, strict=True))
        return each if self.readout.over_vocabulary else each[:1]

    def _of_hidden(self, hidden: npt.NDArray[Any], head: LabelHead) -> RowValues:
        ids = np.array(self.readout.label_ids, np.int32)
        logits = np.zeros((len(hidden), len(ids)), np.float32)
        normalizer, largest = np.zeros((2, len(hidden)), np.float32)
        over = self.readout.over_vocabulary
        for at, rows in chunks(hidden):
            for start in range(0, max(len(ids), int(over)), MOST_LABELS):
                some = ids[start : start + MOST_LABELS]
                padded = np.zeros(MOST_LABELS, np.int32)
                padded[: len(some)] = some
                # of the vocabulary once
                found = head(rows, padded, np.array(over and not start, np.int32))
                chosen, total, most = (np.asarray(part)[: at.stop - at.start] for part in found)
                logits[at, start : start + len(some)] = chosen[:, : len(some)]
                if over and not start:
                    normalizer[at], largest[at] = total, most
        values = RowValues(torch.from_numpy(logits))
        if over:
            values = replace(
                values,
                normalizer=torch.from_numpy(normalizer),
                largest=torch.from_numpy(largest),
            )
        if self.readout.hidden:
            values = replace(values, hidden=torch.from_numpy(hidden.astype(np.float32)))
        return values


def chunks(hidden: npt.NDArray[Any]) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    """Which rows, and these padded to the rows of a program of the head."""
    few, many = HEAD_ROWS
    step = few if len(hidden) <= few else many
    for start in range(0, len(hidden), step):
        part = hidden[start : start + step]
        padded = np.zeros((step, *hidden.shape[1:]), hidden.dtype)
        padded[: len(part)] = part
        yield slice(start, start + len(part)), padded


def fetched(parts: Sequence[jax.Array], count: int) -> npt.NDArray[Any]:
    """The first `count` rows of arrays one behind the other, of which only those are waited for."""
    found: list[npt.NDArray[Any]] = []
    for part in parts:
        if count > 0 or not found:
            found.append(np.asarray(part)[: max(count, 0)])
            count -= len(part)
    return found[0] if len(found) == 1 else np.concatenate(found)
