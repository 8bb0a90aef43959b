"""Logits from hidden states, in float32: only the rows that are scored, only what is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from packscore.encoding import EncodedRequest
from packscore.errors import InputError, InputTypeError, UnsupportedModelError
from packscore.inputs import as_list, short, token_ids
from packscore.tokenizing import PieceTokenizer

# Vocabulary columns of one step of the log-sum-exp: bounds the float32 copy of the head's weight.
VOCAB_CHUNK = 16_384
# Rows of one step through a head that is not a plain linear layer and gives the whole vocabulary.
ROW_CHUNK = 256
PLURALS = {"token": "tokens", "class": "classes"}


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier, which reads classes and not tokens."""
    return isinstance(model, GenericForSequenceClassification)


def class_count(model: PreTrainedModel) -> int:
    """How many classes a sequence classifier has; 0 for another model."""
    config: Any = model.config
    return int(config.num_labels) if is_classifier(model) else 0


def output_head(model: PreTrainedModel) -> Any:
    """The module that turns hidden states into logits of the vocabulary or of classes.

    Raises:
      UnsupportedModelError: the model has neither.
    """
    if is_classifier(model):
        return model.score
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head and is no sequence classifier; "
            "load it with AutoModelForCausalLM or AutoModelForSequenceClassification"
        )
    return head


class LinearHead:
    """The head of a model, read at a few of its rows.

    Raises:
      UnsupportedModelError: the model has no head that gives scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Any: modules and hooks of other libraries stand in for a linear layer here
        self._head: Any = output_head(model)

    @property
    def _is_plain(self) -> bool:
        # an adapter, a quantised layer or an offloaded weight has to run as the module it is
        return (
            type(self._head) is nn.Linear
            and not hasattr(self._head, "_hf_hook")
            and self._head.weight.device.type != "meta"
        )

    def _check_trained(self, name: str, kind: str, row_ids: list[int]) -> None:
        """Refuse rows that are not finite, all zero or not all different: nothing trained them."""
        if not self._is_plain:
            return
        rows = self._head.weight.detach()[row_ids].float()
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
        """
        if self._is_plain:
            return self._linear(hidden, torch.tensor(label_ids, device=self._head.weight.device))
        return torch.cat([logits[:, label_ids] for logits in self._whole(hidden)])

    def logsumexp(
        self,
        hidden: torch.Tensor,  # [num_rows, hidden_size]
    ) -> torch.Tensor:
        """Log-sum-exp of all logits, which never exist all at once.

        Returns:
          float32[num_rows].
        """
        if self._is_plain:
            chunks = [
                self._linear(hidden, slice(start, start + VOCAB_CHUNK)).logsumexp(-1)
                for start in range(0, self._head.weight.shape[0], VOCAB_CHUNK)
            ]
            return torch.stack(chunks).logsumexp(0)
        return torch.cat([logits.logsumexp(-1) for logits in self._whole(hidden)])

    def _whole(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """float32[ROW_CHUNK, vocab_size] at a time, through the module itself."""
        for start in range(0, len(hidden), ROW_CHUNK):
            logits: torch.Tensor = self._head(hidden[start : start + ROW_CHUNK])
            yield logits.float()

    def _linear(self, hidden: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        weight, bias = self._head.weight, self._head.bias
        hidden = hidden.to(weight.device).float()
        return F.linear(hidden, weight[rows].float(), None if bias is None else bias[rows].float())


class LabelHead(LinearHead):
    """The language-model head of a model, read at a few labels.

    Raises:
      UnsupportedModelError: the model has no language-model head.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PieceTokenizer | None) -> None:
        super().__init__(model)
        self.vocab_size = int(model.config.vocab_size)
        self._tokenizer = tokenizer
        # rows of the head past the tokenizer's last token are padding that nothing trained
        self._label_limit = min(self.vocab_size, tokenizer.vocab_size if tokenizer else sys.maxsize)

    def resolve(
        self, labels: Sequence[str] | None, label_token_ids: Sequence[int] | None
    ) -> list[int] | None:
        """Token ids of labels given as text or as ids; None where neither is given.

        Raises:
          InputError, InputTypeError: the labels are not distinct single tokens of the vocabulary.
          UnsupportedModelError: the head was never trained for them.
        """
        if labels is not None and label_token_ids is not None:
            raise InputError("labels and label_token_ids are two ways to say one thing; pass one")
        if labels is not None:
            ids = self._text_ids(as_list("labels", labels))
        elif label_token_ids is not None:
            values = as_list("label_token_ids", label_token_ids)
            ids = token_ids("label_token_ids", values, self._label_limit).tolist()
        else:
            return None
        if len(set(ids)) < len(ids):
            raise InputError(f"labels: token ids {ids} hold one token twice; name each label once")
        if max(ids) >= self._label_limit:
            raise InputError(
                f"labels: token id {max(ids)} must be below {self._label_limit}, the size of the "
                "model's vocabulary; use the model's own tokenizer"
            )
        self._check_trained("label_token_ids", "token", ids)
        return ids

    def _text_ids(self, labels: list[object]) -> list[int]:
        if self._tokenizer is None:
            raise InputError(f"labels={short(labels)} needs a tokenizer; pass label_token_ids")
        ids = []
        for i, label in enumerate(labels):
            if not isinstance(label, str):
                raise InputTypeError(
                    f"labels[{i}]={short(label)} must be a string; ids go to label_token_ids"
                )
            ids.append(self._tokenizer.label_id(f"labels[{i}]", label))
        return ids

    def defaults(self, prompt_labels: Sequence[str] | None) -> list[int] | None:
        """The labels of a scorer that names none: its prompt's."""
        return self.resolve(prompt_labels or None, None)

    def for_ranking(self, label_ids: list[int] | None) -> list[int]:
        """Labels (negative, positive).

        Raises:
          InputError: the scorer has another number of labels.
        """
        if label_ids is None or len(label_ids) != 2:
            raise InputError(
                f"labels: rank and predict compare two, (negative, positive), and this scorer has "
                f"{len(label_ids or ())}; pass MultiItemScorer(..., labels=['no', 'yes'])"
            )
        return label_ids

    def pooled(self, request: EncodedRequest) -> EncodedRequest:
        """The request up to where the model reads labels: its last tokens."""
        return request

    def to_compute(self, label_ids: list[int], over_vocabulary: bool) -> tuple[list[int], bool]:
        """Labels to compute, and whether their normaliser runs over the vocabulary."""
        return label_ids, over_vocabulary

    def chosen(
        self,
        logits: torch.Tensor,  # float32[num_items, num_labels]
        normalizer: torch.Tensor,  # float32[num_items]
        label_ids: list[int],
        over_vocabulary: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits of the labels, their normaliser), of what was computed."""
        return logits, normalizer
