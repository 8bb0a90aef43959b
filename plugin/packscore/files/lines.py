"""Lines of a file that may hold anything: of any length, and not even text."""

from __future__ import annotations

from typing import BinaryIO

from packscore.files.records import BadValueError
from packscore.files.sources import damage_told

# What is skipped of an overlong line at a time.
SKIP_BYTES = 1 << 20
UTF8_BOM = b"\xef\xbb\xbf"


class Lines:
    """Iterates over the lines of a binary file, none of them longer than a limit in memory.

    `next` raises `BadValueError` for a line that cannot be read and goes on with the next line.
    """

    def __init__(self, file: BinaryIO, max_line_bytes: int) -> None:
        self._file = file
        self._max_line_bytes = max_line_bytes
        self.number = 0  # of the line read last, from 1

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        # the limit is on what stands before the line's end, "\n" or "\r\n"
        line = self._read(self._max_line_bytes + 2)
        if not line:
            raise StopIteration
        self.number += 1
        length = len(line.rstrip(b"\r\n"))
        if length > self._max_line_bytes:
            rest = 0 if line.endswith(b"\n") else self._skip_line()
            raise BadValueError(
                f"is {length + rest:,} bytes long, over --max-line-bytes={self._max_line_bytes}"
            )
        if self.number == 1:
            line = line.removeprefix(UTF8_BOM)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise BadValueError(f"is not UTF-8: {error.reason} at byte {error.start}") from error

    def _read(self, limit: int) -> bytes:
        with damage_told():
            return self._file.readline(limit)

    def _skip_line(self) -> int:
        """Read past the rest of a line; how many bytes it had before its newline."""
        skipped = 0
        while chunk := self._read(SKIP_BYTES):
            skipped += len(chunk.rstrip(b"\r\n"))
            if chunk.endswith(b"\n"):
                break
        return skipped
