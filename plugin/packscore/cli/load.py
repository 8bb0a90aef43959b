"""From options to a scorer: which device, which dtype, which prompt."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from packscore import MultiItemScorer, PromptSpec, patch_model
from packscore.cli.options import ModelOptions
from packscore.files.failures import RunError, UsageError
from packscore.text.prompts import PROMPTS, resolve_prompt


@dataclass(frozen=True)
class Loaded:
    """A scorer and what was chosen for it."""

    scorer: MultiItemScorer
    tokenizer: Any
    device: str
    dtype: str
    commit: str | None
    spec: PromptSpec
    label_names: list[str]


def read_prompt(prompt: str) -> PromptSpec:
    """A built-in prompt by its name, or one of the user's own from a JSON file.

    Raises:
      UsageError: the name is not known, or the file holds no `PromptSpec`.
    """
    if prompt in PROMPTS:
        return resolve_prompt(prompt)
    path = Path(prompt)
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(
            f"--prompt={prompt!r} must be one of {', '.join(sorted(PROMPTS))}, "
            "or a .json file with a PromptSpec's parts"
        )
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        return PromptSpec(**{**parts, "labels": tuple(parts.get("labels", ()))})
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--prompt={prompt}: {error}") from error


def resolve_torch_device(device: str) -> tuple[str, str | None]:
    """(torch device of the model, `patch_model`'s device) for a name on the command line.

    "auto" is the fastest that is there: CUDA, a TPU, MPS, then the CPU.

    Raises:
      UsageError: there is no such device.
    """
    if device == "auto":
        return choose_device()[:2]
    if device in ("tpu", "jax"):
        if device == "jax":
            leave_absent_tpus_alone()
        return "cpu", device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device={device} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device, None


def choose_device() -> tuple[str, str | None, str]:
    """(torch device, `patch_model`'s device, the reason) of `--device auto`."""
    if torch.cuda.is_available():
        return "cuda", None, f"torch sees {torch.cuda.get_device_name()}"
    if tpu_is_plugged_in():
        return "cpu", "tpu", "this machine has a TPU"
    if torch.backends.mps.is_available():
        return "mps", None, "torch sees Apple's GPU"
    return "cpu", None, "there is no CUDA device, no TPU and no MPS"


def leave_absent_tpus_alone() -> None:
    """Tell jax, before it starts, that the CPU is all there is; where that is so.

    Where libtpu is installed, jax starts it to find out that there is no TPU: forty threads, ten
    lines on stderr, and now and then an abort as the process ends.
    """
    plugins = find_spec("jax_plugins") or entry_points(group="jax_plugins")  # a GPU's, say
    if not plugins and not tpu_is_plugged_in():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def tpu_is_plugged_in() -> bool:
    """Whether this machine has a TPU, without importing jax, which would take hold of it."""
    return any(Path("/dev").glob("accel[0-9]*")) or _has_tpu_on_pci()


def _has_tpu_on_pci() -> bool:
    # Google's vendor id; TPUs behind vfio have no device file of their own.
    # Source: jax, jax/_src/hardware_utils.py
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == "0x1ae0" and _is_accelerator(vendor.parent):
                return True
        except OSError:
            continue
    return False


def _is_accelerator(folder: Path) -> bool:
    # processing accelerators have the class 0x12; a cloud machine's network card has Google's
    # vendor id too
    return (folder / "class").read_text().strip().startswith("0x12")


def load(options: ModelOptions, *, weights: bool = True) -> Loaded:
    """Load tokenizer and model, patch it, and make the scorer.

    Args:
      options: of the command line.
      weights: False makes a scorer that encodes and has no weights to score with.

    Raises:
      UsageError: an option does not fit.
      RunError: the model cannot be loaded.
    """
    spec = read_prompt(options.prompt)
    torch_device, patch_device = resolve_torch_device(options.device) if weights else ("meta", None)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
        model = _load_model(options, torch_device)
    except (OSError, ValueError) as error:
        raise RunError(f"--model={options.model} cannot be loaded: {error}") from error
    scorer = MultiItemScorer(
        patch_model(model, device=patch_device),
        tokenizer,
        prompt=spec,
        instruction=options.instruction,
        labels=options.labels,
        label_token_ids=options.label_token_ids,
        max_tokens=options.max_tokens,
        on_long=options.on_long,
        on_non_finite=options.on_non_finite,
    )
    ids = scorer.label_token_ids
    if ids is None:
        raise UsageError(f"--prompt={options.prompt} has no labels; pass --labels no,yes")
    names = options.labels or list(spec.labels)
    return Loaded(
        scorer,
        tokenizer,
        patch_device or torch_device,
        str(model.dtype).removeprefix("torch."),
        getattr(model.config, "_commit_hash", None),
        spec,
        [_name_of(i) for i in ids] if options.label_token_ids else names,
    )


def _name_of(label: int | list[int]) -> str:
    return " ".join(map(str, label)) if isinstance(label, list) else str(label)


def _load_model(options: ModelOptions, torch_device: str) -> PreTrainedModel:
    # Any: the auto classes are untyped in transformers
    auto: Any = AutoModelForCausalLM
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if torch_device == "meta":
        config = AutoConfig.from_pretrained(options.model, revision=options.revision)
        with torch.device("meta"):
            empty: PreTrainedModel = auto.from_config(config).eval()
            return empty
    loaded, found = auto.from_pretrained(
        options.model, revision=options.revision, dtype=dtype, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])  # a head that is tied to the embeddings is not missing
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise RunError(
            f"--model={options.model}: the checkpoint has no {', '.join(missing[:3])}{more}, "
            "so they would be random; download or save it again, or name the model that was meant"
        )
    model: PreTrainedModel = loaded.to(torch_device).eval()
    return model
