"""From a name or a folder to a model and its tokenizer, and where it goes: all that loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from packscore.errors import InputError, InputTypeError, LoadError, PackscoreError
from packscore.inputs import short
from packscore.installed import version_of
from packscore.interfaces import FIND_ADAPTER, FIND_FILE, FIND_QUIETLY, check_loading
from packscore.model.checkpoint import FLOATS, FileTensor, Misfits, store_weights
from packscore.model.family import EAGER_ONLY, check_supported

# What a tokenizer is read from. Where there is none of them transformers makes one without a
# vocabulary, which would score texts as other texts.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "tiktoken.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class Place:
    """Where a model goes.

    Args:
      torch: the device of its tensors.
      programs: `patch_model`'s device; None where torch computes.
      reason: why it was chosen.
    """

    torch: str
    programs: str | None = None
    reason: str = "asked for"

    @property
    def name(self) -> str:
        """The name that `place_of` knows it by."""
        return self.programs or self.torch


def place_of(device: str | torch.device | None) -> Place:
    """Where a model goes for a name.

    Args:
      device: of torch ("cpu", "cuda", "cuda:1", "mps", or "meta": no weights at all), or "tpu" and
        "jax" (programs over weights on the CPU). None and "auto" are the fastest that is there.

    Raises:
      InputError: there is no such device.
      InputTypeError: there are several.
    """
    if device is None or device == "auto":
        return fastest_place()
    if isinstance(device, list | tuple):
        raise InputTypeError(
            f"device={short(device)} must be one device; load the model on one, and pass the list "
            "to patch_model(model, device=[...])"
        )
    if device in ("tpu", "jax"):
        return Place("cpu", str(device))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise InputError(
            f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}; it must be "
            "'auto', 'cpu', 'cuda', 'cuda:1', 'mps', 'tpu' or 'jax', and be there"
        ) from error
    return Place(str(device))


def mesh_place_of(device: str | torch.device | None) -> Place:
    """The same for a model that is cut over chips, which only programs run on.

    Raises:
      InputError: it is a device of torch.
    """
    if device is None or device == "auto":
        found = "tpu" if tpu_is_plugged_in() else "jax"
        return Place("cpu", found, reason="mesh=... is of chips that programs run on")
    if str(device) not in ("tpu", "jax"):
        raise InputError(
            f"device={str(device)!r} is one of torch's, and mesh=... is of chips that programs run "
            "on; pass device='tpu', 'jax' or 'auto'"
        )
    return place_of(device)


def fastest_place() -> Place:
    """CUDA, a TPU, MPS, then the CPU."""
    if torch.cuda.is_available():
        return Place("cuda", reason=f"torch sees {torch.cuda.get_device_name()}")
    if tpu_is_plugged_in():
        return Place("cpu", "tpu", "this machine has a TPU")
    if torch.backends.mps.is_available():
        return Place("mps", reason="torch sees Apple's GPU")
    return Place("cpu", reason="there is no CUDA device, no TPU and no MPS")


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


def load_tokenizer(name_or_path: str | os.PathLike[str], **hub: Any) -> Any:
    """The tokenizer of a checkpoint.

    Args:
      name_or_path: on the hub, or a folder.
      **hub: `revision`, `cache_dir`, `local_files_only`, `trust_remote_code`.

    Raises:
      LoadError: there is no such checkpoint, or it has no tokenizer.
    """
    check_loading()
    with _told_by_name(name_or_path):
        _check_folder(name_or_path)
        found: Any = AutoTokenizer.from_pretrained(name_or_path, **hub)
        names = {*TOKENIZER_FILES, *type(found).vocab_files_names.values()}
        if not any(_has_file(name_or_path, name, hub) for name in sorted(names)):
            raise LoadError(
                name_or_path,
                "it has no tokenizer; put one beside the model, tokenizer.save_pretrained(folder)",
            )
    return found


def names_of(name_or_path: str | os.PathLike[str], **hub: Any) -> list[str]:
    """What a checkpoint is called: its name or folder, and that of the model an adapter is for.

    Raises:
      LoadError: there is no such checkpoint.
    """
    with _told_by_name(name_or_path):
        base = _base_of(name_or_path, hub)
    return [os.fspath(name_or_path), *([] if base is None else [base])]


def _has_file(name_or_path: str | os.PathLike[str], file: str, hub: Mapping[str, Any]) -> bool:
    return _found(name_or_path, file, hub) is not None


def _found(name_or_path: str | os.PathLike[str], file: str, hub: Mapping[str, Any]) -> Path | None:
    quiet = {FIND_QUIETLY.name: False}
    path = FIND_FILE()(name_or_path, file, **_of_files(hub), **quiet)
    return None if path is None else Path(path)


def _of_files(hub: Mapping[str, Any]) -> dict[str, Any]:
    """What a single file of a checkpoint is found by."""
    return {name: value for name, value in hub.items() if name != "trust_remote_code"}


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """The model of a checkpoint in eval mode: a classifier where its configuration says so.

    Args:
      name_or_path: on the hub, or a folder, of a model or of an adapter.
      device: of torch; "meta" reads the configuration alone.
      dtype: as transformers takes it.
      model_kwargs: for the model's `from_pretrained`; with a `device_map` it stays where that says.
      **hub: as in `load_tokenizer`.

    Raises:
      LoadError: there is no such checkpoint, it cannot be read, or it lacks weights.
    """
    check_loading()
    with _told_by_name(name_or_path):
        _check_folder(name_or_path)
        base = _base_of(name_or_path, hub)
        if base is not None:
            options: dict[str, Any] = {"dtype": dtype, "model_kwargs": model_kwargs}
            adapted = load_model(base, device=device, **options, **{**hub, "revision": None})
            if device != "meta":  # there are no weights to add it to
                add_adapter(adapted, name_or_path, **hub)
            return adapted
        given = dict(model_kwargs or {})
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        if config.model_type in EAGER_ONLY:
            given.setdefault("attn_implementation", "eager")
        if device == "meta":
            return _empty_model(config, **given)
        loaded, found = _auto_class(config).from_pretrained(
            name_or_path,
            dtype=dtype,
            output_loading_info=True,
            **hub,
            **{"ignore_mismatched_sizes": True, **given},  # it is told below, by name
        )
        _check_whole(name_or_path, found["missing_keys"], found["mismatched_keys"])
    model: PreTrainedModel = loaded.eval()
    if "device_map" not in given and model.device != torch.device(device):
        # Any: `to` is untyped in transformers
        moved: Any = model
        model = moved.to(device)
    return model


def _empty_model(config: Any, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        empty: PreTrainedModel = _auto_class(config).from_config(config, **options).eval()
        return empty


def load_stored(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """The model of a checkpoint whose weights stay in its files, for programs to take in parts.

    Args:
      name_or_path: on the hub, or a folder, of a model whose weights are safetensors.
      dtype, model_kwargs: as in `load_model`; of the latter what the configuration takes.
      **hub: as in `load_tokenizer`.

    Raises:
      LoadError: as in `load_model`; and the weights are in another format, are quantised, or are
        others than those that the configuration speaks of.
      InputError: `model_kwargs` has what only reading all weights could heed.
      UnsupportedModelError: packscore knows no such model.
    """
    check_loading()
    with _told_by_name(name_or_path):
        _check_folder(name_or_path)
        if _base_of(name_or_path, hub) is not None:
            raise LoadError(
                name_or_path,
                "it is an adapter, and mesh=... takes the weights of a model as they are; merge it "
                "(merge_and_unload()) and save the whole model",
            )
        config, others = AutoConfig.from_pretrained(
            name_or_path, return_unused_kwargs=True, **hub, **(model_kwargs or {})
        )
        if others:
            raise InputError(
                f"model_kwargs={others!r} and mesh=..., which reads weights in parts and asks the "
                "configuration alone; leave them out, or load without mesh"
            )
        if getattr(config, "quantization_config", None):
            raise LoadError(
                name_or_path,
                "its configuration has a quantization_config, and mesh=... takes weights as they "
                "are; name the checkpoint that is not quantised",
            )
        tensors = FileTensor.all_of(_weight_files(name_or_path, hub))
        if dtype == "auto":
            kinds = (FLOATS[one.kind] for one in tensors.values() if one.kind in FLOATS)
            dtype = config.dtype or next(kinds, torch.float32)
        eager = {"attn_implementation": "eager"} if config.model_type in EAGER_ONLY else {}
        model = _empty_model(config, dtype=dtype, **eager)
        check_supported(model)
        _check_fits(name_or_path, store_weights(model, tensors))
    return model


def _weight_files(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> list[Path]:
    """The files of safetensors that a checkpoint consists of."""
    one = _found(name_or_path, SAFE_WEIGHTS_NAME, hub)
    if one is not None:
        return [one]
    index = _found(name_or_path, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is None:
        raise LoadError(
            name_or_path,
            f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, and mesh=... reads "
            "parts of files, which other formats do not allow; load the model without mesh and "
            "save it, model.save_pretrained(folder)",
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: _found(name_or_path, name, hub) for name in names}
    for name, path in found.items():
        if path is None:
            raise LoadError(name_or_path, f"its {index.name} names {name}, which is not there")
    return [path for path in found.values() if path]


def _base_of(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> str | None:
    """The model that an adapter is for; None of a model."""
    adapter = FIND_ADAPTER()(os.fspath(name_or_path), **_of_files(hub))
    if adapter is None:
        return None
    if _has_file(name_or_path, "config.json", hub):
        raise LoadError(
            name_or_path,
            "it is a model and an adapter in one, and transformers does not say whether the "
            "model's weights are all there; keep adapter_config.json and its weights in a folder "
            "of their own, or merge them into the model",
        )
    base: str = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def add_adapter(model: PreTrainedModel, name_or_path: str | os.PathLike[str], **hub: Any) -> None:
    """Add an adapter's weights to a model, in place.

    Raises:
      LoadError: there is no such adapter, it cannot be read, lacks weights, or has others.
    """
    # Any: transformers types it as returning nothing
    add: Any = model.load_adapter
    with _told_by_name(name_or_path):
        _check_folder(name_or_path)
        found = add(os.fspath(name_or_path), adapter_kwargs=_of_files(hub))
        if found is None:
            raise LoadError(
                name_or_path,
                f"transformers {version_of('transformers')} does not say which weights of an "
                "adapter it found; install transformers 5.7 or newer, or merge the adapter into "
                "the model and save that",
            )
        _check_whole(name_or_path, found.missing_keys, found.mismatched_keys)


def _auto_class(config: Any) -> Any:
    names = config.architectures or ()
    is_classifier = any(name.endswith("ForSequenceClassification") for name in names)
    return AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM


def _check_whole(
    name_or_path: str | os.PathLike[str],
    missing: Iterable[str],
    mismatched: Iterable[tuple[Any, ...]],
) -> None:
    # a head that is tied to the embeddings is not missing
    _check_fits(name_or_path, Misfits(list(missing), [name for name, *_ in mismatched]))


def _check_fits(name_or_path: str | os.PathLike[str], misfits: Misfits) -> None:
    if reason := misfits.reason:
        raise LoadError(name_or_path, reason)


def _check_folder(name_or_path: str | os.PathLike[str]) -> None:
    """Refuse a path to nowhere, which would be looked for on the hub."""
    text = os.fspath(name_or_path)
    is_path = not isinstance(name_or_path, str) or text.startswith((".", "~", os.sep))
    if is_path and not os.path.isdir(text):
        raise LoadError(name_or_path, "there is no such folder")


@contextmanager
def _told_by_name(name_or_path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever reading a checkpoint raises as a `LoadError`, in one line."""
    try:
        yield
    except (PackscoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(name_or_path, reason) from error
