"""`packscore doctor`: versions, devices, what will run where and why, and what is wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

import packscore
from packscore.cli.cache import NONE, VARIABLE, folder_of
from packscore.errors import PackscoreError
from packscore.installed import COLUMNS, install_command, is_installed, tested_rows, version_of
from packscore.interfaces import TABLE, absent
from packscore.loading import fastest_place, tpu_is_plugged_in
from packscore.model.place import TORCHTPU_STANDS_BEFORE_TORCHAX, torchtpu_is_loaded

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "jax", "jaxlib", "torchax", "libtpu")
OPTIONAL_PACKAGES = ("pyarrow", "peft")
# jax and torchax are imported by another process too: what is broken there ends that one
ASK_PROGRAMS = """
import json
from packscore.programs import interfaces
print(json.dumps(interfaces.absent()))
"""
UNASKED = "cannot be imported"
# A TPU that another process holds makes jax wait: it is asked in a process of its own.
JAX_TIMEOUT_S = 120
ASK_JAX = """
import json, jax
devices = [{"platform": d.platform, "kind": d.device_kind} for d in jax.devices()]
print(json.dumps(devices))
"""


@dataclass
class Findings:
    """What the doctor saw.

    Args:
      versions: by package; None is not installed.
      machine: system, processors and memory.
      torch_devices, jax_devices: names.
      runs: what each `--device` does here.
      interfaces: by packages: whether all that packscore reads of their insides is there.
      tested: rows of versions that were run together, and whether one `is_installed`.
      problems: what stops something, each with its remedy.
      notes: what is worth knowing.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    torch_devices: list[str]
    jax_devices: list[str]
    runs: dict[str, str]
    interfaces: dict[str, str] = field(default_factory=dict)
    tested: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2)

    def text(self) -> str:
        """All of it for people."""
        lines = ["versions"]
        lines += [
            f"  {name:<13}{found or 'not installed'}" for name, found in self.versions.items()
        ]
        lines += ["machine", *(f"  {name:<13}{found}" for name, found in self.machine.items())]
        lines += ["devices"]
        lines += [f"  {'torch':<13}{', '.join(self.torch_devices)}"]
        lines += [f"  {'jax':<13}{', '.join(self.jax_devices) or 'none'}"]
        lines += ["what runs where"]
        lines += [f"  --device {name:<5} {what}" for name, what in self.runs.items()]
        lines += ["interfaces"]
        lines += [f"  {names:<20} {what}" for names, what in self.interfaces.items()]
        lines += ["versions that were tested together", *_table(self.tested)]
        lines += ["notes", *(f"  {note}" for note in self.notes)] if self.notes else []
        lines += ["problems"] if self.problems else ["no problems"]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def examine() -> Findings:
    """Look at everything; nothing is changed and no device is held afterwards."""
    has_jax = version_of("jax") is not None
    # what nobody installed is no problem: torch scores without it
    absent_jax: tuple[list[dict[str, str]], str] = (
        [],
        f"is not installed; {install_command('jax')}",
    )
    jax_devices, jax_failure = ask_jax() if has_jax else absent_jax
    versions = {"packscore": packscore.__version__, "python": platform.python_version()}
    found = Findings(
        versions={**versions, **{name: version_of(name) for name in PACKAGES + OPTIONAL_PACKAGES}},
        machine=machine(),
        torch_devices=torch_devices(),
        jax_devices=[f"{device['platform']} ({device['kind']})" for device in jax_devices],
        runs=what_runs({device["platform"] for device in jax_devices}, jax_failure),
    )
    found.problems += version_problems(metadata_requirements())
    if jax_failure and has_jax:
        found.problems.append(f"jax: {jax_failure}")
    asked = {"torch, transformers": {str(x.missing): str(x) for x in absent(TABLE)}}
    if version_of("jax") is not None and not torchtpu_is_loaded():
        asked["jax, torchax"] = ask_programs()
    for packages, missing in asked.items():
        told = f"missing: {', '.join(missing)}; see problems" if missing else "all there"
        found.interfaces[packages] = told.replace(f"missing: {UNASKED}", UNASKED)
        found.problems += missing.values()
    found.tested = [{**row, "is_installed": is_installed(row)} for row in tested_rows()]
    found.problems += device_problems({device["platform"] for device in jax_devices})
    if torchtpu_is_loaded():
        found.problems.append(f"torch: {TORCHTPU_STANDS_BEFORE_TORCHAX}")
    found.notes += _notes(found)
    return found


def machine() -> dict[str, str]:
    """System, processors and memory."""
    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
    }


def torch_devices() -> list[str]:
    """Devices that torch can use."""
    names = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    return [*names, *(["mps"] if torch.backends.mps.is_available() else [])]


