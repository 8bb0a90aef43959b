"""The sizes that programs are compiled for: everything else about a request is data."""

from __future__ import annotations

from dataclasses import dataclass

from packscore.flows.page_pool import PAGE_SIZE
from packscore_kernels.hardware import align_to, cdiv

SMALLEST_BUCKET = 128
# Programs up to here double; above, eight sizes an octave waste at most 12.5 %.
LARGEST_DOUBLING = 1024
DEFAULT_MAX_TOKENS = 16_384
# Where kernels walk over the tiles that hold tokens: the room of a program for tokens, and the most
# rows of a tile. Short tiles wait for weights, which all of them need; long ones hold more padding.
CAPACITIES = {512: 256, 4096: 512, 16_384: 1024}
SMALLEST_LABELS = 64
# What a schedule has room for: requests of one launch, pages of the pool, and pages that the
# requests of one launch name, each for itself where they share some.
MAX_GROUPS = 32
MAX_PAGES = 512
NAMED_PAGES = 256
# Pages that a program under a dense mask reads beside its tokens, and scores whether filled or not.
READ_PAGES = (1, 4, 16, 64, 256, MAX_PAGES)
# Rows of the programs that give the logits of the whole vocabulary: one token each of a few
# sequences, or many tokens in steps, whose logits fit beside the weights (78 MB for Qwen3).
HEAD_ROWS = (8, 128)


def token_bucket(num_tokens: int) -> int:
    """The program that serves `num_tokens`: a power of two, or in eighths of one above 1 024."""
    size = max(SMALLEST_BUCKET, 1 << (num_tokens - 1).bit_length())
    if size <= LARGEST_DOUBLING:
        return size
    step = size // 16
    return cdiv(num_tokens, step) * step


def token_ladder(max_tokens: int) -> list[int]:
    """Every bucket up to the one that serves `max_tokens`."""
    sizes, size = [], SMALLEST_BUCKET
    while size < token_bucket(max_tokens):
        sizes.append(size)
        size = token_bucket(size + 1)
    return [*sizes, size]


def capacity(num_tokens: int) -> tuple[int, int]:
    """Of the program that serves `num_tokens` by tiles: its room, and the most rows of a tile."""
    for room, tile in CAPACITIES.items():
        if num_tokens <= room:
            return room, tile
    return 1 << (num_tokens - 1).bit_length(), tile


def program_sizes(max_tokens: int, *, by_tiles: bool) -> list[int]:
    """Room for tokens of every program that serves up to `max_tokens`."""
    if not by_tiles:
        return token_ladder(max_tokens)
    largest, _ = capacity(max_tokens)
    return [*(room for room in CAPACITIES if room < largest), largest]


def computed_tokens(num_tokens: int, *, by_tiles: bool) -> int:
    """Tokens that a launch of so many runs with: in whole tiles, or all of its bucket."""
    return align_to(num_tokens, capacity(num_tokens)[1]) if by_tiles else token_bucket(num_tokens)


@dataclass(frozen=True)
class ProgramKey:
    """What a program is compiled for; everything else is data."""

    num_tokens: int  # that there is room for
    num_rows: int  # of those that are read
    num_labels: int  # 0: the program stops before the head and gives hidden states
    num_pages: int = 0  # of the pool that the program reads and writes; 0: it has none
    tile: int = 0  # most rows of a tile, where those that hold tokens are computed; 0: all rows are


@dataclass(frozen=True)
class DenseKey(ProgramKey):
    """The same under a dense mask: of all its tokens, and of `read_pages` pages before them."""

    read_pages: int = 1

    @classmethod
    def of(cls, key: ProgramKey, read_pages: int) -> DenseKey:
        """The dense program that stands for a segment one, of a launch that names so many pages."""
        room = next(room for room in READ_PAGES if room >= read_pages) if key.num_pages else 0
        return cls(**vars(key), read_pages=room)

    @property
    def num_keys(self) -> int:
        """Keys that each token is scored against."""
        return self.num_tokens + self.read_pages * PAGE_SIZE


@dataclass(frozen=True)
class HeadKey:
    """The program from hidden states to the logits of the whole vocabulary."""

    num_rows: int


def program_key(
    num_tokens: int, num_rows: int, num_labels: int, num_pages: int = 0, *, by_tiles: bool = False
) -> ProgramKey:
    """The program that serves a launch of these sizes.

    Args:
      num_tokens: packed tokens.
      num_rows: how many of them are read.
      num_labels: labels that are read of each; 0: hidden states.
      num_pages: of the pool.
      by_tiles: whether the model's kernels compute the tiles alone that hold tokens.
    """
    room, tile = capacity(num_tokens) if by_tiles else (token_bucket(num_tokens), 0)
    # every item has a token, or shares the row of the prefix's last one with other empty items
    rows = room if num_rows <= room else 1 << (num_rows - 1).bit_length()
    labels = max(SMALLEST_LABELS, 1 << (num_labels - 1).bit_length()) if num_labels else 0
    return ProgramKey(room, rows, labels, num_pages, tile)
