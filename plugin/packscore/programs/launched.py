"""Launches that are running, and their results on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from packscore.flows.engine import Readout

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Launched:
    """A program that is running, and which of its results are real."""

    # (float32[num_rows, at least num_labels], float32[num_rows]) of the first rows and of others
    parts: tuple[tuple[jax.Array, jax.Array], ...]
    num_items: int
    readout: Readout

    def read(self) -> tuple[Float32, Float32]:
        """Wait for (float32[num_items, num_labels], float32[num_items]): logits and normaliser."""
        logits, normalizers = zip(*self.parts, strict=True)
        chosen = fetched(logits, self.num_items)[:, : len(self.readout.label_ids)]
        if self.readout.over_vocabulary:
            return chosen, fetched(normalizers, self.num_items)
        # over the labels it is taken here, without the padding labels
        peak = chosen.max(-1)
        return chosen, peak + np.log(np.exp(chosen - peak[:, None]).sum(-1))


def fetched(parts: Sequence[jax.Array], count: int) -> npt.NDArray[Any]:
    """The first `count` rows of arrays one behind the other, of which only those are waited for."""
    found: list[npt.NDArray[Any]] = []
    for part in parts:
        if count > 0 or not found:
            found.append(np.asarray(part)[: max(count, 0)])
            count -= len(part)
    return found[0] if len(found) == 1 else np.concatenate(found)
