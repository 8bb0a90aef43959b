"""Checkpoints that are not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cli_helpers import RECORDS, Cli
from packscore import shipped_model_path


@pytest.mark.parametrize(
    ("dropped", "told"),
    [
        (1, "the checkpoint has no model.layers.0.mlp.gate_proj.weight, so they would be"),
        (5, " and 3 more, so they would be random; download or save it again"),
    ],
)
def test_a_checkpoint_with_a_missing_weight_is_refused(cli: Cli, dropped: int, told: str) -> None:
    shutil.copytree(shipped_model_path(), "model")
    path = Path("model/model.safetensors")
    weights = load_file(path)
    assert "lm_head.weight" not in weights  # a head that is tied is not missing
    for name in sorted(name for name in weights if ".mlp." in name and "gate" in name)[:dropped]:
        del weights[name]
    for name in sorted(name for name in weights if "q_proj" in name)[: max(0, dropped - 3)]:
        weights.pop(name)
    save_file(weights, path, {"format": "pt"})
    cli.write("in.jsonl", RECORDS)
    for command in (("rank", "in.jsonl", "-o", "out.jsonl"), ("verify", "in.jsonl")):
        done = cli(*command, "-m", "model", "--device", "cpu")
        assert done.code == 1
        assert told in done.err
    assert not Path("out.jsonl").exists()
