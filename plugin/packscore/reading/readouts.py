"""What a score is read from: labels, their tokens, or hidden states by a head of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from packscore.encoded import EncodedRequest, Rows, TokenIds
from packscore.errors import InputError, InputTypeError
from packscore.inputs import Text, check_choice, short
from packscore.telling import telling
from packscore.text.labels import LabelIds


@dataclass(frozen=True)
class Label:
    """P(label) behind an item; of a label of several tokens the product of theirs."""


@dataclass(frozen=True)
class Content:
    """The log-probabilities of a label's own tokens behind an item, so for labels of any length.

    Args:
      reduce: "sum" adds them up, which is what `Label` does; "mean" is the mean over the label's
        tokens, so that a long label is not less likely for its length.

    Raises:
      InputError: there is no such reduction.
    """

    reduce: Literal["sum", "mean"] = "mean"

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, ("sum", "mean"))


@dataclass(frozen=True)
class Hidden:
    """Hidden states at tokens of the items, handed to a head of one's own.

    Args:
      head: takes a list with float32[num_rows, hidden_size] of every item, after the model's final
        norm and on the model's device, and returns for every item a number or some numbers, as a
        tensor of [num_items] or [num_items, n], or as a list. It sees all items of a request, and
        may look across them.
      rows: from an item's token ids to the indices of those that are read, in the order that the
        head wants; None reads the last one. Ids are those that run: with the prompt's own.

    Raises:
      InputTypeError: the head or the rows cannot be called.
    """

    head: Callable[[list[torch.Tensor]], Any]
    rows: Callable[[TokenIds], Sequence[int] | Rows] | None = None

    def __post_init__(self) -> None:
        for name, value in (("head", self.head), ("rows", self.rows or len)):
            if not callable(value):
                raise InputTypeError(f"{name}={short(value)} must be a function or a module")

    def rows_of(
        self, request: EncodedRequest, name: Callable[[int], str]
    ) -> tuple[Rows, ...] | None:
        """The rows of every item of a request; None: its last one.

        Raises:
          InputError, InputTypeError: they are not indices of the item's tokens.
        """
        if self.rows is None:
            return None
        found = []
        for i, item in enumerate(request.items):
            given = self.rows(item.copy())
            rows = np.asarray(given)
            if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
                raise InputTypeError(
                    f"readout: rows gives {short(given)} for {name(i)}; it must give a list of "
                    "indices of the item's tokens"
                )
            if rows.size and not 0 <= rows.min() <= rows.max() < len(item):
                raise InputError(
                    f"readout: rows gives {short(given)} for {name(i)}, which has {len(item)} "
                    "tokens; indices must be below that, and at least 0"
                )
            found.append(rows.astype(np.int64))
        return tuple(found)

    def scores(self, hidden: Sequence[torch.Tensor]) -> list[list[float]]:
        """What the head makes of the rows of every item.

        Raises:
          InputError: that is not a number, or some, for each item.
        """
        with torch.inference_mode():
            given = self.head(list(hidden))
        try:
            found = [_numbers(one) for one in given]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"readout: head gives {short(given)}; it must give for every item a number or "
                "some numbers"
            ) from error
        if len(found) != len(hidden):
            raise InputError(
                f"readout: head gives {len(found)} results for {len(hidden)} items; it must give "
                "one for each"
            )
        return found


def _numbers(value: Any) -> list[float]:
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1).tolist()


Readout: TypeAlias = Label | Content | Hidden


def check_readout(name: str, value: object) -> None:
    """Refuse what is no readout.

    Raises:
      InputTypeError: it is none.
    """
    if not isinstance(value, Label | Content | Hidden):
        raise InputTypeError(f"{name}={short(value)} must be Label(), Content(...) or Hidden(...)")


@dataclass(frozen=True)
class ScoreRequest:
    """One query and its items for `score_many`, with options of its own where they differ.

    Args:
      query: as in `score`.
      items: as in `score`.
      labels, label_token_ids, item_labels, item_label_token_ids: as in `score`; where all are None
        those of the call count.
      apply_softmax: as in `score`; None takes the call's.
      readout: as in `score`; None takes the call's.
    """

    query: Text
    items: Iterable[Text]
    labels: Sequence[str] | None = None
    label_token_ids: LabelIds | None = None
    item_labels: Sequence[Sequence[str]] | None = None
    item_label_token_ids: Sequence[LabelIds] | None = None
    apply_softmax: bool | None = None
    readout: Readout | None = None

    @telling
    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name}={short(value)}" for name, value in given.items())
