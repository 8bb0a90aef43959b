"""The wheel and the sdist ship both packages, the types and the model, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def sources(root: str, package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT / root))
        for path in (ROOT / root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_file_of_both_packages(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = sources("plugin", "packscore") | sources("jax_kernels", "packscore_kernels")
    assert names == expected
    for needed in (
        "packscore/py.typed",
        "packscore_kernels/py.typed",
        "packscore/shipped_model/model.safetensors",
        "packscore/shipped_model/tokenizer.json",
        "packscore_kernels/attention/reference.py",
    ):
        assert needed in names
    assert wheel.stat().st_size < 6 * 2**20


def test_sdist_can_build_the_same(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= names


def test_metadata_keeps_the_core_install_light(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    message = Parser().parsestr(archive.read(metadata).decode())
    required = message.get_all("Requires-Dist", [])
    core = {r.partition(">")[0].partition("<")[0] for r in required if "extra ==" not in r}
    assert core == {
        *("accelerate", "jax", "numpy", "psutil", "torch", "torchax", "tqdm", "transformers"),
        "typer",
    }
    for bounded in ("jax", "torch", "torchax", "transformers"):
        (line,) = (r for r in required if r.startswith((f"{bounded}<", f"{bounded}>")))
        assert "<" in line
        assert ">=" in line
    libtpu = [r for r in required if r.startswith("libtpu")]
    assert len(libtpu) == 1
    for marker in ('sys_platform == "linux"', 'platform_machine == "x86_64"', 'extra == "tpu"'):
        assert marker in libtpu[0]
    assert set(message.get_all("Provides-Extra", [])) == {
        *("tpu", "test", "dev", "docs", "parquet", "plot"),
        *("langchain", "llama-index", "rerankers", "sentence-transformers"),
    }
    assert message["License-Expression"] == "Apache-2.0"
