"""Compiled programs on jax's CPU: the same scores, few compiles, and torch left as it was."""

from __future__ import annotations

import copy
import logging
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from helpers import (
    FAMILIES,
    LABELS,
    VOCAB_SIZE,
    FrozenCase,
    one_by_one,
    random_decoder,
    random_ids,
    random_qwen3,
)
from packscore import (
    InputError,
    MultiItemScorer,
    UnexpectedCompileError,
    UnsupportedModelError,
    is_patched,
    patch_model,
    unpatch_model,
)
from packscore.calls import program_of
from packscore.flows.copies import Copies
from packscore.flows.engine import Readout
from packscore.flows.packing import Share, pack
from packscore.flows.reads import LabelRead
from packscore.flows.runner import Runner
from packscore.programs.engine import ProgramEngine
from packscore.programs.sizes import (
    ProgramKey,
    capacity,
    computed_tokens,
    program_key,
    program_sizes,
    token_bucket,
    token_ladder,
)
from tolerances import (
    LOG_ODDS_REORDERED,
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)

ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 60, 1, 0, 9, 130, 9))]
PREFIX = random_ids(37, seed=1)


def differences(scorer: MultiItemScorer) -> list[torch.Tensor]:
    found = []
    # plain calls of the model itself run through programs too
    model: Any = unpatch_model(copy.deepcopy(scorer.model))
    for softmax, labels in ((False, LABELS), (True, LABELS[:2])):
        expected = one_by_one(model, PREFIX, ITEMS, labels, apply_softmax=softmax)
        scores = scorer.score(PREFIX, ITEMS, label_token_ids=labels, apply_softmax=softmax)
        found.append((torch.tensor(scores) - expected).abs())
    return found


# every family, tied and not; the others are long
EVERY_FAMILY = [
    pytest.param(
        family,
        tied,
        id=f"{family}-{'tied' if tied else 'untied'}",
        marks=() if tied == (place % 2 == 0) else pytest.mark.long,
    )
    for place, family in enumerate(FAMILIES)
    for tied in (True, False)
]


@pytest.mark.parametrize(("family", "tied"), EVERY_FAMILY)
def test_float32_equals_one_by_one(family: str, tied: bool) -> None:
    options = {"tied": tied} if family == "qwen3" else {"tie_word_embeddings": tied}
    model = random_decoder(family, **options)
    scorer = MultiItemScorer(patch_model(model, device="jax"))
    assert program_of(model) is not None
    for difference in differences(scorer):
        assert difference.max() <= PROBABILITY_MAX_FLOAT32


