"""`packscore doctor` says what is here and what would run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from cli_helpers import Cli
from packscore.cli import doctor
from selection import HAS_JAX

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_doctor_tells_people_and_programs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == (1 if found["problems"] else 0)
    assert found["versions"]["torch"] == torch.__version__
    assert found["torch_devices"][0] == "cpu"
    asked = ["torch, transformers", *(["jax, torchax"] if HAS_JAX else [])]
    assert found["interfaces"] == dict.fromkeys(asked, "all there")
    assert set(found["runs"]) == {"auto", "cpu", "cuda", "mps", "tpu", "jax"}
    # the same of a machine where something is missing, without asking jax once more
    devices = [{"platform": "cpu", "kind": "cpu"}]
    monkeypatch.setattr(doctor, "ask_jax", lambda: (devices, None))
    monkeypatch.setattr(doctor, "ask_programs", lambda: {"jax.core.Tracer": "jax 1.0 has it not"})
    monkeypatch.delattr("transformers.modeling_layers.GenericForSequenceClassification")
    done = cli("doctor")
    text = done.out
    assert done.code == 1
    gone = "transformers.modeling_layers.GenericForSequenceClassification"
    assert f"  torch, transformers  missing: {gone}; see problems" in text
    assert f"has no {gone}, which packscore needs" in text
    if HAS_JAX:  # without it there is nothing to ask for
        assert "  jax, torchax         missing: jax.core.Tracer; see problems" in text
        assert "  jax 1.0 has it not" in text
    assert "TorchTPU" not in text
    for name, what in found["runs"].items():
        assert what in text or not (HAS_JAX or name in ("cpu", "cuda", "mps"))
    assert text.splitlines()[0] == "versions"


def test_a_machine_without_jax_has_no_problem(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor.version_of
    monkeypatch.setattr(
        doctor, "version_of", lambda name: None if name == "jax" else installed(name)
    )
    monkeypatch.setattr(doctor, "ask_jax", lambda: pytest.fail("jax was asked"))
    core = [Requirement(line) for line in PROJECT["dependencies"]]
    monkeypatch.setattr(doctor, "metadata_requirements", lambda: core)
    found = json.loads(cli("doctor", "--json").out)
    assert not any("jax" in problem for problem in found["problems"])
    assert found["runs"]["jax"].startswith("refused: jax is not installed; pip install ")
