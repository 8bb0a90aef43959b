"""What the methods of a scorer share: arguments to encoded requests, requests to label logits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from packscore.calls import program_of
from packscore.encoded import EncodedRequest
from packscore.errors import (
    InputError,
    NonFiniteScoreError,
    NotPatchedError,
    UnsupportedModelError,
)
from packscore.flows.copies import Copies
from packscore.flows.engine import Engine
from packscore.flows.page_pool import PrefixLease
from packscore.flows.reads import HiddenRows, LabelLogits, LabelRead, Read, run_reads
from packscore.flows.runner import Runner
from packscore.inputs import check_count, short
from packscore.interfaces import check_patching
from packscore.model.class_head import ClassHead, head_of
from packscore.model.family import base_model, check_supported
from packscore.model.label_head import LabelHead
from packscore.model.masks import MaskKind, check_segment, mask_reason
from packscore.model.place import is_on_torchax
from packscore.model.plain import random_part
from packscore.patching import is_patched
from packscore.results import Flow, MaskChoice, NonFiniteChoice, Usage
from packscore.text.encoding import ArgumentNames, Budget, RequestEncoder, request_encoder
from packscore.text.labels import LabelIds, Labels
from packscore.text.named import resolve_prompt
from packscore.text.prompts import PromptSpec
from packscore.text.tokenizer import PieceTokenizer
from packscore.torch_engine.replicas import Replicas, replicas_of, torch_engines

if TYPE_CHECKING:
    from packscore.programs.program import ModelProgram

logger = logging.getLogger("packscore")

Activation = Callable[[torch.Tensor], torch.Tensor]
Scores = npt.NDArray[np.float32]
# Any item will do to look at a query that has none.
SOME_ITEM = "a"


def core_of(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt: str | PromptSpec | None,
    mask_impl: MaskChoice,
    instruction: str | None,
    labels: Sequence[str] | None,
    label_token_ids: LabelIds | None,
    max_tokens: int | None,
    on_long: Literal["truncate", "error"],
    split_special_tokens: bool | None,
    prefix_cache_bytes: int,
    on_non_finite: NonFiniteChoice,
) -> ScoringCore:
    """The parts of a scorer, from the arguments of `MultiItemScorer`."""
    check_patching()
    check_supported(model)
    base = base_model(model)
    spec = resolve_prompt(prompt)
    if instruction and "instruction" not in spec.shared_fields:
        raise InputError(
            f"instruction={short(instruction)} has no place in this prompt; use {{instruction}} in "
            "its prefix, as prompt='qwen3-reranker' does, or pass no instruction"
        )
    pieces = None if tokenizer is None else PieceTokenizer(tokenizer)
    head = head_of(base, pieces)
    model_limit = int(base.config.max_position_embeddings)
    check_count("max_tokens", max_tokens, model_limit)
    most = max_tokens or min(spec.max_tokens or model_limit, model_limit)
    encoder = request_encoder(
        prompt,
        pieces,
        Budget(most, on_long, model_limit),
        head,
        instruction=instruction,
        split_special_tokens=split_special_tokens,
    )
    default_labels = head.resolve(labels, label_token_ids) or head.defaults(spec.labels)
    extra = default_labels.num_extra_tokens if default_labels else 0
    masks = _masks(model, mask_impl, min(most + extra, model_limit))
    check_patched(model, masks)
    return ScoringCore(
        *(model, encoder, head, spec, default_labels, masks, prefix_cache_bytes, on_non_finite),
        most,
    )


def _masks(model: nn.Module, asked: MaskChoice, longest: int) -> MaskKind:
    """How items are kept apart where sequences have up to `longest` tokens.

    Raises:
      UnsupportedModelError: segments are asked for, and would not be exact.
    """
    if asked == "segment":
        check_segment(model, longest)
    if asked != "auto":
        return asked
    reason = mask_reason(model, longest)
    if reason is None:
        return "segment"
    logger.warning(
        "packscore scores this %s under a dense mask, tokens x tokens, for %s",
        type(base_model(model)).__name__,
        reason,
    )
    return "dense"


class ScoringCore:
    """One model, one prompt, one set of pages.

    Args:
      model: patched, unless a dense mask serves it.
      encoder: of its requests.
      head: what is read of it.
      spec: its prompt, which says how a rank score is made of logits.
      default_labels: of calls that name none.
      mask_impl: how items are kept apart.
      prefix_cache_bytes: what the pages of prefixes may take.
      on_non_finite: what `check_finite` does.
      max_tokens: budget of a query and one item.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: RequestEncoder,
        head: LabelHead | ClassHead,
        spec: PromptSpec,
        default_labels: Labels | None,
        mask_impl: MaskKind,
        prefix_cache_bytes: int,
        on_non_finite: NonFiniteChoice,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.base = base_model(model)
        self.encoder = encoder
        self.head = head
        self.spec = spec
        self.default_labels = default_labels
        self.mask_impl = mask_impl
        self.prefix_cache_bytes = prefix_cache_bytes
        self.on_non_finite = on_non_finite
        self.max_tokens = max_tokens
        self._copies: tuple[Any, Copies] | None = None
        self._copies_lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # pages, plans and locks stay with their process; a copy makes its own
        state = {**self.__dict__, "_copies": None}
        del state["_copies_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._copies_lock = threading.Lock()

    def encode(
        self,
        query: Any,
        items: list[Any],
        names: ArgumentNames,
        extra: int = 0,
        *,
        item_first: bool = False,
        is_pooled: bool = True,
    ) -> EncodedRequest:
        """Token ids of a query and its items, with `is_pooled` up to where the head reads them.

        The model has room for `extra` tokens behind each.
        """
        if not items:
            # not up to where a head reads, which may take the item for padding
            some: Any = SOME_ITEM if self.encoder.takes_text else [0]
            alone = self.encode(query, [some], names, extra, item_first=item_first, is_pooled=False)
            return EncodedRequest(alone.prefix, [], [], [])
        encoded = self.encoder.encode(query, items, names, item_first=item_first, extra=extra)
        self._check_embedded(encoded)
        return self.head.pooled(encoded) if is_pooled else encoded

    def _check_embedded(self, request: EncodedRequest) -> None:
        """Refuse texts whose tokens the model does not know."""
        largest = max(int(ids.max(initial=0)) for ids in (request.prefix, *request.items))
        if largest >= self.head.vocab_size:
            raise UnsupportedModelError(
                f"tokenizer: it gives the token {largest}, and the model has embeddings for "
                f"{self.head.vocab_size}; call model.resize_token_embeddings(len(tokenizer)) and "
                "train it, or pass the tokenizer the model was trained with"
            )

    def labels(
        self,
        labels: Sequence[str] | None,
        label_token_ids: LabelIds | None,
        *,
        over_vocabulary: bool,
    ) -> Labels:
        """The labels of one call, or the scorer's.

        Raises:
          InputError, InputTypeError: there are none, they cannot be scored, or not be compared.
        """
        found = self.head.resolve(labels, label_token_ids) or self.default_labels
        if found is None:
            raise InputError("labels are missing, and the prompt has none; pass labels=[...]")
        if not over_vocabulary:
            found.check_exclusive()
        return found

    def run(
        self,
        requests: Sequence[EncodedRequest],
        reads: Read | Sequence[Read],
        *,
        flow: Flow | None = None,
        lease: PrefixLease | None = None,
        progress: Callable[[int], object] = lambda _: None,
        runner: Runner | None = None,
    ) -> list[Any]:
        """What is read of every request, or the error that it met.

        Args:
          requests: encoded queries and items.
          reads: of all requests, or of each.
          flow, lease: as in `Runner.run`.
          progress: called with the number of items that were scored since.
          runner: of the engines of now; None makes one.

        Returns:
          `LabelLogits` or `HiddenRows` of each request, as its read has it.
        """
        each = list(reads) if isinstance(reads, Sequence) else [reads] * len(requests)
        filled = [i for i, request in enumerate(requests) if request.items]
        found: list[LabelLogits | HiddenRows | Exception] = []
        if filled:
            found = run_reads(
                runner or self.runner,
                self.head,
                [requests[i] for i in filled],
                [each[i] for i in filled],
                flow=flow,
                lease=lease,
                progress=progress,
            )
        results: list[Any] = [self._nothing(read) for read in each]
        for i, one in zip(filled, found, strict=True):
            results[i] = _with_gaps(one) if isinstance(one, LabelLogits) else one
        return results

    def run_one(self, request: EncodedRequest, read: Read, **options: Any) -> Any:
        """What is read of one request; raises the error that it met."""
        (found,) = self.run([request], read, **options)
        if isinstance(found, Exception):
            raise found
        return found

    def _nothing(self, read: Read) -> LabelLogits | HiddenRows:
        """What no items give."""
        none = Usage(0, 0, 0, 0, 0, (), (), "plain", self.mask_impl)
        if not isinstance(read, LabelRead):
            return HiddenRows((), none)
        width = max((len(labels) for labels in read.labels), default=0)
        return LabelLogits(torch.zeros(0, width), torch.zeros(0), none)

    def check_finite(self, indices: Sequence[Any], scores: Any, name: Callable[[Any], str]) -> None:
        """Refuse scores that are not finite, unless the scorer reports them.

        Args:
          indices: where they are.
          scores: what the error keeps.
          name: of an index, for people.

        Raises:
          NonFiniteScoreError: there are some.
        """
        if not indices or self.on_non_finite == "report":
            return
        raise NonFiniteScoreError.at(indices, scores, name)

    @property
    def _runtime(self) -> tuple[ModelProgram | None, Replicas | None]:
        return program_of(self.base), replicas_of(self.base)

    @property
    def num_copies(self) -> int:
        """How many engines run launches now; asking makes none."""
        program, replicas = self._runtime
        return len(program.copies) if program else replicas.num_copies if replicas else 1

    @property
    def copies(self) -> Copies:
        """What runs launches where the model runs now: in torch, or in its compiled programs."""
        runtime = self._runtime
        with self._copies_lock:
            if self._copies is None or self._copies[0] != runtime:
                self._copies = runtime, Copies(_new_engines(self, runtime[0]))
            return self._copies[1]

    @property
    def runner(self) -> Runner:
        """Runs requests on the engines of now."""
        return Runner(self.copies)

    def check_ready(self) -> None:
        """Refuse a model that would not give its own scores now.

        Raises:
          NotPatchedError: the model was unpatched since.
          UnsupportedModelError: it is on torchax, and has no programs.
          InputError: it is in train mode.
        """
        check_patched(self.model, self.mask_impl)
        if is_on_torchax(self.base) and program_of(self.base) is None:
            raise UnsupportedModelError(
                "the model is on torchax, whose tensors torch's own kernels do not read; call "
                "packscore.patch_model(model) now that it is there"
            )
        part = random_part(self.base)
        if part is not None:
            raise InputError(
                f"model{part} is in train mode, where dropout is random; call model.eval()"
            )

    @staticmethod
    def probabilities(found: LabelLogits) -> list[list[float]]:
        """[[P(label) for each label] for each item]."""
        with torch.inference_mode():
            log_probs = found.logits - found.normalizer[:, None]
            scores: list[list[float]] = log_probs.exp().tolist()
        if found.counts is not None:
            scores = [row[:count] for row, count in zip(scores, found.counts, strict=True)]
        return scores

    def activated(self, found: LabelLogits, activation_fn: Activation | None) -> Scores:
        """float32[num_items]: activated log-odds, or the logit of the only label or class."""
        with torch.inference_mode():
            positive = found.logits[:, -1]
            is_alone = found.logits.shape[1] == 1
            log_odds = positive if is_alone else positive - found.logits[:, 0]
            activated = (activation_fn or self.head.activation(self.spec))(log_odds)
        scores: Scores = activated.float().cpu().numpy()
        if found.usage.non_finite_items:  # whatever the activation made of them
            scores = scores.copy()
            scores[list(found.usage.non_finite_items)] = np.nan
        return scores


def _with_gaps(found: LabelLogits) -> LabelLogits:
    """The same, NaN and listed in the usage where a logit or the normaliser is not finite."""
    finite = torch.isfinite(found.logits)
    if found.counts is not None:  # behind an item's own labels there is nothing
        width = torch.arange(finite.shape[1], device=finite.device)
        finite |= width >= torch.tensor(found.counts, device=finite.device)[:, None]
    finite = finite.all(-1) & torch.isfinite(found.normalizer)
    if bool(finite.all()):
        return found
    gaps = tuple(torch.nonzero(~finite)[:, 0].tolist())
    logits = found.logits.masked_fill(~finite[:, None], torch.nan)
    return replace(found, logits=logits, usage=replace(found.usage, non_finite_items=gaps))


def check_patched(model: nn.Module, mask_impl: MaskKind) -> None:
    """Refuse a model without packed attention, unless a dense mask serves it.

    Raises:
      NotPatchedError: it has none.
    """
    if mask_impl == "segment" and not is_patched(model):
        raise NotPatchedError(
            "model is not patched; call packscore.patch_model(model) first, "
            "or pass mask_impl='dense'"
        )


def _new_engines(core: ScoringCore, program: ModelProgram | None) -> list[Engine]:
    if program is not None:
        # imported here: jax and torchax come into the process on the JAX path only
        from packscore.programs.engine import engines_of

        return engines_of(program, core.prefix_cache_bytes, core.mask_impl)
    return torch_engines(core.model, core.head, core.prefix_cache_bytes, core.mask_impl)
