"""`packscore selftest`: what is asked, what is there, and the report's file."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import packscore
from packscore.cli import doctor
from packscore.cli.exits import ExitCode, tell
from packscore.cli.load import leave_absent_tpus_alone, place_for
from packscore.cli.options import DTYPES
from packscore.files.failures import UsageError
from packscore.installed import install_command, version_of
from packscore.loading import tpu_is_plugged_in
from packscore.selftest.run import Settings, has_jax, run
from packscore.selftest.subjects import REFERENCE, SMALL, Request

DEVICES = ("auto", "tpu", "cuda", "mps", "cpu", "jax")
# Of a CPU, which is to be done in a minute, and of all else.
RUNS = {True: (1, 5), False: (3, 20)}


def selftest(output: str, **options: Any) -> ExitCode:
    """Run it, print what it found, and write it as JSON.

    Args:
      output: the file; "-" is stdout.
      **options: of `_settings`.

    Returns:
      OK, or FAILURE where a score is not exact.

    Raises:
      UsageError: the device is not there, or an option does not fit.
    """
    if output != "-" and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"--json={output}: there is no such folder; make it, or name another file")
    settings, found = _settings(**options)
    report = run(settings, _made(found), tell)
    if output == "-":
        print(report.json(), end="")
    else:
        print(report.text())
        _write(Path(output), report.json())
        tell(f"wrote {output}")
    return ExitCode.OK if report.passed else ExitCode.FAILURE


def _settings(
    *,
    device: str,
    model: str | None,
    dtype: str,
    query: int | None,
    items: str | None,
    warmup: int | None,
    runs: int | None,
    ab: bool,
) -> tuple[Settings, list[str]]:
    """(what is asked, the devices that run it)."""
    for name, value, allowed in (("device", device, DEVICES), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise UsageError(f"--{name}={value!r} must be one of {', '.join(allowed)}")
    asked = None if items is None else Request.of(1, items)
    place = place_for(device)
    torch_device, programs = place.torch, place.programs
    names = _tpus() if programs == "tpu" else [torch_device]
    if programs == "jax" and not has_jax():
        raise UsageError(f"--device=jax: jax or torchax is missing; {install_command('jax')}")
    if programs is None and torch_device == "cpu" and has_jax():
        leave_absent_tpus_alone()
        programs = "jax"
    is_small = torch_device == "cpu" and programs != "tpu"
    usual = SMALL if is_small else REFERENCE
    sizes = asked or usual
    request = Request(query or usual.query_len, sizes.num_items, sizes.item_len)
    chosen = "float32" if is_small else "bfloat16"
    found = Settings(
        device=torch_device,
        programs=programs,
        in_torch=device not in ("jax", "tpu") and programs != "tpu",
        model=model,
        dtype=getattr(torch, chosen if dtype == "auto" else dtype),
        request=request,
        warmup=RUNS[is_small][0] if warmup is None else warmup,
        runs=RUNS[is_small][1] if runs is None else runs,
        ab=ab,
        is_small=is_small,
    )
    return found, names


def _tpus() -> list[str]:
    """What the chips are called; nobody holds them afterwards.

    Raises:
      UsageError: there is none, or another process has it.
    """
    if not tpu_is_plugged_in():
        raise UsageError(
            "--device=tpu: this machine has no TPU; pass --device cpu, or see docs/tpu"
        )
    devices, failure = doctor.ask_jax()
    kinds = [found["kind"] for found in devices if found["platform"] == "tpu"]
    if not kinds:
        raise UsageError(f"--device=tpu: jax sees none ({failure or f'only {devices}'})")
    return kinds


def _made(devices: list[str]) -> dict[str, Any]:
    """Date, command, versions and machine."""
    packages = doctor.PACKAGES
    versions = {"packscore": packscore.__version__, "python": platform.python_version()}
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["packscore", *sys.argv[1:]]),
        "versions": {**versions, **{name: version_of(name) for name in packages}},
        "machine": {**doctor.machine(), "load": [round(x, 1) for x in os.getloadavg()]},
        "devices": devices,
    }


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whatever ends the process."""
    with tempfile.NamedTemporaryFile("w", dir=path.absolute().parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
