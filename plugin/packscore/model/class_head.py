"""Class scores of sequence classifiers, with the surface that the scorer knows from labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from packscore.encoded import EncodedRequest
from packscore.errors import InputError, InputTypeError, UnsupportedModelError
from packscore.inputs import as_list, short
from packscore.interfaces import LOADED_MARK, TENSOR_VERSION
from packscore.model.family import class_count, is_classifier, output_head
from packscore.model.label_head import LabelHead, LinearHead
from packscore.model.place import rows_in_torch
from packscore.model.weight_watch import SIGNS
from packscore.text.labels import LabelIds, Labels
from packscore.text.prompts import PromptSpec
from packscore.text.tokenizer import PieceTokenizer

# In-place changes that `from_pretrained` makes to a weight that it draws because the checkpoint
# has none: the draw itself. Training changes it again.
VERSION_OF_A_DRAWN_WEIGHT = 1
# Where a model keeps the weight of its head as it was drawn; copies of the model have it too.
DRAWN = "_packscore_drawn_head"


class ClassHead(LinearHead):
    """The head of a sequence classifier: labels are its classes, and the vocabulary is all of them.

    Raises:
      UnsupportedModelError: the head was never trained, or its classes exclude each other not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        config: Any = model.config
        self._names: dict[int, str] = {i: config.id2label[i] for i in range(class_count(model))}
        self._pad_token_id: int | None = config.get_text_config().pad_token_id
        self._owner = type(model).__name__
        if getattr(config, "problem_type", None) == "multi_label_classification":
            raise UnsupportedModelError(
                "problem_type='multi_label_classification' gives no distribution over classes; "
                "use a head of one class, or of classes that exclude each other"
            )
        check_head_is_trained(model)
        self._check_trained("model", "class", self._all)

    @property
    def _all(self) -> list[int]:
        return list(self._names)

    @property
    def _is_single(self) -> bool:
        return len(self._names) == 1

    def resolve(
        self, labels: Sequence[str] | None, label_token_ids: LabelIds | None
    ) -> Labels | None:
        """Labels of class names; None where none are given.

        Raises:
          InputError, InputTypeError: the labels are not distinct names of the model's id2label.
        """
        if label_token_ids is not None:
            raise InputError(
                f"label_token_ids={short(label_token_ids)}: {self._owner} scores classes and not "
                f"tokens; pass labels=[...] out of {short(list(self._names.values()))}"
            )
        if labels is None:
            return None
        ids = [self._class_id(i, label) for i, label in enumerate(as_list("labels", labels))]
        if len(set(ids)) < len(ids):
            raise InputError(f"labels={short(labels)} names one class twice; name each class once")
        return _of_classes(ids)

    def _class_id(self, i: int, label: object) -> int:
        if not isinstance(label, str):
            raise InputTypeError(f"labels[{i}]={short(label)} must be a string, a class's name")
        for class_id, name in self._names.items():
            if name == label:
                return class_id
        raise InputError(
            f"labels[{i}]={short(label)} is not a class of the model; "
            f"it must be one of {short(list(self._names.values()))}"
        )

    def defaults(self, prompt_labels: Sequence[str] | Sequence[int]) -> Labels:
        """The labels of a scorer that names none: all classes, for a prompt's are tokens."""
        return _of_classes(self._all)

    def activation(self, spec: PromptSpec) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes a rank score of a logit or log-odds, whatever a prompt's own labels take."""
        return torch.sigmoid

    def for_ranking(self, labels: Labels | None, spec: PromptSpec) -> Labels:
        """Classes (negative, positive), or the one of a head that has no other.

        Raises:
          InputError: the scorer has another number of classes.
        """
        if labels is None or (len(labels) != 2 and not self._is_single):
            raise InputError(
                f"labels: rank and predict compare two classes, (negative, positive), and this "
                f"scorer has {len(labels or ())}; pass MultiItemScorer(..., labels=[...]) with "
                f"two of {short(list(self._names.values()))}"
            )
        return labels

    def pooled(self, request: EncodedRequest) -> EncodedRequest:
        """The request up to where the model reads classes: the last token that is no padding.

        Raises:
          InputError: padding is all that an item and the end of its query consist of.
        """
        pad = self._pad_token_id
        if pad is None:
            return request
        ends = [np.flatnonzero(item != pad)[-1:] + 1 for item in request.items]
        items = [
            item[: end[0]] if len(end) else item[:0]
            for item, end in zip(request.items, ends, strict=True)
        ]
        ends_in_padding = not len(request.prefix) or request.prefix[-1] == pad
        for i, item in enumerate(items):
            if not len(item) and ends_in_padding:
                raise InputError(
                    f"items[{i}] ends in nothing but padding (pad_token_id={pad}), and "
                    "classes are read at the last token before it; give it another token"
                )
        return replace(request, items=items)

    def to_compute(self, label_ids: list[int], over_vocabulary: bool) -> tuple[list[int], bool]:
        """All classes, whose log-sum-exp `normalizer_of` takes: they are few."""
        return self._all, False

    def normalizer_of(
        self,
        chosen: torch.Tensor,  # float32[num_items, num_labels]
        computed: torch.Tensor,  # float32[num_items, num_classes]
        normalizer: torch.Tensor | None,
        over_vocabulary: bool,
    ) -> torch.Tensor:
        """float32[num_items]: what the chosen classes' logits are normalised by."""
        if self._is_single:  # its probability is a sigmoid: against a logit of zero
            return torch.logaddexp(chosen[:, 0], torch.zeros_like(chosen[:, 0]))
        return (computed if over_vocabulary else chosen).logsumexp(-1)


