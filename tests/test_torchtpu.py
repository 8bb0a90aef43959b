"""TorchTPU takes the one name that torchax needs as soon as torch is imported: told by name."""

from __future__ import annotations

import pytest

from processes import run_fresh

# what `import torch` does where torch-tpu is installed
WITH_TORCHTPU = """
import torch
torch.utils.rename_privateuse1_backend("tpu")
"""


@pytest.mark.jax
def test_the_jax_path_and_the_doctor_name_the_remedy() -> None:
    run_fresh(
        WITH_TORCHTPU
        + """
from transformers import AutoModelForCausalLM
from packscore import InputError, MultiItemScorer, UnsupportedModelError, patch_model
from packscore import shipped_model_path
from packscore.cli import doctor

model = AutoModelForCausalLM.from_pretrained(shipped_model_path()).eval()
remedy = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment before torch is imported"
for device in ("jax", "tpu"):
    try:
        patch_model(model, device=device)
    except InputError as error:
        assert remedy in str(error), error
    else:
        raise SystemExit(f"{device} was not refused")
# torch's own path needs no torchax
MultiItemScorer(patch_model(model), label_token_ids=[1, 2]).score([1], [[2]])

doctor.ask_jax = lambda: ([{"platform": "tpu", "kind": "TPU v6e"}], None)
found = doctor.examine()
assert any(remedy in problem for problem in found.problems), found.problems
assert remedy in found.runs["jax"] and remedy in found.runs["tpu"]
assert "torch on the CPU" in found.runs["cpu"]

class OfTorchTpu(torch.nn.Parameter):
    device = property(lambda self: torch.device("tpu:0"))

model.model.norm.weight.__class__ = OfTorchTpu
try:
    patch_model(model)
except UnsupportedModelError as error:
    assert "'model.norm.weight' is on tpu:0, which is TorchTPU" in str(error), error
    assert remedy in str(error), error
else:
    raise SystemExit("a tensor of TorchTPU was not refused")
"""
    )
