"""Short of memory: smaller launches, then one by one, then an error that says what was asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import LABELS, engine_of, one_by_one, random_ids, random_qwen3
from packscore import InputError, MultiItemScorer, OutOfMemoryError, ScoringError, patch_model
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PAGE_SIZE
from tolerances import PROBABILITY_MAX_FLOAT32

QUERY = random_ids(300, seed=1)
ITEMS = [random_ids(n, seed=k) for k, n in enumerate([40, 1, 0, 64, 65, 200, 40, 127, 12, 12])]
TOLD = {
    None: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    "numpy": MemoryError("Unable to allocate 9. GiB"),
}
ENGINES: dict[str, tuple[str | None, str, Exception | None]] = {
    "cuda": (None, "segment", TOLD[None]),
    "cpu": (None, "segment", TOLD["cpu"]),
    "dense": (None, "dense", TOLD["numpy"]),
    "jax": ("jax", "segment", None),
}


class Short:
    """A scorer whose launches fail where `refuses` says so; and the tokens of all of them."""

    def __init__(
        self, device: str | None, mask_impl: str, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.reference = random_qwen3()
        options: dict[str, Any] = {"label_token_ids": LABELS, "mask_impl": mask_impl}
        model = patch_model(random_qwen3(), device=device)
        self.scorer = MultiItemScorer(model, **options)
        self.refuses: Callable[[PackedBatch], bool] = lambda batch: False
        self.sizes: list[int] = []
        engine = engine_of(self.scorer)
        launch = engine.launch

        def refusing(batch: PackedBatch, *args: Any) -> Any:
            self.sizes.append(len(batch.token_ids))
            if self.refuses(batch):
                raise error
            return launch(batch, *args)

        monkeypatch.setattr(engine, "launch", refusing)

    def check(self, scores: Any, query: list[int] = QUERY) -> None:
        expected = one_by_one(self.reference, query, ITEMS, LABELS)
        worst = (torch.tensor(scores) - expected).abs().max()
        assert worst <= PROBABILITY_MAX_FLOAT32


@pytest.fixture(params=[*ENGINES])
def short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Short:
    device, mask_impl, error = ENGINES[request.param]
    return Short(device, mask_impl, error or _of_jax(), monkeypatch)


def _of_jax() -> Exception:
    from jax.errors import JaxRuntimeError

    return JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")


@pytest.mark.parametrize("flow", [None, "packed"])
def test_launches_get_smaller_until_they_fit(short: Short, flow: Any) -> None:
    short.refuses = lambda batch: len(batch.token_ids) > 600
    found = short.scorer.score(QUERY, ITEMS, flow=flow, return_usage=True)
    short.check(found.scores)
    assert found.usage.flow == "chunked"
    refused = [size for size in short.sizes if size > 600]
    assert 1 <= len(refused) <= 2
    assert len(short.sizes) > len(refused) + 1
    assert short.scorer.score(QUERY, ITEMS)  # the next call goes on


def test_many_requests_share_smaller_launches(short: Short) -> None:
    queries = [QUERY, random_ids(90, seed=3), random_ids(299, seed=4)]
    short.refuses = lambda batch: len(batch.token_ids) > 700
    found = short.scorer.score_many([(query, ITEMS) for query in queries])
    for scores, query in zip(found, queries, strict=True):
        short.check(scores, query)


def test_the_last_resort_is_one_by_one(short: Short) -> None:
    """Where whatever holds a plan, a mask or pages does not fit."""
    short.refuses = lambda batch: not batch.is_causal or batch.shares[0].lease is not None
    found = short.scorer.score(QUERY, ITEMS, return_usage=True)
    short.check(found.scores)
    # without pages, launches that got small enough hold one item each before
    assert found.usage.flow == ("chunked" if short.scorer.mask_impl == "dense" else "plain")


def test_what_never_fits_is_an_error_that_says_what_was_asked(short: Short) -> None:
    short.refuses = lambda batch: True
    with pytest.raises(OutOfMemoryError, match=r"an item and its query at a time: .* 9|2.00 GiB"):
        short.scorer.score(QUERY, ITEMS)
    assert len(short.sizes) < 12  # a bisection, and not one try for each item
    with pytest.raises(OutOfMemoryError):
        short.scorer.score(QUERY, ITEMS, flow="packed")
    pool = engine_of(short.scorer).pool
    assert pool is None or pool.num_pinned_pages == 0
    short.refuses = lambda batch: False
    short.check(short.scorer.score(QUERY, ITEMS))


def test_other_queries_keep_their_scores(short: Short) -> None:
    long = random_ids(500, seed=5)
    short.refuses = lambda batch: any(len(share.prefix) > 400 for share in batch.shares)
    requests = [(QUERY, ITEMS), (long, ITEMS), (QUERY[:50], ITEMS)]
    with pytest.raises(ScoringError, match=r"requests\[1\] \(memory does not suffice") as info:
        short.scorer.score_many(requests)
    assert isinstance(info.value.__cause__, OutOfMemoryError)
    for k in (0, 2):
        short.check(info.value.scores[k], requests[k][0])
    assert info.value.scores[1] is None


def test_a_held_query(short: Short) -> None:
    # in torch a dense mask keeps no pages, and the query is in every launch
    most = 600 if short.scorer.mask_impl == "dense" else 2 * PAGE_SIZE
    short.refuses = lambda batch: len(batch.token_ids) > most
    with short.scorer.prefix(QUERY) as held:
        short.check(held.score(ITEMS))
    assert max(short.sizes) > most


def test_other_failures_are_not_taken_for_it(short: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(short.scorer)
    for error in (RuntimeError("shape mismatch"), ValueError("x"), InputError("x")):
        assert not engine.is_out_of_memory(error)

    def fails(*args: Any) -> Any:
        short.sizes.append(0)
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(engine, "launch", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        short.scorer.score(QUERY, ITEMS)
    assert len(short.sizes) == 1


LIMITED = """
import resource
import torch
from helpers import LABELS, one_by_one, random_ids, random_qwen3
from packscore import MultiItemScorer, patch_model

torch.set_num_threads(1)
query, items = random_ids(700, seed=1), [random_ids(100, seed=k) for k in range(10)]
model = random_qwen3(intermediate_size=65_536, num_layers=2)
expected = one_by_one(model, query, items[:2], LABELS)
scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
scorer.score(query[:9], items[:1])
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {room} * 2**20, -1))
found = scorer.score(query, items, return_usage=True)
assert (torch.tensor(found.scores[:2]) - expected).abs().max() < 1e-5
print(found.usage.flow)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_process_that_is_really_short_of_memory() -> None:
    """A launch of 1,700 tokens takes 1.2 GB here, half a gigabyte where 700 are the most."""
    code = LIMITED.format(room=700)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="tests")
    assert done.returncode == 0, done.stderr
    assert "out of memory; trying launches of at most 850 tokens" in done.stderr
    assert done.stdout.strip() == "chunked"
