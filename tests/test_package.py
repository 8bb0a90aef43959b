"""The wheel and the sdist ship both packages, the types and the model, and nothing else."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import packscore

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


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def test_the_core_is_torch_and_brings_no_jax(metadata: Message) -> None:
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    core = {found.name for found in required if found.marker is None}
    assert core == {
        *("accelerate", "numpy", "psutil", "rich", "safetensors", "torch", "tqdm"),
        *("transformers", "typer"),
    }
    of_jax = [found for found in required if str(found.marker) == 'extra == "jax"']
    assert {found.name for found in of_jax} == {"jax", "jaxlib", "torchax"}
    for found in required:
        if found.name in {"jax", "jaxlib", "torch", "torchax", "transformers"}:
            assert {clause.operator for clause in found.specifier} == {">=", "<"}, found
    for_tpu = [found for found in required if "tpu" in str(found.marker)]
    (libtpu,) = (found for found in for_tpu if found.extras == {"tpu"})
    assert libtpu.name == "jax"  # whose extra names the libtpu that belongs to it
    for where in ('sys_platform == "linux"', 'platform_machine == "x86_64"'):
        assert where in str(libtpu.marker)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_one_place_says_the_version(metadata: Message, dist: Path) -> None:
    assert metadata["Version"] == packscore.__version__
    assert {path.name for path in dist.iterdir()} == {
        f"packscore-{packscore.__version__}.tar.gz",
        f"packscore-{packscore.__version__}-py3-none-any.whl",
    }
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^copyright: packscore (\S+)$", site, re.MULTILINE) == [
        packscore.__version__
    ]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == packscore.__version__


def test_every_extra_can_be_resolved(metadata: Message, dist: Path) -> None:
    extras = metadata.get_all("Provides-Extra", [])
    assert {"jax", "tpu", "parquet", "sentence-transformers"} < set(extras)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-cache-dir"]
    command = [*pip, f"{wheel}[{','.join(extras)}]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


def test_both_archives_work_where_they_are_installed(dist: Path, tmp_path: Path) -> None:
    """In an environment of their own, with the torch and transformers of this one."""
    for archive in dist.iterdir():
        where = tmp_path / archive.suffix
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
        python = where / "bin/python"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, str(archive)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (site,) = where.glob("lib/python*/site-packages")
        (site / "here.pth").write_text("\n".join(map(sysconfig.get_path, ("purelib", "platlib"))))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        run = functools.partial(subprocess.check_output, cwd=tmp_path, env=environment, text=True)
        assert run([where / "bin/packscore", "--version"]).strip() == packscore.__version__
        asked = "import packscore; print(packscore.shipped_model_path())"
        assert run([python, "-c", asked]).startswith(str(site))
