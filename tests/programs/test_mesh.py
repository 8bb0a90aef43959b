"""One model over several chips, which eight devices of a CPU stand for, against eager torch."""

from __future__ import annotations

import copy
import re
from typing import Any

import jax
import numpy as np
import pytest
import torch

from helpers import LABELS, one_by_one, random_classifier, random_decoder, random_ids
from packscore import Choice, InputError, MultiItemScorer, Noul, patch_model, unpatch_model
from packscore.calls import program_of
from packscore.model.sizes import ModelSizes
from packscore.programs.mesh import axis as mesh_axis
from packscore.programs.mesh.choice import HBM_SHARE, fitting_chips, resolve_mesh
from packscore.programs.mesh.cuts import Cut, Cuts, check_cut
from packscore.programs.sizes import ProgramKey
from packscore.shipped import shipped_model_path
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

EIGHT = {"num_attention_heads": 8, "head_dim": 16}
PREFIXES = [random_ids(n, seed=n) for n in (150, 37, 90)]
ITEMS = [[random_ids(n, seed=n) for n in lengths] for lengths in ((3, 40, 1), (17,), (9, 9, 30))]


def decoder(family: str, kv_heads: int, **options: Any) -> Any:
    """A model of eight heads that eight chips can share."""
    if family == "qwen3":
        return random_decoder("qwen3", num_heads=8, num_kv_heads=kv_heads, **options)
    experts = {"num_experts": 8} if family == "qwen3_moe" else {}
    return random_decoder(
        family, **{**EIGHT, "num_key_value_heads": kv_heads, **experts, **options}
    )


def on_mesh(model: Any, data: int, chips: int, **options: Any) -> MultiItemScorer:
    model = patch_model(copy.deepcopy(model), device="jax", mesh={"data": data, "model": chips})
    return MultiItemScorer(model, label_token_ids=LABELS, **options)


def worst(scorer: MultiItemScorer, model: Any) -> float:
    """The largest error over several queries in a launch, cold and then from pages."""
    wanted = [one_by_one(model, *each, LABELS) for each in zip(PREFIXES, ITEMS, strict=True)]
    found = 0.0
    for _ in range(2):
        requests = list(zip(PREFIXES, ITEMS, strict=True))
        for got, want in zip(scorer.score_many(requests), wanted, strict=True):
            found = max(found, float((torch.tensor(got) - want).abs().max()))
    return found


# (family, kv heads, copies, chips of each): of each family and each number of kv heads some
MESHES = [
    ("qwen3", 8, 1, 8),
    ("qwen3", 2, 4, 2),
    ("llama", 4, 1, 8),
    ("qwen3_moe", 2, 2, 4),
]
ALL_MESHES = [
    pytest.param(*case, marks=[] if case in MESHES else pytest.mark.long)
    for case in (
        (family, kv_heads, *mesh)
        for family in ("qwen3", "qwen3_moe", "llama")
        for kv_heads in (8, 4, 2)
        for mesh in ((1, 1), (8, 1), (4, 2), (2, 4), (1, 8))
    )
]


@pytest.mark.parametrize(("family", "kv_heads", "data", "chips"), ALL_MESHES)
def test_scores_on_a_mesh_equal_one_by_one(
    family: str, kv_heads: int, data: int, chips: int
) -> None:
    model = decoder(family, kv_heads)
    scorer = on_mesh(model, data, chips)
    assert worst(scorer, model) <= PROBABILITY_MAX_FLOAT32
    program = program_of(scorer.model)
    assert [len(one) for one in program.copies] == [chips] * data
    assert len({chip for one in program.copies for chip in one.devices}) == data * chips


def test_over_the_vocabulary_with_rows_that_no_chip_number_divides() -> None:
    """320 + 3 rows over 4 chips: the last has 80, and one of zeros that is no row of the head."""
    model = decoder("llama", 2, vocab_size=323, tie_word_embeddings=False)
    scorer = on_mesh(model, 1, 4)
    prefix, items = PREFIXES[1], [[1, 2], [322, 7], [0]]
    labels = [322, 0, 243, 242]
    for apply_softmax in (False, True):
        want = one_by_one(model, prefix, items, labels, apply_softmax=apply_softmax)
        options: dict[str, Any] = {"label_token_ids": labels, "apply_softmax": apply_softmax}
        got = torch.tensor(scorer.score(prefix, items, **options))
        assert (got - want).abs().max() <= PROBABILITY_MAX_FLOAT32
    many = list(range(0, 322, 4))  # read of hidden states, by the programs of the head
    want = one_by_one(model, prefix, items, many)
    got = torch.tensor(scorer.score(prefix, items, label_token_ids=many))
    assert (got - want).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_ordinary_calls_classifiers_and_new_weights_on_a_mesh() -> None:
    model = decoder("llama", 2, vocab_size=323, tie_word_embeddings=True)
    reference = copy.deepcopy(model)
    patch_model(model, device="jax", mesh={"model": 4})
    ids = torch.tensor([PREFIXES[1]])
    with torch.no_grad():
        got, want = model(input_ids=ids).logits, reference(input_ids=ids).logits
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    scorer.score(PREFIXES[0], ITEMS[0])
    for changed in (model, reference):
        with torch.no_grad():
            changed.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    assert worst(scorer, reference) <= PROBABILITY_MAX_FLOAT32
    assert program_of(unpatch_model(model)) is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)

    classifier = random_classifier(num_labels=3, **{**EIGHT, "num_key_value_heads": 2})
    want = MultiItemScorer(patch_model(classifier)).score(PREFIXES[0], ITEMS[0])
    patched = patch_model(copy.deepcopy(classifier), device="jax", mesh={"data": 1, "model": 4})
    got = MultiItemScorer(patched).score(PREFIXES[0], ITEMS[0])
    assert np.abs(np.array(got) - np.array(want)).max() <= PROBABILITY_MAX_FLOAT32


