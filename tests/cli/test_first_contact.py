"""What docs/tpu.md says of a machine with a TPU, as far as a machine without one can show it."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM

from packscore.cli import doctor
from packscore.cli.app import app
from workloads import config_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/tpu.md").read_text()
SELFTEST = (ROOT / "docs/cli.md").read_text().partition("## selftest")[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands() -> list[list[str]]:
    """The words of every command that the pages name, in blocks and in lines."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE + SELFTEST, re.MULTILINE | re.DOTALL)
    lines = [step for block in blocks for step in re.split(r"\n|&&", block)]
    lines += re.findall(r"`!?((?:packscore|python) [^`]*)`", PAGE)
    words = [shlex.split(line) for line in lines if line.strip()]
    # without NAME=value in front
    return [found[next(k for k, word in enumerate(found) if "=" not in word) :] for found in words]


def test_its_commands_are_understood() -> None:
    group: Any = typer.main.get_command(app)
    seen = set()
    for program, *arguments in commands():
        if program == "packscore":
            name, *options = arguments
            assert name in group.commands
            if options:
                group.commands[name].make_context(name, options)  # parses, and runs nothing
            seen.add(name)
        elif program == "pip" and arguments[-1].startswith("."):
            extras = arguments[-1].strip(".[]").split(",")
            assert set(extras) <= set(PROJECT["optional-dependencies"])
            seen.add(arguments[-1])
        elif program == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists(), arguments
        elif program == "pytest":
            assert (ROOT / arguments[-1]).is_dir()
            seen.add(shlex.join(arguments))
    assert seen >= {"doctor", "selftest", "warmup", "rank", ".[tpu]", "-m tpu -n 0 tests/tpu"}


def test_its_pod_asks_for_one_chip() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    spec = yaml.safe_load(text)["spec"]
    assert spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "1x1"
    (container,) = spec["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind] == {"google.com/tpu": 1}


@pytest.mark.parametrize("name", ["0.6B", "4B", "8B"])
def test_its_weights_are_those_of_the_configurations(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    decoder = model.get_decoder()
    whole = sum(x.numel() for x in model.parameters())
    stacks = [x.numel() * len(decoder.layers) for x in decoder.layers[0].parameters()]
    largest = max(*stacks, decoder.embed_tokens.weight.numel())
    row = " | ".join(f"{2 * count / 2**30:.2f} GiB" for count in (whole, largest))
    assert f"| Qwen3-{name} | {row} |" in PAGE


def test_doctor_names_a_jax_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # as metadata has them: what an extra asks for is said of it
    required = [
        Requirement(f"{line}; extra == 'jax'") for line in PROJECT["optional-dependencies"]["jax"]
    ]
    installed = doctor.version_of

    def newer(name: str) -> str | None:
        return "0.13.1" if name == "jax" else installed(name)

    assert not any(line.startswith("jax ") for line in doctor.version_problems(required))
    monkeypatch.setattr(doctor, "version_of", newer)
    (said,) = (line for line in doctor.version_problems(required) if line.startswith("jax "))
    assert said == "jax is 0.13.1: pip install 'jax<0.13,>=0.10'"
    assert f"`{said}`" in PAGE


def test_doctor_waits_for_a_held_chip_no_longer_than_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "ASK_JAX", "import time; time.sleep(60)")
    devices, failure = doctor.ask_jax(timeout_s=0.5)
    assert devices == []
    assert failure is not None
    assert failure.startswith("gave no answer in 0.5 s; if another process holds the TPU, end it")
    assert f"gave no answer in {doctor.JAX_TIMEOUT_S} s" in PAGE


def test_doctor_repeats_what_jax_says_of_a_held_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "The TPU is already in use by process with pid 7"
    monkeypatch.setattr(doctor, "ASK_JAX", f"raise RuntimeError({said!r})")
    devices, failure = doctor.ask_jax()
    assert devices == []
    assert failure is not None
    assert failure.startswith(f"cannot start (RuntimeError: {said})")


def test_doctor_sees_a_chip_that_jax_passes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor, "tpu_is_plugged_in", lambda: True)
    monkeypatch.setattr(doctor, "version_of", lambda _: "0.0.42.1")
    said = "this machine has a TPU that jax cannot use; is another process holding it?"
    assert said in list(doctor.device_problems({"cpu"}))
    assert said not in list(doctor.device_problems({"cpu", "tpu"}))
    assert said in PAGE
