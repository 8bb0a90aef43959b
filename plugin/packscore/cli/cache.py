"""Where the command line keeps compiled programs, so that the next process need not compile them.

The library keeps none unless it is told to (`compile_cache`): jax's configuration is the whole
process's, which the command line owns and a caller of the library does not.

jax finds a program by all of it: the computation (so the model's sizes, its dtype and packscore's
own code), the compiler and its flags, the chip and its runtime. Versions and the processor are in
the folder's name too: jax itself would load what was compiled for another processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import packscore
from packscore.cli.exits import tell
from packscore.installed import version_of
from packscore.telling import counted

NONE = "none"
VARIABLE = "PACKSCORE_CACHE_DIR"
JAXS_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
ENTRY = "*-cache"  # what jax calls a program in it


@dataclass(frozen=True)
class Cache:
    """The folder of one command, and what was in it before.

    Args:
      folder: None keeps nothing.
      before: names of its programs.
    """

    folder: Path | None
    before: frozenset[str] = frozenset()

    def tell_new(self) -> None:
        """Say what was written, where, and how it goes, if something was."""
        if self.folder is None:
            return
        new = [path for path in self.folder.glob(ENTRY) if path.name not in self.before]
        if new:
            size = sum(path.stat().st_size for path in new) / 2**20
            tell(
                f"kept {counted(len(new), 'compiled program')} ({size:.1f} MiB) in {self.folder}; "
                f"rm -r {shlex.quote(str(self.folder))} deletes them"
            )


def open_cache(asked: str | None) -> Cache:
    """The folder of compiled programs, made if it is not there; none, and a line, if it cannot be.

    Args:
      asked: `--cache-dir`.
    """
    folder = folder_of(asked)
    if folder is None:
        os.environ.pop(JAXS_VARIABLE, None)  # before jax reads it
        return Cache(None)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        tell(
            f"warning: compiled programs are not kept, for {folder} cannot be written "
            f"({error.strerror}); name another folder, --cache-dir FOLDER, or none"
        )
        return Cache(None)
    return Cache(folder, frozenset(path.name for path in folder.glob(ENTRY)))


def folder_of(asked: str | None) -> Path | None:
    """What `--cache-dir` names, or JAX_COMPILATION_CACHE_DIR, or a folder in the user's own cache.

    The root of the last is PACKSCORE_CACHE_DIR, if that is set. "none" is None.
    """
    named = asked or os.environ.get(JAXS_VARIABLE)
    root = os.environ.get(VARIABLE)
    if NONE in (named, named or root):
        return None
    if named:
        return Path(named).absolute()
    return (
        (Path(root) if root else _users_cache() / "packscore").absolute() / "programs" / _made_by()
    )


def _users_cache() -> Path:
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    # a relative one is to be ignored, says the XDG Base Directory Specification
    found = os.environ.get("XDG_CACHE_HOME", "")
    return Path(found) if os.path.isabs(found) else home / ".cache"


def _made_by() -> str:
    """A name for what programs depend on beside themselves: versions, and the processor."""
    versions = [f"packscore-{packscore.__version__}"]
    for package in ("jax", "jaxlib", "libtpu"):
        if found := version_of(package):
            versions.append(f"{package}-{found}")
    return "_".join([*versions, hashlib.sha256(_processor().encode()).hexdigest()[:8]])


def _processor() -> str:
    """Its kind and the instructions that it has."""
    told = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return told
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{told} {' '.join(sorted(flags.split()))}"