def ask_jax(timeout_s: float = JAX_TIMEOUT_S) -> tuple[list[dict[str, str]], str | None]:
    """(devices that jax sees, why it sees none)."""
    command = [sys.executable, "-c", ASK_JAX]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return [], (
            f"gave no answer in {timeout_s:g} s; if another process holds the TPU, end it, or set "
            "JAX_PLATFORMS=cpu"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [], f"cannot start ({last}); {install_command('tpu')} --force-reinstall"
    devices: list[dict[str, str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return devices, None


def ask_programs() -> dict[str, str]:
    """By its name what is not there of jax and torchax; by `UNASKED` why none can be asked for."""
    command = [sys.executable, "-c", ASK_PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
    if done.returncode:
        said = last[0] if last else f"ended with {done.returncode}"
        # the class of an error of ours says nothing that its message does not
        is_ours = said.startswith(PackscoreError.__module__)
        return {UNASKED: said.partition(": ")[2] if is_ours else said}
    found: dict[str, str] = json.loads(last[0])
    return found


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of versions in columns, the one that is installed marked."""
    if not rows:
        yield "  none are recorded"
        return
    cells = [[str(row.get(name) or "-") for name in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    marks = ["*" if row["is_installed"] else " " for row in rows]
    for mark, line in zip([" ", *marks], [COLUMNS, *cells], strict=True):
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield f"{mark} {'  '.join(padded)}".rstrip()
    yield "* is installed here" if "*" in marks else "  this combination was not run"


def what_runs(jax_platforms: set[str], jax_failure: str | None) -> dict[str, str]:
    """What each value of `--device` does on this machine, and why."""
    place = fastest_place()
    programs = "compiled programs with the Pallas kernel on the TPU"
    preferred = "the TPU, Pallas kernel" if "tpu" in jax_platforms else "jax's CPU"
    on_jax = f"refused: jax {jax_failure}" if jax_failure else f"programs on {preferred}"
    on_tpu = programs if "tpu" in jax_platforms else "refused: jax sees no TPU"
    if torchtpu_is_loaded():
        programs = on_tpu = on_jax = f"refused: {TORCHTPU_STANDS_BEFORE_TORCHAX}"
    chosen = programs if place.programs == "tpu" else f"torch on {place.torch}"
    return {
        "auto": f"{chosen}: {place.reason}",
        "cpu": "torch on the CPU",
        "cuda": "torch on CUDA" if torch.cuda.is_available() else "refused: torch sees no CUDA",
        "mps": "torch on MPS" if torch.backends.mps.is_available() else "refused: no MPS",
        "tpu": on_tpu,
        "jax": on_jax,
    }


def metadata_requirements() -> list[Requirement]:
    """What packscore needs, as installed; nothing where it runs from its sources."""
    try:
        lines = metadata.requires("packscore") or []
    except metadata.PackageNotFoundError:
        return []
    return [Requirement(line) for line in lines]


def version_problems(requirements: list[Requirement]) -> Iterator[str]:
    """Packages that are missing or, those of extras also, of a version that does not fit."""
    for requirement in requirements:
        marker, found = requirement.marker, version_of(requirement.name)
        is_core = marker is None or marker.evaluate({"extra": ""})
        if not is_core and (found is None or requirement.name not in PACKAGES):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield f"{requirement.name} is not installed: pip install '{wanted}'"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} is {found}: pip install '{wanted}'"


def device_problems(jax_platforms: set[str]) -> Iterator[str]:
    """Devices that are there and that nothing can use."""
    if os.path.exists("/dev/nvidia0") and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        yield (
            f"this machine has an NVIDIA GPU, and torch {torch.__version__} (built for {built}) "
            "cannot use it; install a CUDA build of torch that its driver supports"
        )
    if tpu_is_plugged_in() and "tpu" not in jax_platforms:
        forced = os.environ.get("JAX_PLATFORMS")
        if version_of("libtpu") is None:
            yield f"this machine has a TPU and no libtpu: {install_command('tpu')}"
        elif forced:
            yield f"this machine has a TPU, and JAX_PLATFORMS={forced} hides it; unset it"
        else:
            yield "this machine has a TPU that jax cannot use; is another process holding it?"


def _notes(found: Findings) -> Iterator[str]:
    yield (
        "programs on a TPU: 3 serve all lengths where every part of a layer is a kernel (Qwen3); "
        "other families, dense masks and jax's CPU have one a bucket, 36 up to 16 384 tokens"
    )
    if version_of("packscore") is None:
        yield "packscore runs from its sources: versions were not compared with what it needs"
    if found.versions["pyarrow"] is None:
        yield f"parquet files need pyarrow: {install_command('parquet')}"
    folder = folder_of(None)
    if folder is None:
        yield f"{VARIABLE}={NONE}: every process compiles its programs again (--device tpu and jax)"
    else:
        yield f"compiled programs (--device tpu and jax) are kept in {folder}"
