"""Which texts come more than once, of more than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Hashes in memory at a time, and pieces into which their range is cut: of a billion texts a piece
# has 4 million.
CHUNK = 1 << 18
PIECES = 256
HASH_BYTES = 8


def repeated(texts: Callable[[], Iterable[tuple[int, str]]]) -> tuple[int, tuple[int, str] | None]:
    """How many texts come more than once, and the first of them to come again, with its line.

    Their hashes lie on the disk, 8 bytes each, so that memory does not grow with them.

    Args:
      texts: with their lines; called again where hashes are equal, for those of two texts may be.
    """
    twice = set(_twice(hash(text) for _, text in texts()))
    met: set[str] = set()
    for line, text in texts() if twice else ():
        if text in met:
            return len(twice), (line, text)
        if hash(text) in twice:
            met.add(text)
    return 0, None


class Seen:
    """Texts of a stream, where nothing is read again: 8 bytes of each, by their hashes."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._sorted: list[NDArray[np.int64]] = []  # each longer than the next

    def add(self, text: str) -> bool:
        """Whether it is new."""
        key = hash(text)
        if key in self._new or any(_has(part, key) for part in self._sorted):
            return False
        self._new.add(key)
        if len(self._new) == CHUNK:
            self._sort()
        return True

    def _sort(self) -> None:
        import numpy as np

        part = np.sort(np.fromiter(self._new, np.int64))
        self._new.clear()
        while self._sorted and len(self._sorted[-1]) <= len(part):
            part = np.sort(np.concatenate([self._sorted.pop(), part]))
        self._sorted.append(part)


def _has(part: NDArray[np.int64], key: int) -> bool:
    place = int(part.searchsorted(key))
    return place < len(part) and int(part[place]) == key


def _twice(hashes: Iterator[int]) -> Iterator[int]:
    """The hashes that come more than once."""
    with TemporaryFile() as file:
        chunks = list(_write_sorted(hashes, file))
        for i in range(PIECES):
            yield from _twice_in(b"".join(_read(file, *chunk[i : i + 2]) for chunk in chunks))


def _write_sorted(hashes: Iterator[int], file: IO[bytes]) -> Iterator[NDArray[np.int64]]:
    """Write them in chunks that are sorted; of each where its pieces begin, and the last ends."""
    import numpy as np

    edges = np.linspace(-(2**63), 2**63, PIECES + 1)[1:-1].astype(np.int64)
    while len(chunk := np.sort(np.fromiter(islice(hashes, CHUNK), np.int64))):
        begins = file.tell() // HASH_BYTES
        file.write(chunk.tobytes())
        yield begins + np.array([0, *np.searchsorted(chunk, edges), len(chunk)])


def _read(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(int(start) * HASH_BYTES)
    return file.read(int(stop - start) * HASH_BYTES)


def _twice_in(piece: bytes) -> list[int]:
    import numpy as np

    found = np.sort(np.frombuffer(piece, np.int64))
    twice: list[int] = np.unique(found[1:][found[1:] == found[:-1]]).tolist()
    return twice
