"""The sizes that programs are compiled for: everything else about a request is data."""

from __future__ import annotations

from dataclasses import dataclass

from packscore.flows.page_pool import PAGE_SIZE
from packscore_kernels.hardware import cdiv

SMALLEST_BUCKET = 128
# Programs up to here double; above, eight sizes an octave waste at most 12.5 %.
LARGEST_DOUBLING = 1024
DEFAULT_MAX_TOKENS = 16_384
# A program scores up to one item for so many tokens, or one for every token.
TOKENS_PER_ITEM = 16
SMALLEST_LABELS = 8
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


def reads_rows(num_rows: int, num_tokens: int) -> bool:
    """Whether the last layer of a program runs for the rows that are read alone.

    It would gain nothing where more than half are, whose keys and values are computed twice.
    """
    return 2 * num_rows <= num_tokens


@dataclass(frozen=True)
class ProgramKey:
    """What a program is compiled for; everything else is data."""

    num_tokens: int
    num_items: int
    num_labels: int  # 0: the program stops before the head and gives hidden states
    over_vocabulary: bool
    num_pages: int = 0  # of the pool that the program reads and writes; 0: it has none


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
    num_tokens: int, num_items: int, num_labels: int, over_vocabulary: bool, num_pages: int = 0
) -> ProgramKey:
    """The program that serves a request of these sizes."""
    tokens = token_bucket(num_tokens)
    few = max(tokens // TOKENS_PER_ITEM, 1)
    # every item has a token, or shares the row of the prefix's last one with other empty items
    items = few if num_items <= few else 1 << max(num_items - 1, tokens - 1).bit_length()
    labels = max(SMALLEST_LABELS, 1 << (num_labels - 1).bit_length()) if num_labels else 0
    return ProgramKey(tokens, items, labels, over_vocabulary, num_pages)
