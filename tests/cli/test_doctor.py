"""`packscore doctor` says what is here and what would run."""

from __future__ import annotations

import json

import pytest
import torch

from cli_helpers import Cli
from packscore.cli import doctor
from selection import HAS_JAX


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
    for what in found["runs"].values():
        assert what in text
    assert text.splitlines()[0] == "versions"
