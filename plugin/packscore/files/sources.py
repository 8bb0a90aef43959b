"""Where bytes come from and go to: files, streams, and what they are compressed with."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from packscore.files.failures import RunError, UsageError

MAGICS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
# Told by its first bytes, and read by something else.
REFUSED_MAGICS = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd; pipe it in: zstd -dc FILE | packscore ... -",
    b"PK\x03\x04": "a zip archive; pipe one of its files in: unzip -p FILE | packscore ... -",
    b"PAR1": "a parquet file; pass --input-format parquet",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
STANDARD_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+")


def is_stream(path: str | Path) -> bool:
    """Whether a path is read or written once, in order: "-", a device, a pipe.

    Such a path is nobody's to lock, remove or rename over.
    """
    name = str(path)
    if name == "-" or STANDARD_STREAMS.fullmatch(os.path.abspath(name)):
        return True
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@dataclass(frozen=True)
class Source:
    """An open input.

    Args:
      file: its bytes, decompressed.
      compression: "gzip", "bzip2", "xz" or None.
      stored: the bytes as they are stored, of which `total` are in a file.
      total: bytes of the file; None for a stream.
    """

    file: BinaryIO
    compression: str | None
    stored: BinaryIO
    total: int | None

    @property
    def position(self) -> int:
        """Bytes read of `total`."""
        return 0 if self.total is None else self.stored.tell()


@contextmanager
def open_source(path: str) -> Iterator[Source]:
    """Open an input; what it is compressed with is told by its first bytes.

    Raises:
      UsageError: it is something that cannot be read here.
    """
    if path == "-":
        yield _decompressed(path, sys.stdin.buffer, None)
        return
    with Path(path).open("rb") as file:
        total = None if is_stream(path) else os.fstat(file.fileno()).st_size
        yield _decompressed(path, file, total)


def _decompressed(path: str, file: BinaryIO, total: int | None) -> Source:
    peeked = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(Any, file))
    file, first = cast(BinaryIO, peeked), peeked.peek(6)[:6]
    for magic, what in REFUSED_MAGICS.items():
        if first.startswith(magic):
            raise UsageError(f"INPUT={path} is {what}")
    kinds = [kind for magic, kind in MAGICS.items() if first.startswith(magic)]
    if not kinds:
        return Source(file, None, file, total)
    opened: BinaryIO
    if kinds[0] == "gzip":
        opened = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file)))
    elif kinds[0] == "bzip2":
        import bz2

        opened = cast(BinaryIO, bz2.BZ2File(file))
    else:
        import lzma

        opened = cast(BinaryIO, lzma.LZMAFile(file))  # noqa: SIM115  # `file` is what is closed
    return Source(opened, kinds[0], file, total)


@contextmanager
def damage_told() -> Iterator[None]:
    """Turn what decompressors raise over damaged bytes into one error.

    Raises:
      RunError: the input is damaged, or its end is missing.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(f"INPUT: the compressed data is damaged or cut short: {error}") from error
    except Exception as error:
        # lzma's, which is not imported where nothing needs it; and bzip2's, a bare OSError
        if type(error).__name__ == "LZMAError" or error.args == ("Invalid data stream",):
            raise RunError(f"INPUT: the compressed data is damaged: {error}") from error
        raise


def open_sink(path: Path) -> BinaryIO:
    """Open a stream to write to, as it is: nothing is made, cut or removed."""
    if str(path) in ("-", "/dev/stdout"):
        return sys.stdout.buffer
    if str(path) == "/dev/stderr":
        return sys.stderr.buffer
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


def close_sink(file: BinaryIO) -> None:
    """Close what `open_sink` opened."""
    if file not in (sys.stdout.buffer, sys.stderr.buffer):
        file.close()