def test_a_dense_mask_on_a_mesh() -> None:
    model = decoder("llama", 2)
    assert worst(on_mesh(model, 1, 4, mask_impl="dense"), model) <= PROBABILITY_MAX_FLOAT32


def test_kernels_on_a_mesh_are_exact() -> None:
    """The layer that runs on a TPU, interpreted on two chips: one head of the queries on each."""
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 128}
    model = random_decoder("qwen3", **sizes, intermediate_size=512, pad_token_id=300)
    scorer = on_mesh(model, 1, 2)
    for executables in program_of(scorer.model)._of_copies:
        executables.implementation = "pallas_interpret"
    want = one_by_one(model, PREFIXES[1], ITEMS[0], LABELS)
    got = torch.tensor(scorer.score(PREFIXES[1], ITEMS[0]))
    assert (got - want).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_each_copy_computes_its_queries_and_keeps_their_pages() -> None:
    """Queries go to the copy that has their prefix; together the copies share the launches."""
    model = decoder("qwen3", 4, num_layers=1)
    scorer = on_mesh(model, 3, 2)
    program = program_of(scorer.model)
    runs: list[int] = []
    start = program.start

    def counted(*args: Any, **options: Any) -> Any:
        runs.append(args[4])
        return start(*args, **options)

    program.start = counted
    queries = [random_ids(60, seed=n) for n in range(7)]
    first = [scorer.score(query, [[1, 2], [3]], return_usage=True) for query in queries]
    assert set(runs) == {0, 1, 2}
    again = [scorer.score(query, [[4, 5]], return_usage=True) for query in queries]
    assert all(one.usage.cached_tokens == 0 for one in first)
    assert all(one.usage.computed_tokens == 2 for one in again)
    for query, one in zip(queries, first, strict=True):
        want = one_by_one(model, query, [[1, 2], [3]], LABELS)
        assert (torch.tensor(one.scores) - want).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_decisions_on_a_mesh_equal_torch() -> None:
    asked = {
        "spam": Noul("Is it spam?"),
        "kind": Choice("Which?", dict.fromkeys(["news", "offer"])),
    }
    scorer = MultiItemScorer.from_pretrained(shipped_model_path(), dtype="float32")
    found = []
    for mesh in (None, {"data": 2, "model": 2}):
        if mesh:
            patch_model(scorer.model, device="jax", mesh=mesh)
        decision = scorer.decide("Dear all, buy now.", asked)
        found.append(
            [decision.nouls["spam"].noul, *decision.choices["kind"].probabilities.values()]
        )
    assert found[0] == pytest.approx(found[1], abs=PROBABILITY_MAX_FLOAT32)


def all_reduces(program: Any) -> list[int]:
    """How many all-reduces each loop of the largest program has, the most first."""
    keys = [key for key in program._executables.by_key if type(key) is ProgramKey]
    text = program._executables.by_key[max(keys, key=lambda key: key.num_tokens)].as_text()
    computations = re.split(r"\n\n", text)
    return sorted(len(re.findall(r" all-reduce(?:-start)?\(", x)) for x in computations)[::-1]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_layer_has_two_all_reduces(family: str) -> None:
    layers = "num_layers" if family == "qwen3" else "num_hidden_layers"
    scorer = on_mesh(decoder(family, 2, **{layers: 4}), 1, 4)
    scorer.score(PREFIXES[1], ITEMS[1])
    program = program_of(scorer.model)
    # where rows are read the last layer's two, with the head's of labels and of the largest logit;
    # in the loop over the other layers two; the embedding's
    assert [count for count in all_reduces(program) if count] == [4, 2, 1]


def test_a_sum_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_axis.ModelAxis, "sum", lambda self, x: x)
    model = decoder("qwen3", 2)
    assert worst(on_mesh(model, 1, 2), model) > 100 * PROBABILITY_MAX_FLOAT32


