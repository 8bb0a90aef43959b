"""`packscore doctor` says what is here and what would run."""

from __future__ import annotations

import json

import torch

from cli_helpers import Cli


def test_doctor_tells_people_and_programs(cli: Cli) -> None:
    done = cli("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == (1 if found["problems"] else 0)
    assert found["versions"]["torch"] == torch.__version__
    assert found["torch_devices"][0] == "cpu"
    assert set(found["runs"]) == {"auto", "cpu", "cuda", "mps", "tpu", "jax"}
    text = cli("doctor").out
    assert "TorchTPU" not in text
    for what in found["runs"].values():
        assert what in text
    assert text.splitlines()[0] == "versions"
