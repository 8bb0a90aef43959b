"""What N items cost grows with N and no faster: tokens computed, and tiles of attention visited."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import QWEN3
from packscore.encoded import EncodedRequest
from packscore.flows.copies import Copies
from packscore.flows.costs import tpu_cost_model
from packscore.flows.engine import Limits, Readout, RowValues
from packscore.flows.page_pool import PagePool
from packscore.flows.runner import Runner
from packscore.model.sizes import ModelSizes
from packscore.programs.sizes import MAX_GROUPS, NAMED_PAGES, token_bucket
from packscore_kernels import BlockSizes, build_schedule
from packscore_kernels.attention.schedule import visited_blocks
from packscore_kernels.hardware import cdiv

COUNTS = (10, 100, 1000, 10_000)
QUERY, ITEM, MAX_TOKENS, NUM_PAGES = 2000, 20, 16_384, 64
BLOCKS = BlockSizes(512, 512, 2048, 6)


class CountingEngine:
    """An engine that computes nothing and counts the tokens and tiles of every launch."""

    mask_impl = "segment"
    only_flow = whole_last = None

    def __init__(self) -> None:
        self.pool = PagePool(NUM_PAGES)
        self.costs = tpu_cost_model(ModelSizes.of(QWEN3), "v6e", 2, token_bucket)
        self.limits = Limits(MAX_TOKENS, MAX_TOKENS, MAX_GROUPS, NAMED_PAGES)
        self.tokens = self.tiles = self.launches = 0

    def refresh(self, *, force: bool = False) -> None:
        pass

    def reads_rows(self, batch: Any) -> bool:
        return True

    def launch(self, batch: Any, readout: Readout) -> int:
        layout = type(batch.layout)(batch.layout.groups, token_bucket(len(batch.token_ids)))
        schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=128, num_pages=NUM_PAGES)
        # each tile of rows has its own window of keys besides
        own = cdiv(layout.num_real_tokens, BLOCKS.block_q)
        self.tiles += int(visited_blocks(schedule)[0].sum()) + own
        self.tokens += len(batch.token_ids)
        self.launches += 1
        return len(batch.rows)

    def read(self, launched: Any) -> Any:
        return RowValues(torch.zeros(sum(launched), 2))


def grown(count: int) -> CountingEngine:
    engine: Any = CountingEngine()
    items = [np.full(ITEM, k) for k in range(count)]
    (found,) = Runner(Copies([engine])).run(
        [EncodedRequest(np.arange(QUERY), items)], Readout((1, 2), over_vocabulary=False)
    )
    assert not isinstance(found, Exception), found
    assert found.usage.computed_tokens == engine.tokens
    return engine


def check_linear(tiles: dict[int, int]) -> None:
    """An item more never costs more than its rows' share of a tile against all keys it sees."""
    prefix_tiles = cdiv(QUERY, BLOCKS.block_kv)
    share = ITEM / BLOCKS.block_q * (prefix_tiles + 2)
    most = tiles[COUNTS[0]] + 1
    for count in COUNTS:
        assert tiles[count] <= most + 1.1 * share * count, (count, tiles[count])


def test_tokens_and_tiles_grow_linearly_in_items() -> None:
    tiles = {}
    for count in COUNTS:
        engine = grown(count)
        tiles[count] = engine.tiles
        print(
            f"{count:6,} items: {engine.tokens:8,} tokens computed, {engine.tiles:6,} tiles "
            f"visited, {engine.launches} launches"
        )
        assert engine.tokens == QUERY + ITEM * count
    check_linear(tiles)


def test_the_check_of_growth_sees_what_grows_faster() -> None:
    """The control: full causal attention over the packed tokens visits tiles x tiles."""

    def causal(count: int) -> int:
        rows = cdiv(QUERY + ITEM * count, BLOCKS.block_q)
        return rows * (rows + 1) // 2

    with pytest.raises(AssertionError):
        check_linear({count: causal(count) for count in COUNTS})
