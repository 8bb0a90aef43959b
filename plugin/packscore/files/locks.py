"""One run at a time on a file. The system holds the lock, so that no killed run leaves one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from packscore.files.failures import RunError

try:
    import fcntl
except ImportError:  # not on Windows, where two runs on one output are the user's to avoid
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(paths: Iterable[Path]) -> Iterator[None]:
    """Hold every one of these files, whether it is there or not.

    A lock is on `PATH.packscore.lock`, which has no other use and is removed at the end: outputs
    themselves are removed and renamed over while a run has them.

    Raises:
      RunError: another process has one of them.
    """
    with ExitStack() as stack:
        for path in sorted({Path(os.path.realpath(path)) for path in paths}):
            stack.enter_context(_lock(path))
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    lock = Path(f"{path}.packscore.lock")
    file = _acquire(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is released, so that it is nobody else's yet
        os.close(file)


def _acquire(lock: Path, path: Path) -> int:
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise RunError(f"{path} is being written by another process") from error
            raise
        if _is_still(lock, file):
            return file
        os.close(file)  # its holder removed it between our two calls


def _is_still(lock: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(file))
    except FileNotFoundError:
        return False
