"""Logits from hidden states, in float32: only the rows that are scored, only what is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from packscore.encoded import EncodedRequest
from packscore.errors import InputError, UnsupportedModelError
from packscore.interfaces import hooks_of
from packscore.model.family import output_head
from packscore.model.masks import final_cap
from packscore.model.place import rows_in_torch
from packscore.model.stored import Stored
from packscore.text.labels import LabelIds, Labels, read_labels
from packscore.text.prompts import PromptSpec
from packscore.text.tokenizer import PieceTokenizer

# Vocabulary columns of one step of the log-sum-exp: bounds the float32 copy of the head's weight.
VOCAB_CHUNK = 16_384
# Rows of one step through a head that is not a plain linear layer and gives the whole vocabulary.
ROW_CHUNK = 256
PLURALS = {"token": "tokens", "class": "classes"}


class LinearHead:
    """The head of a model, read at a few of its rows.

    Raises:
      UnsupportedModelError: the model has no head that gives scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        output_head(model)
        self._model = model

    @property
    def _head(self) -> Any:
        """The head of now, which may be another than when the scorer was made."""
        # Any: modules and hooks of other libraries stand in for a linear layer here
        return output_head(self._model)

    @property
    def _is_plain(self) -> bool:
        # an adapter, a quantised layer or an offloaded weight has to run as the module it is
        head = self._head
        is_hooked = hooks_of(head) or "forward" in head.__dict__
        return type(head) is nn.Linear and not is_hooked and head.weight.device.type != "meta"

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has an embedding for."""
        embedding: Any = self._model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    def _check_trained(self, name: str, kind: str, row_ids: list[int]) -> None:
        """Refuse rows that are not finite, all zero or not all different: nothing trained them."""
        if not self._is_plain and not isinstance(getattr(self._head, "weight", None), Stored):
            return
        rows: Any = rows_in_torch(self._head.weight, row_ids).float()
        for row, row_id in zip(rows, row_ids, strict=True):
            if not torch.isfinite(row).all() or not row.any():
                state = "all zero" if torch.isfinite(row).all() else "not finite"
                raise UnsupportedModelError(
                    f"{name}: the head's row of {kind} {row_id} is {state}, so it was "
                    "never trained or not loaded; load a trained checkpoint or name other labels"
                )
        if len(rows.unique(dim=0)) < len(rows):
            raise UnsupportedModelError(
                f"{name}: the head's rows of {PLURALS[kind]} {row_ids} are not all different, so "
                "it was never trained; load a trained checkpoint or name other labels"
            )

    def label_logits(
        self,
        hidden: torch.Tensor,  # [num_rows, hidden_size]
        label_ids: list[int],
    ) -> torch.Tensor:
        """Logits of a few of the head's rows.

        Returns:
          float32[num_rows, num_labels].

        Raises:
          InputError: the head has fewer rows than when the labels were named.
        """
        if self._is_plain:
            num_rows = self._head.weight.shape[0]
            if max(label_ids) >= num_rows:
                raise InputError(
                    f"label_token_ids: {max(label_ids)} is no row of the head, which now has "
                    f"{num_rows}; name other labels"
                )
            chosen = torch.tensor(label_ids, device=self._head.weight.device)
            return self._capped(self._linear(hidden, chosen, is_few=True))
        return torch.cat([self._capped(logits[:, label_ids]) for logits in self._whole(hidden)])

    def normalizer(
        self,
        hidden: torch.Tensor,  # [num_rows, hidden_size]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all logits, which never exist all at once, the log-sum-exp and the largest.

        Returns:
          float32[num_rows] each.
        """

        def of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            capped = self._capped(logits)
            return capped.logsumexp(-1), capped.amax(-1)

        if self._is_plain:
            columns = range(0, self._head.weight.shape[0], VOCAB_CHUNK)
            parts = [of(self._linear(hidden, slice(at, at + VOCAB_CHUNK))) for at in columns]
            sums, largest = (torch.stack(found) for found in zip(*parts, strict=True))
            return sums.logsumexp(0), largest.amax(0)
        by_rows = [of(logits) for logits in self._whole(hidden)]
        sums, largest = (torch.cat(found) for found in zip(*by_rows, strict=True))
        return sums, largest

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        cap = final_cap(self._model)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _whole(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """float32[ROW_CHUNK, vocab_size] at a time, through the module itself."""
        # one chunk at least, for a launch that only puts a prefix into pages has no row
        for start in range(0, max(len(hidden), 1), ROW_CHUNK):
            logits: torch.Tensor = self._head(hidden[start : start + ROW_CHUNK])
            yield logits.float()

    def _linear(
        self, hidden: torch.Tensor, rows: torch.Tensor | slice, *, is_few: bool = False
    ) -> torch.Tensor:
        weight, bias = self._head.weight, self._head.bias
        # float64 stays, which autocast leaves alone; in it a label's logit does not depend on which
        # other labels are read, and the few that are read cost next to nothing
        is_double = is_few and weight.device.type != "mps"
        is_double |= hidden.dtype == torch.float64
        dtype = torch.float64 if is_double else torch.float32
        of_rows = weight[rows].to(dtype), None if bias is None else bias[rows].to(dtype)
        return F.linear(hidden.to(weight.device, dtype), *of_rows).float()


class LabelHead(LinearHead):
    """The language-model head of a model, read at a few labels.

    Raises:
      UnsupportedModelError: the model has no language-model head.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PieceTokenizer | None) -> None:
        super().__init__(model)
        self._tokenizer = tokenizer

    @property
    def _label_limit(self) -> int:
        # rows of the head past the tokenizer's last token are padding that nothing trained
        return min(self.vocab_size, self._tokenizer.vocab_size if self._tokenizer else sys.maxsize)

    def resolve(
        self, labels: Sequence[str] | None, label_token_ids: LabelIds | None
    ) -> Labels | None:
        """Labels given as text or as ids; None where neither is given.

        Raises:
          InputError, InputTypeError: the labels are not distinct runs of the vocabulary's tokens.
          UnsupportedModelError: the head was never trained for them.
        """
        found = read_labels(labels, label_token_ids, self._tokenizer, self._label_limit)
        if found is not None:
            self._check_trained("label_token_ids", "token", found.token_ids)
        return found

    def defaults(self, prompt_labels: Sequence[str] | Sequence[int]) -> Labels | None:
        """The labels of a scorer that names none: its prompt's, as texts or as ids."""
        texts = [label for label in prompt_labels if isinstance(label, str)]
        ids = [label for label in prompt_labels if isinstance(label, int)]
        return self.resolve(texts or None, ids or None)

    def activation(self, spec: PromptSpec) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes a rank score of log-odds, or of the logit of a prompt's only label."""
        scale = spec.scale
        return lambda x: x if scale is None else torch.sigmoid(scale * x)

    def for_ranking(self, labels: Labels | None, spec: PromptSpec) -> Labels:
        """Labels (negative, positive), or the one of a prompt that has no other.

        Raises:
          InputError: the scorer has another number of labels, or one begins the other.
        """
        if labels is None or len(labels) != spec.num_ranked:
            have = len(labels or ())
            raise InputError(
                f"labels: rank and predict read one with this prompt, and this scorer has {have}; "
                "pass MultiItemScorer(..., labels=['Yes'])"
                if spec.num_ranked == 1
                else "labels: rank and predict compare two, (negative, positive), and this scorer "
                f"has {have}; pass MultiItemScorer(..., labels=['no', 'yes'])"
            )
        if len(labels) == 1 and not labels.are_single:
            raise InputError(
                f"labels: rank and predict read the logit of one token with this prompt, and the "
                f"label is {list(labels.sequences[0])}; use the tokenizer of the prompt's model"
            )
        labels.check_exclusive()
        return labels

    def pooled(self, request: EncodedRequest) -> EncodedRequest:
        """The request up to where the model reads labels: its last tokens."""
        return request

    def to_compute(self, label_ids: list[int], over_vocabulary: bool) -> tuple[list[int], bool]:
        """Ids to compute, and whether with the log-sum-exp over the vocabulary."""
        return label_ids, over_vocabulary

    def normalizer_of(
        self,
        chosen: torch.Tensor,  # float32[num_items, num_labels]
        computed: torch.Tensor,  # float32[num_items, num_computed]
        normalizer: torch.Tensor | None,  # float32[num_items], over the vocabulary
        over_vocabulary: bool,
    ) -> torch.Tensor:
        """float32[num_items]: what the labels' logits are normalised by."""
        if over_vocabulary and normalizer is not None:
            return normalizer
        return chosen.logsumexp(-1)
