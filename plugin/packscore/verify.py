"""Packed scores against those of the plain model, one item at a time, on the user's own data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig

from packscore.encoded import EncodedRequest
from packscore.errors import InputError
from packscore.inputs import Text, as_list, as_pairs, checked
from packscore.interfaces import set_attention_name
from packscore.model.family import base_model, is_classifier
from packscore.model.plain import modules_of
from packscore.patching import ModelT, is_patched, patch_model, unpatch_model
from packscore.results import MaskChoice
from packscore.scoring import MultiItemScorer
from packscore.text.labels import LabelIds, Labels
from packscore.text.prompts import PromptSpec

Float64 = npt.NDArray[np.float64]
Verdict = Literal["equal", "different", "undecided"]
Sample = tuple[Text, Sequence[Text]]

# Two queries with items of very different lengths, for a model that has no data yet.
DEFAULT_SAMPLES: tuple[Sample, ...] = (
    (
        "delete a directory tree",
        (
            "Recursively delete a directory tree.",
            "Shuffle a list in place.",
            "",
            "Open a file in binary or text mode. " * 20,
        ),
    ),
    (
        "what is a panda?",
        ("A panda is a bear.", "本文 🐼", "Paris is the capital of France.\n", "no", "42"),
    ),
)


@dataclass(frozen=True)
class Tolerance:
    """How far packed and unpacked probabilities may be apart."""

    max_abs: float
    mean_abs: float


# In float32 sums run in another order. In bfloat16 a logit of 8 is known to 0.03, and two of them
# move a probability by up to 0.02; float16 has three bits more.
TOLERANCES = {
    torch.float32: Tolerance(1e-5, 1e-5),
    torch.bfloat16: Tolerance(0.02, 0.01),
    torch.float16: Tolerance(0.0025, 0.00125),
}


@dataclass(frozen=True)
class SampleParity:
    """One query of a `ParityReport`.

    Args:
      num_items: items of the query.
      prefix_tokens: tokens that its items share.
      longest_item_tokens: tokens of its longest item.
      max_abs: the largest difference of a probability.
      mean_abs: the mean difference.
    """

    num_items: int
    prefix_tokens: int
    longest_item_tokens: int
    max_abs: float
    mean_abs: float


@dataclass(frozen=True)
class ParityReport:
    """Packed against unpacked scores.

    Args:
      samples: one entry for each query.
      max_abs, mean_abs: over all probabilities of all samples.
      spread: how far the unpacked scores of different items are apart, at most. Where it is within
        the tolerance the comparison could not have failed.
      dtype: of the model.
      tolerance: what the verdict is by.
    """

    samples: tuple[SampleParity, ...]
    max_abs: float
    mean_abs: float
    spread: float
    dtype: str
    tolerance: Tolerance

    @property
    def verdict(self) -> Verdict:
        """ "different", "equal", or "undecided" where all items have the same score anyway."""
        within = self.max_abs <= self.tolerance.max_abs and self.mean_abs <= self.tolerance.mean_abs
        if not within:  # a NaN is not within
            return "different"
        return "equal" if self.spread > self.tolerance.max_abs else "undecided"

    @property
    def passed(self) -> bool:
        """Whether the verdict is "equal"."""
        return self.verdict == "equal"

    def table(self) -> str:
        """A table with one row for each sample, and the verdict."""
        rows = [
            f"{'sample':>6}  {'items':>5}  {'prefix':>6}  {'longest':>7}  "
            f"{'max |diff|':>10}  {'mean |diff|':>11}"
        ]
        rows += [
            f"{i:>6}  {found.num_items:>5}  {found.prefix_tokens:>6}  "
            f"{found.longest_item_tokens:>7}  {found.max_abs:>10.1e}  {found.mean_abs:>11.1e}"
            for i, found in enumerate(self.samples)
        ]
        total_items = sum(found.num_items for found in self.samples)
        rows.append(
            f"{'total':>6}  {total_items:>5}  {'':>6}  {'':>7}  "
            f"{self.max_abs:>10.1e}  {self.mean_abs:>11.1e}"
        )
        rows.append(
            f"{self.dtype}: at most {self.tolerance.max_abs:g}, "
            f"{self.tolerance.mean_abs:g} on average; items differ by up to {self.spread:.1e}"
        )
        return "\n".join([*rows, f"verdict: {self._verdict_text()}"])

    def _verdict_text(self) -> str:
        if self.verdict == "different":
            return "DIFFERENT: packed scores are not those of the unpacked model"
        if self.verdict == "undecided":
            return "UNDECIDED: all items score alike, so nothing was tested; pass other samples"
        return "equal"


@checked
def verify_parity(
    model: nn.Module,
    tokenizer: Any = None,
    samples: Iterable[Sample] | None = None,
    *,
    prompt: str | PromptSpec | None = None,
    instruction: str | None = None,
    labels: Sequence[str] | None = None,
    label_token_ids: LabelIds | None = None,
    max_tokens: int | None = None,
    mask_impl: MaskChoice = "auto",
    tolerance: Tolerance | None = None,
    show: bool = True,
) -> ParityReport:
    """Compare packed scores with the unpatched model's: eager attention, one by one, no cache.

    Probabilities over the vocabulary are compared and, for two labels or more of which none begins
    another, over the labels; for a classifier those of its classes. The model is left as it was
    found: patched or not, with its compiled programs, bit for bit.

    Args:
      model: as `MultiItemScorer` takes it, patched or not.
      tokenizer: as `MultiItemScorer` takes it.
      samples: (query, items) each; None is a few built-in texts.
      prompt, instruction, labels, label_token_ids, max_tokens, mask_impl: as `MultiItemScorer`
        takes them.
      tolerance: None is the contract's for the model's dtype.
      show: print the table.

    Returns:
      The differences for every sample and in total, with a verdict.

    Raises:
      InputError, InputTypeError, UnsupportedModelError: as `MultiItemScorer` raises them; there
        are no labels; or the dtype has no tolerance of its own.
    """
    pairs = as_pairs("samples", DEFAULT_SAMPLES if samples is None else samples)
    if tolerance is None:
        tolerance = _tolerance_of(base_model(model).dtype)
    scorer = MultiItemScorer(
        model if is_patched(model) else patch_model(twin_of(model)),
        tokenizer,
        prompt=prompt,
        mask_impl=mask_impl,
        instruction=instruction,
        labels=labels,
        label_token_ids=label_token_ids,
        max_tokens=max_tokens,
        on_non_finite="report",  # which no tolerance holds
    )
    if scorer.label_token_ids is None:
        raise InputError("labels are missing, and the prompt has none; pass labels=[...]")
    unpacked = eager_twin_of(model)
    found = [_compare(scorer, unpacked, query, as_list("items", items)) for query, items in pairs]
    errors = np.concatenate([errors.ravel() for _, errors, _ in found])
    report = ParityReport(
        samples=tuple(sample for sample, _, _ in found),
        max_abs=float(errors.max()),
        mean_abs=float(errors.mean()),
        spread=max(spread for _, _, spread in found),
        dtype=str(base_model(model).dtype).removeprefix("torch."),
        tolerance=tolerance,
    )
    if show:
        print(report.table())
    return report


def _tolerance_of(dtype: torch.dtype) -> Tolerance:
    if dtype not in TOLERANCES:
        raise InputError(f"tolerance: {dtype} has none of its own; pass tolerance=Tolerance(...)")
    return TOLERANCES[dtype]


def _compare(
    scorer: MultiItemScorer, model: nn.Module, query: Text, items: list[Text]
) -> tuple[SampleParity, Float64, float]:
    """(the row of one sample, f64[num_items, columns] of differences, spread between items)."""
    given = scorer.label_token_ids or []
    labels = Labels(tuple((i,) if isinstance(i, int) else tuple(i) for i in given))
    over_labels = len(labels) > 1 and labels.are_exclusive
    modes = (False, True) if over_labels else (False,)
    packed = np.concatenate(
        [np.array(scorer.score(query, items, apply_softmax=mode)) for mode in modes], axis=1
    )
    request = scorer.encode(query, items)
    log_probs = log_probs_one_by_one(model, request, labels)
    unpacked = torch.cat(
        [log_probs.softmax(-1) if mode else log_probs.exp() for mode in modes], 1
    ).numpy()
    errors = np.abs(packed - unpacked)
    row = SampleParity(
        num_items=len(items),
        prefix_tokens=len(request.prefix),
        longest_item_tokens=max(map(len, request.items)),
        max_abs=float(errors.max()),
        mean_abs=float(errors.mean()),
    )
    return row, errors, float(np.ptp(unpacked, axis=0).max())


@torch.inference_mode()
def log_probs_one_by_one(model: nn.Module, request: EncodedRequest, labels: Labels) -> torch.Tensor:
    """Every item alone behind its query, and before all but the last token of a label.

    Returns:
      float64[num_items, num_labels], through the model's own whole forward, on the CPU.
    """
    embedding: Any = base_model(model).get_input_embeddings()
    device = embedding.weight.device
    classifies = is_classifier(base_model(model))
    found = []
    for item in request.items:
        rows: dict[tuple[int, ...], torch.Tensor] = {}
        for beginning in dict.fromkeys(label[:-1] for label in labels.sequences):
            ids = np.concatenate([request.prefix, item, np.array(beginning, np.int64)])
            kept = {} if classifies else {"logits_to_keep": 1 + len(beginning)}
            output = model(torch.from_numpy(ids)[None].to(device), use_cache=False, **kept)
            # a classifier has one row, and its only class is against a logit of zero
            logits = output.logits.view(-1, output.logits.shape[-1]).cpu()
            logits = logits if logits.shape[-1] > 1 else nn.functional.pad(logits, (0, 1))
            rows[beginning] = logits.double().log_softmax(-1)
        each = [rows[ids[:-1]][range(len(ids)), list(ids)].sum() for ids in labels.sequences]
        found.append(torch.stack(each))
    return torch.stack(found)


def eager_twin_of(model: ModelT) -> ModelT:
    """A twin that is not patched and has the eager attention."""
    twin = unpatch_model(twin_of(model))
    for module in modules_of(base_model(twin)):
        if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
            set_attention_name(config, "eager")
    return twin


def twin_of(model: ModelT) -> ModelT:
    """The same modules over the same weights, so that patches of one are not the other's.

    Other threads may score with the model meanwhile.
    """
    shared = {id(x): x for x in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