def test_parts_are_what_chips_have() -> None:
    sizes = ModelSizes.of(decoder("qwen3", 2).config)
    cuts = Cuts(sizes, 8)
    keys = cuts.of("layers", "self_attn.k_proj.weight")
    # 2 heads of 16 rows over 8 chips: four neighbours each have the same one
    assert [keys.part(32, chip).start for chip in range(8)] == [0] * 4 + [16] * 4
    assert (keys.local((32, 64)), keys.whole((32, 64))) == ((16, 64), (128, 64))
    assert cuts.of("layers", "self_attn.o_proj.weight").spec(1) == jax.P(None, None, "model")
    assert cuts.of("layers", "input_layernorm.weight") == Cut(8)
    assert Cuts(sizes, 8, num_classes=3).of("head", "weight") == Cut(8)
    rows = cuts.of("embed_tokens", "weight")
    assert rows.part(323, 7) == slice(287, 323)
    assert (rows.local((323, 64)), rows.whole((323, 64), 0)) == ((41, 64), (328, 64))
    assert Cut(4, 0, 4).part(5, 3) == slice(5, 5)  # rows of twos: none is left for the last
    assert (sizes.cut(8).heads, sizes.cut(8).kv_heads) == (1, 1)


def mesh_of(*names: str) -> jax.sharding.Mesh:
    grid = np.array(jax.devices()[:4]).reshape([4] if len(names) == 1 else [2, 2])
    return jax.sharding.Mesh(grid, names)


@pytest.mark.parametrize(
    ("mesh", "grid"),
    [
        (None, [[0]]),
        ("auto", [[n] for n in range(8)]),
        ({"data": 3}, [[0], [1], [2]]),
        ({"model": 2}, [[0, 1]]),
        ({"model": 2, "data": 2}, [[0, 1], [2, 3]]),
        (lambda: mesh_of("data", "model"), [[0, 1], [2, 3]]),
        (lambda: mesh_of("model", "data"), [[0, 2], [1, 3]]),
        (lambda: mesh_of("model"), [[0, 1, 2, 3]]),
        (lambda: mesh_of("data"), [[0], [1], [2], [3]]),
    ],
)
def test_a_mesh_says_which_chips_have_which_copy(mesh: Any, grid: list[list[int]]) -> None:
    model, device = decoder("qwen3", 2), jax.devices()[0]
    found = resolve_mesh(mesh() if callable(mesh) else mesh, device, model)
    assert [[chip.id for chip in one.devices] for one in found] == grid


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("all", "must be None, 'auto'"),
        (8, "must be None, 'auto'"),
        ([2, 4], "must be None, 'auto'"),
        ({}, "name 'data'"),
        ({"data": 2, "tensor": 4}, "'tensor'"),
        ({"data": 0}, "at least 1"),
        ({"model": 2.0}, "at least 1"),
        ({"model": True}, "at least 1"),
        ({"data": 3, "model": 3}, "needs 9 chips, and this process has 8"),
        ({"model": 3}, r"8 heads.*one of \[1, 2\]"),
        (lambda: mesh_of("batch"), "'batch'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_anything_is_compiled(mesh: Any, said: str) -> None:
    model = decoder("qwen3", 2)
    with pytest.raises(InputError, match=said):
        patch_model(model, device="jax", mesh=mesh() if callable(mesh) else mesh)
    assert program_of(model) is None


def test_a_mesh_needs_programs() -> None:
    with pytest.raises(InputError, match="device=None"):
        patch_model(decoder("qwen3", 2), mesh="auto")
    with pytest.raises(InputError, match="mesh="):
        patch_model(decoder("qwen3", 2), device=["cpu", "cpu"], mesh={"data": 2})


@pytest.mark.parametrize(
    ("family", "options", "odd"),
    [
        ("qwen3", {"intermediate_size": 129}, "129 columns"),
        ("qwen3_moe", {"num_experts": 6}, "6 experts"),
    ],
)
def test_what_chips_cannot_share_evenly_is_named(
    family: str, options: dict[str, int], odd: str
) -> None:
    sizes = ModelSizes.of(decoder(family, 2, **options).config)
    with pytest.raises(InputError, match=odd):
        check_cut(sizes, 4)


def test_auto_takes_the_fewest_chips_that_hold_the_model() -> None:
    """8B in bfloat16: one v6e, two v5e; 32B four v6e."""
    eight = ModelSizes(36, 32, 8, 128, 4096, 12_288)
    thirty = ModelSizes(64, 64, 8, 128, 5120, 25_600)
    weights = {
        sizes: 2 * (sizes.all_weights + 2 * 151_936 * sizes.hidden) for sizes in (eight, thirty)
    }

    def chips(sizes: ModelSizes, gib: int) -> int:
        return fitting_chips(sizes, weights[sizes], 2, 8, gib * 2**30)

    assert (chips(eight, 32), chips(eight, 16), chips(thirty, 32)) == (1, 2, 4)
    with pytest.raises(InputError, match="do not hold the model"):
        chips(thirty, 4)
    assert fitting_chips(thirty, weights[thirty], 2, 8, None) == 1
    assert 0 < HBM_SHARE < 1