def _of_classes(ids: list[int]) -> Labels:
    return Labels(tuple((i,) for i in ids))


def check_head_is_trained(model: PreTrainedModel) -> None:
    """Refuse a head that loading drew at random, because the checkpoint had none.

    Raises:
      UnsupportedModelError: it did, and nothing trained it since.
    """
    if has_new_head(model):
        raise UnsupportedModelError(
            f"model: the checkpoint has no score.weight, so the head of this "
            f"{type(model).__name__} is random; load a checkpoint of a trained classifier, or "
            "train this one"
        )


def has_new_head(model: PreTrainedModel) -> bool:
    """Whether the model's head is the one that loading drew, because the checkpoint had none."""
    remember_drawn_head(model)
    drawn = model.__dict__.get(DRAWN)
    weight: Any = getattr(output_head(model), "weight", None)
    if drawn is None or weight is None or weight.shape != drawn.shape:
        return False
    if weight.device.type == "meta":
        return False
    return torch.equal(rows_in_torch(weight, slice(None)).cpu(), drawn.to(weight.dtype))


def remember_drawn_head(model: PreTrainedModel) -> None:
    """Keep the head of a classifier as it was drawn, to know it from a trained one later.

    A copy of the model does not show where its weights are from; what is kept goes with it.
    """
    if DRAWN in model.__dict__ or not is_classifier(model):
        return
    head = output_head(model)
    # an adapter with a head of its own keeps the model's beside it, which it began as a copy of
    weight: Any = getattr(getattr(head, "original_module", head), "weight", None)
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    was_loaded = any(_came_from_checkpoint(p) for p in decoder.parameters())
    if was_loaded and weight is not None and not weight.is_meta and _is_as_drawn(weight):
        model.__dict__[DRAWN] = weight.detach().cpu().clone()


def _came_from_checkpoint(parameter: torch.Tensor) -> bool:
    # transformers marks what it loads; only a copy of the model loses the mark
    return bool(getattr(parameter, LOADED_MARK.name, False))


def _is_as_drawn(weight: torch.Tensor) -> bool:
    if _came_from_checkpoint(weight) or weight.is_inference():
        return False
    # fused optimizers count no version
    return getattr(
        weight, TENSOR_VERSION.name
    ) == VERSION_OF_A_DRAWN_WEIGHT and not SIGNS.has_learned(weight)


def head_of(model: PreTrainedModel, tokenizer: PieceTokenizer | None) -> LabelHead | ClassHead:
    """The head of a model as the scorer reads it.

    Raises:
      UnsupportedModelError: there is none, or it was never trained.
    """
    return ClassHead(model) if is_classifier(model) else LabelHead(model, tokenizer)
