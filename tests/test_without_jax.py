"""Where jax or torchax is missing or broken, torch scores, and what needs them says so by name."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCORES = """
import sys
from transformers import AutoModelForCausalLM
from packscore import MissingPackageError, MultiItemScorer, UnsupportedVersionError
from packscore import patch_model, shipped_model_path

def load():
    return AutoModelForCausalLM.from_pretrained(shipped_model_path()).eval()

scorer = MultiItemScorer(patch_model(load()), label_token_ids=[1, 2])
assert len(scorer.score([1, 2], [[3], [4, 5]])) == 2
with scorer.prefix([1, 2]) as held:
    held.score([[3]])
scorer.explain([1, 2], [[3]])
for device in ("jax", "tpu"):
    try:
        patch_model(load(), device=device)
    except (MissingPackageError, UnsupportedVersionError) as error:
        assert "pip install" in str(error) and "\\n" not in str(error), error
        print(error)
    else:
        raise SystemExit(f"{device} was taken")
"""
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"
BROKEN = "raise AttributeError(\"module 'torch' has no attribute '_C._x'\")"


def run_with(stand_ins: Path, code: str) -> str:
    # before everything that is installed
    told = f"import sys; sys.path.insert(0, {str(stand_ins)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", told + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "found", [{"jax": MISSING, "torchax": MISSING}, {"torchax": BROKEN}], ids=["missing", "broken"]
)
def test_torch_scores_and_what_needs_them_names_them(tmp_path: Path, found: dict[str, str]) -> None:
    for package, code in found.items():
        (tmp_path / f"{package}.py").write_text(code + "\n")
    told = run_with(tmp_path, SCORES).splitlines()[-2:]
    assert all("needs" in line or "cannot be imported" in line for line in told), told
    assert all("jax" in line for line in told), told
