"""From options of the command line to a scorer, by `MultiItemScorer.from_pretrained`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import logging

from packscore import InputError, LoadError, MultiItemScorer, PromptSpec
from packscore.cli.cache import Cache, open_cache
from packscore.cli.options import ModelOptions, mesh_from
from packscore.files.failures import RunError, UsageError
from packscore.loading import Place, mesh_place_of, names_of, place_of, tpu_is_plugged_in
from packscore.model.family import base_model, class_count
from packscore.text.named import AUTO, PROMPTS, prompt_for, resolve_prompt


@dataclass(frozen=True)
class Loaded:
    """A scorer and what was chosen for it."""

    scorer: MultiItemScorer
    device: str
    dtype: str
    commit: str | None
    spec: PromptSpec
    label_names: list[str]
    num_ranked: int  # labels that `rank` reads: one of some prompts and classifiers, else two
    cache: Cache


def read_prompt(prompt: str, *names: str) -> PromptSpec:
    """A built-in prompt by its name or the model's, or one of the user's own from a JSON file.

    Raises:
      UsageError: the name is not known, or the file holds no `PromptSpec`.
    """
    if prompt == AUTO:
        try:
            return resolve_prompt(prompt_for(prompt, *names))
        except InputError as error:
            raise UsageError(f"--{error}") from error
    if prompt in PROMPTS:
        return resolve_prompt(prompt)
    path = Path(prompt)
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(
            f"--prompt={prompt!r} must be one of {', '.join(sorted(PROMPTS))}, {AUTO}, "
            "or a .json file with a PromptSpec's parts"
        )
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        return PromptSpec(**{**parts, "labels": tuple(parts.get("labels", ()))})
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--prompt={prompt}: {error}") from error


def place_for(device: str, *, mesh: bool = False) -> Place:
    """Where `--device` puts a model; jax looks for no TPU where there is none.

    Args:
      device: as it is said.
      mesh: whether there is a `--mesh`, which only programs run on.

    Raises:
      UsageError: there is no such device.
    """
    if device == "jax" or mesh:
        leave_absent_tpus_alone()
    try:
        return mesh_place_of(device) if mesh else place_of(device)
    except InputError as error:
        raise UsageError(f"--{error}") from error


def leave_absent_tpus_alone() -> None:
    """Tell jax, before it starts, that the CPU is all there is; where that is so.

    Where libtpu is installed, jax starts it to find out that there is no TPU: forty threads, ten
    lines on stderr, and now and then an abort as the process ends.
    """
    plugins = find_spec("jax_plugins") or entry_points(group="jax_plugins")  # a GPU's, say
    if not plugins and not tpu_is_plugged_in():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def load(options: ModelOptions, *, weights: bool = True) -> Loaded:
    """Load tokenizer and model, patch it, and make the scorer.

    Args:
      options: of the command line.
      weights: False makes a scorer that encodes and has no weights to score with.

    Raises:
      UsageError: an option does not fit.
      RunError: the model cannot be loaded.
    """
    mesh = mesh_from(options.mesh) if weights else None
    place = place_for(options.device, mesh=mesh is not None) if weights else Place("meta")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped in transformers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    cache = open_cache(options.cache_dir) if place.programs else Cache(None)
    cached = options.prefix_cache_bytes
    pages: dict[str, Any] = {} if cached is None else {"prefix_cache_bytes": cached}
    try:
        names = names_of(options.model, revision=options.revision) if options.prompt == AUTO else []
        spec = read_prompt(options.prompt, *names)
        scorer = MultiItemScorer.from_pretrained(
            options.model,
            device=place.name,
            dtype=options.dtype,
            revision=options.revision,
            prompt=spec,
            instruction=options.instruction,
            labels=options.labels,
            label_token_ids=options.label_token_ids,
            max_tokens=options.max_tokens,
            on_long=options.on_long,
            on_non_finite=options.on_non_finite,
            compile_cache=cache.folder,
            mesh=mesh,
            **pages,
        )
    except LoadError as error:
        raise RunError(f"--model={options.model} cannot be loaded: {error.reason}") from error
    ids = scorer.label_token_ids or []
    if not ids and options.reads_labels:
        raise UsageError(f"--prompt={options.prompt} has no labels; pass --labels no,yes")
    config: Any = base_model(scorer.model).config
    classes = [config.id2label[i] for i in range(class_count(base_model(scorer.model)))]
    labels = options.labels or classes or list(map(str, spec.labels))
    return Loaded(
        scorer,
        place.name,
        str(base_model(scorer.model).dtype).removeprefix("torch."),
        getattr(config, "_commit_hash", None),
        spec,
        [_name_of(i) for i in ids] if options.label_token_ids else labels,
        min(len(classes), 2) or spec.num_ranked,
        cache,
    )


def check_labels(task: Mapping[str, Any], loaded: Loaded) -> None:
    """Refuse to rank by labels that it cannot compare.

    Raises:
      UsageError: there are more, or fewer.
    """
    names = loaded.label_names
    if task["command"] == "rank" and len(names) != loaded.num_ranked:
        wants = (
            "compares two labels, (negative, positive)," if loaded.num_ranked == 2 else "reads one"
        )
        raise UsageError(f"rank {wants} and not {names}")


def _name_of(label: int | list[int]) -> str:
    return " ".join(map(str, label)) if isinstance(label, list) else str(label)