def test_bfloat16_and_28_layers() -> None:
    deep = random_qwen3(num_layers=28)
    scorer = MultiItemScorer(patch_model(deep, device="jax"))
    for difference in differences(scorer):
        assert difference.max() <= PROBABILITY_MAX_FLOAT32
    model = random_qwen3(num_heads=14, num_kv_heads=2, head_dim=64, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model = model.bfloat16()
    for difference in differences(MultiItemScorer(patch_model(model, device="jax"))):
        assert difference.max() <= PROBABILITY_MAX_BFLOAT16
        assert difference.mean() <= PROBABILITY_MEAN_BFLOAT16


def test_shipped_model(
    fresh: PreTrainedModel, unpatched: PreTrainedModel, case: FrozenCase
) -> None:
    scorer = MultiItemScorer(patch_model(fresh, device="jax"), label_token_ids=case.labels)
    expected = one_by_one(unpatched, case.prefix, case.items, case.labels, apply_softmax=True)
    result = scorer.score(case.prefix, case.items, apply_softmax=True, return_usage=True)
    assert (torch.tensor(result.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert result.usage.computed_tokens == len(case.prefix) + sum(map(len, case.items))
    assert result.usage.padding_tokens == 512 - result.usage.computed_tokens


def test_weights_are_shared_and_the_torch_model_is_unchanged() -> None:
    model = random_qwen3(num_layers=3)
    names = [name for name, _ in model.named_parameters()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(torch.tensor([PREFIX]), use_cache=True).logits
    patch_model(model, device="jax")
    program: Any = program_of(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model(torch.tensor([PREFIX]), use_cache=True).logits, logits)
    weights = program._weights.arrays
    stack = weights["layers"]["mlp.up_proj.weight"]
    first = model.model.layers[0].mlp.up_proj.weight
    assert stack.unsafe_buffer_pointer() == first.data_ptr()
    embed = weights["embed_tokens"]["weight"]
    assert embed.unsafe_buffer_pointer() == model.model.embed_tokens.weight.data_ptr()
    assert "head" not in weights  # it is tied, and one copy is enough


def test_requests_larger_than_a_program_are_split() -> None:
    model = random_qwen3()
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    scorer = MultiItemScorer(patch_model(model, device="jax"))
    program: Any = program_of(model)
    program.max_tokens = 128
    result = scorer.score(PREFIX, ITEMS, label_token_ids=LABELS, return_usage=True)
    assert (torch.tensor(result.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert result.usage.flow == "chunked"


@pytest.fixture(scope="module", params=[1280, pytest.param(8192, marks=pytest.mark.long)])
def largest(request: pytest.FixtureRequest) -> int:
    """Tokens of the largest program; by default two are an eighth apart, and the others double."""
    return int(request.param)


@pytest.fixture(scope="module")
def warm(quick_programs: None, largest: int) -> MultiItemScorer:
    model = random_qwen3(num_layers=1, num_heads=1, num_kv_heads=1)
    scorer = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=LABELS[:2])
    program: Any = program_of(model)
    compiled = program.warmup(max_tokens=largest)
    assert compiled == program.compile_count == len(token_ladder(largest))
    program.strict = True
    return scorer


def requests(count: int, max_tokens: int) -> list[tuple[list[int], list[list[int]]]]:
    """Up to 16 items, as many requests of some hundred tokens as of some thousand."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(count):
        total = int(np.exp(rng.uniform(np.log(20), np.log(max_tokens + 1))))
        cuts = np.sort(rng.integers(1, total + 1, rng.integers(1, 17)))
        lens = np.diff([*cuts, total])
        found.append(
            (random_ids(int(cuts[0]), seed=k), [random_ids(int(n), seed=int(n)) for n in lens])
        )
    return found


def test_no_compile_after_warmup(warm: MultiItemScorer, largest: int) -> None:
    program: Any = program_of(warm.model)
    before = program.compile_count
    sizes = set()
    for prefix, items in requests(50, largest):
        result = warm.score(prefix, items, return_usage=True)
        assert len(result.scores) == len(items)
        sizes.add(result.usage.computed_tokens)
    assert len(sizes) > 40
    assert max(sizes) > largest // 2
    assert program.compile_count == before
    with pytest.raises(UnexpectedCompileError, match=r"is not compiled and strict=True; call warm"):
        warm.score(PREFIX, [random_ids(largest, seed=1)])


def test_two_engines_of_programs_share_the_work_of_a_run(warm: MultiItemScorer) -> None:
    """As copies on two chips do; here both launch one set of programs on one CPU."""
    program, core = program_of(warm.model), warm._core
    assert program is not None
    assert core.default_labels is not None
    copies = Copies([ProgramEngine(program, 2**24, "segment") for _ in range(2)])
    work = [warm.encode(prefix, items) for prefix, items in requests(30, 700)]
    read = LabelRead((core.default_labels,), over_vocabulary=True)
    expected = core.run(work, read)
    for found, right in zip(core.run(work, read, runner=Runner(copies)), expected, strict=True):
        assert (found.logits - right.logits).abs().max() <= LOG_ODDS_REORDERED
    assert all(pool.num_free_pages < pool.num_pages for pool in copies.pools)
    engine = copies.first
    launched = engine.launch(pack([Share(0, work[0].prefix, [], np.arange(0))]), Readout((1,)))
    engine.read([launched])
    assert engine.is_done(launched)


def test_threads_give_the_single_threads_scores(warm: MultiItemScorer) -> None:
    work = requests(50, 700)
    # by name, so that the pages that others filled play no part
    expected = [warm.score(prefix, items, flow="packed") for prefix, items in work]
    found: dict[tuple[int, int], list[list[float]]] = {}

    def run(thread: int) -> None:
        for k, (prefix, items) in enumerate(work):
            found[thread, k] = warm.score(prefix, items, flow="packed")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n, k] == expected[k] for n in range(8) for k in range(len(work)))


def test_every_compile_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax")
    with caplog.at_level(logging.INFO, "packscore"):
        model(torch.tensor([PREFIX]), logits_to_keep=1)
        model(torch.tensor([PREFIX]), logits_to_keep=1)
    pattern = r"compiled (\w+)\(.*num_\w+=(\d+).*\) in (\d+\.\d) s, (\d+) bytes of code"
    found = [re.search(pattern, message) for message in caplog.messages]
    assert [match and match[1] for match in found] == ["ProgramKey", "HeadKey"]
    assert all(match and int(match[4]) >= 0 for match in found)


def test_torch_compile_and_pin_memory_work_afterwards(warm: MultiItemScorer) -> None:
    assert warm.score([1], [[2], [3]])
    doubled = torch.compile(lambda x: x * 2, backend="eager")
    assert doubled(torch.ones(2)).tolist() == [2.0, 2.0]
    loader = torch.utils.data.DataLoader([1, 2], pin_memory=True)
    assert len(list(loader)) == 2
    assert not torch.accelerator.is_available()


def test_generate_is_unaffected() -> None:
    model = random_qwen3()
    ids = torch.tensor([PREFIX])
    before = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    patch_model(model, device="jax")
    after = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)


def test_undo_and_devices() -> None:
    model = random_qwen3()
    with pytest.raises(InputError, match=r"device='gpu' must be 'tpu', 'jax', 'auto' or None"):
        patch_model(model, device="gpu")
    with pytest.raises(InputError, match=r"device='tpu': jax sees no TPU"):
        patch_model(model, device="tpu")
    patch_model(model, device="auto")
    assert program_of(model) is None
    patch_model(model, device="jax")
    program = program_of(model)
    assert program is program_of(patch_model(model, device="jax"))
    unpatch_model(model)
    assert program_of(model) is None
    assert not is_patched(model)


def test_adapters_are_refused_by_name() -> None:
    wrapped = get_peft_model(random_qwen3(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"parameter .*q_proj.* is not one of a plain"):
        patch_model(wrapped.eval(), device="jax")


def test_layers_of_two_kinds_are_refused() -> None:
    model = random_decoder("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(UnsupportedModelError, match="layer 1 has other weights than layer 0"):
        patch_model(model, device="jax")


def test_buckets() -> None:
    assert [token_bucket(n) for n in (1, 128, 129, 1024, 1025, 2048, 2049, 12_000)] == [
        *(128, 128, 256, 1024, 1152, 2048, 2304, 12_288),
    ]
    for n in range(1, 20_000, 7):
        bucket = token_bucket(n)
        assert n <= bucket
        assert bucket % 128 == 0
        assert n <= 1024 or bucket <= 1.125 * n
    ladder = token_ladder(5000)
    assert ladder == sorted({token_bucket(n) for n in range(1, 5001)})
    assert program_key(12_000, 500, 2) == ProgramKey(12_288, 12_288, 64)
    # by tiles: the room of a program, and the tokens that run
    sizes = (1, 256, 257, 513, 4096, 4097, 16_384, 16_385)
    rooms, tiles = zip(*(capacity(n) for n in sizes), strict=True)
    assert rooms == (512, 512, 512, 4096, 4096, 16_384, 16_384, 32_768)
    assert tiles == (256, 256, 256, 512, 512, 1024, 1024, 1024)
    computed = [computed_tokens(n, by_tiles=True) for n in sizes]
    assert computed == [256, 256, 512, 1024, 4096, 5120, 16_384, 17_408]
    assert [program_sizes(n, by_tiles=True) for n in (1, 600, 5000)] == [
        [512],
        [512, 4096],
        [512, 4096, 16_384],
    ]
    # more labels than a program reads are read of hidden states
    assert program_key(12_000, 500, 64, by_tiles=True) == ProgramKey(16_384, 16_384, 64, 0, 1024)
    assert max(LABELS) < VOCAB_SIZE
