"""A model that is on torchax: scored from its own arrays, and called with the op in its layers."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import pytest
import torch
from torchax import interop
from transformers import MistralConfig, MistralForCausalLM

from helpers import (
    LABELS,
    SMALL,
    one_by_one,
    random_classifier,
    random_decoder,
    random_ids,
    random_qwen3,
    spread_scores,
)
from packscore import (
    InputError,
    MultiItemScorer,
    UnsupportedModelError,
    patch_model,
    program_of,
    unpatch_model,
)
from packscore.model.class_head import DRAWN
from packscore.programs import row_attention, stacked_rows
from packscore.programs.stacked_rows import StackedRow
from packscore.programs.traced_ops import torchax_environment
from packscore_kernels import segment_paged_attention
from processes import run_fresh
from tolerances import (
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)

pytestmark = [
    pytest.mark.usefixtures("quick_programs"),
    # torch takes torchax's tensors for meta's, and copies to them all the same
    pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter"),
]

PREFIX, ITEMS = random_ids(20, seed=1), [random_ids(n, seed=n) for n in (3, 9)]
COLUMNS = 30
IDS = torch.tensor([random_ids(COLUMNS, seed=n) for n in (1, 2, 3)])
ALL = torch.ones_like(IDS)
LEFT = torch.tensor([[1] * 30, [0] * 5 + [1] * 25, [0] * 29 + [1]])
HOLES = ALL.clone()
HOLES[1, 3:6] = HOLES[2, 0] = HOLES[2, 11] = HOLES[2, 29] = 0
MASKS = {"none": None, "ones": ALL, "left": LEFT, "right": LEFT.flip(1), "holes": HOLES}


def moved(model: Any) -> Any:
    with torchax_environment():
        return model.to("jax")


def both(model: Any) -> tuple[Any, Any]:
    """A patched model on torchax and the same in torch, not patched."""
    reference = copy.deepcopy(model)
    return patch_model(moved(model)), reference


def scores(model: Any) -> torch.Tensor:
    return torch.tensor(MultiItemScorer(model, label_token_ids=LABELS).score(PREFIX, ITEMS))


def assert_scores_of(model: Any, reference: Any) -> None:
    error = (scores(model) - one_by_one(reference, PREFIX, ITEMS, LABELS)).abs()
    assert error.max() <= PROBABILITY_MAX_FLOAT32


def kinds(model: Any) -> set[str]:
    return {type(tensor).__name__ for tensor in model.model.layers.parameters()}


def assert_close(found: Any, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Probabilities of two logits, where there is no padding."""
    real = (ALL if mask is None else mask).bool()
    error = (found.torch().softmax(-1) - expected.softmax(-1)).abs()[real]
    assert error.max() <= PROBABILITY_MAX_FLOAT32


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return both(random_qwen3(tied=False))


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often layers attended through the op, and how often jax traced the op for them."""
    count: Counter[str] = Counter()
    attend = row_attention._through_op
    attend.clear_cache()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(row_attention, "_through_op", counted("layers", attend))
    traced = counted("traced", segment_paged_attention)
    monkeypatch.setattr(row_attention, "segment_paged_attention", traced)
    return count


def test_scores_are_one_by_ones(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no score reads a layer's tensor, which would copy it."""
    model, reference = pair

    def read(stack: jax.Array, row: int) -> jax.Array:
        raise AssertionError("a row was read")

    monkeypatch.setattr(stacked_rows, "_row_of", read)
    assert_scores_of(model, reference)
    assert kinds(model) == {"StackedRow"}
    assert {(x.dtype, x.ndim, x.device.type) for x in model.model.layers.parameters()} == {
        (torch.float32, 1, "jax"),
        (torch.float32, 2, "jax"),
    }


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2", "llama"])
def test_scores_of_every_family(family: str) -> None:
    assert_scores_of(*both(random_decoder(family)))


def test_a_tied_model_is_tied_no_more_and_scored_with_its_own_head() -> None:
    """torchax moves each parameter by itself: the head may learn what the embedding does not."""
    model, reference = both(random_qwen3(num_layers=1))
    with torchax_environment(), torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight.detach() * 0.5)
    assert_scores_of(model, reference)


@pytest.mark.long
def test_a_classifier_and_bfloat16() -> None:
    model = random_classifier()
    expected = torch.tensor(MultiItemScorer(patch_model(copy.deepcopy(model))).score(PREFIX, ITEMS))
    found = torch.tensor(MultiItemScorer(patch_model(moved(model))).score(PREFIX, ITEMS))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    half, reference = both(random_qwen3().bfloat16())
    error = (scores(half) - one_by_one(reference, PREFIX, ITEMS, LABELS)).abs()
    assert error.max() <= PROBABILITY_MAX_BFLOAT16
    assert error.mean() <= PROBABILITY_MEAN_BFLOAT16


# Bytes


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_one_kind_of_weight_exists_twice_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()  # of what other tests left, `live_bytes` need not look at everything each time
    moved(random_qwen3(num_layers=1))  # some versions keep a constant or two of their first model
    others = live_bytes()
    model = moved(random_qwen3(num_layers=4, tied=False))
    of_model = live_bytes() - others
    own = {name: tensor.jax() for name, tensor in model.named_parameters() if "layers" not in name}
    largest = 4 * max(p.jax().nbytes for p in model.model.layers[0].parameters())
    stack, peaks = stacked_rows._stack, []
    temporaries: dict[int, int] = {}

    def watched(*rows: jax.Array) -> jax.Array:
        stacked = stack(*rows)
        peaks.append(live_bytes() - others)
        if stacked.nbytes == largest and largest not in temporaries:
            memory = stack.lower(*rows).compile().memory_analysis()
            temporaries[largest] = memory.temp_size_in_bytes
        return stacked

    monkeypatch.setattr(stacked_rows, "_stack", watched)
    with torchax_environment():  # where the meta device, on which a skeleton is made, is jax's too
        patch_model(model)
    kinds_of_weight = len(list(model.model.layers[0].parameters()))
    assert len(peaks) == kinds_of_weight
    assert set(temporaries.values()) == {0}
    assert of_model < max(peaks) <= of_model + largest
    # a slice that was read is gone when nobody holds it
    torch_sum = sum(float(p.jax().sum()) for p in model.model.layers.parameters())
    assert torch_sum != 0
    assert live_bytes() - others == of_model
    program: Any = program_of(model)
    held = {id(array) for array in jax.tree.leaves(program._weights.arrays)}
    assert {id(array) for array in own.values()} <= held
    # and scoring adds what it keeps for prefixes alone: no second copy of a weight
    program.refresh(force=True)
    assert len(peaks) == kinds_of_weight
    assert live_bytes() - others == of_model


# Ordinary calls


@pytest.mark.parametrize("mask", MASKS)
def test_ordinary_calls_run_the_op(
    pair: tuple[Any, Any], op_calls: Counter[str], mask: str
) -> None:
    """Also where torchax's own attention gives NaN: at padding before a row's first token."""
    model, reference = pair
    expected = reference(IDS, attention_mask=MASKS[mask]).logits.detach()
    with torchax_environment(), torch.no_grad():
        inputs = {
            name: x.to("jax") for name, x in [("attention_mask", MASKS[mask])] if x is not None
        }
        found = model(IDS.to("jax"), **inputs).logits
    assert_close(found, expected, MASKS[mask])
    assert op_calls == {"layers": 2, "traced": 1}
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, StackedRow)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_jitted_calls_run_the_op(pair: tuple[Any, Any], op_calls: Counter[str], mask: str) -> None:
    model, reference = pair
    expected = reference(IDS, attention_mask=MASKS[mask]).logits.detach()

    def forward(parameters: Any, ids: Any, mask: Any) -> Any:
        keywords = {"attention_mask": mask, "use_cache": False}
        return torch.func.functional_call(model, parameters, (ids,), keywords).logits

    with torchax_environment():
        given = None if MASKS[mask] is None else MASKS[mask].to("jax")
        arguments = dict(model.named_parameters()), IDS.to("jax"), given
        assert_close(interop.jax_jit(forward)(*arguments), expected, MASKS[mask])
        assert op_calls == {"layers": 2, "traced": 1}
        jaxpr = jax.make_jaxpr(interop.jax_view(forward))(*interop.jax_view(arguments))
    assert str(jaxpr).count("name=_through_op") == 2


class Logits(torch.nn.Module):
    """A model's output is nothing that jax knows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


def test_a_jittable_module_runs_the_op(op_calls: Counter[str]) -> None:
    """Also one that is older than the patch: parameters stay the objects they are."""
    model = random_qwen3(num_layers=1)
    expected = model(IDS).logits
    jitted = interop.JittableModule(Logits(moved(model)))
    parameters = dict(model.named_parameters())
    patch_model(model)
    assert all(parameters[name] is tensor for name, tensor in model.named_parameters())
    with torchax_environment():
        found = jitted(IDS.to("jax"))
    assert_close(found, expected.detach())
    assert op_calls["layers"] == 1


FOUR = (
    torch.ones(3, 1, COLUMNS, COLUMNS, dtype=torch.bool).tril(-1).logical_or(torch.eye(COLUMNS) > 0)
)
FOUR[:, :, :, 2] = FOUR[:, :, :, 2] & (torch.arange(COLUMNS) == 2)
TWICE = torch.cat([torch.arange(10), torch.arange(20)])[None].expand(3, -1)
OWN: dict[str, dict[str, Any]] = {
    "packed-positions": {"position_ids": TWICE},
    "4-D-mask": {"attention_mask": FOUR},
    "not-causal": {"is_causal": False},
}


@pytest.mark.parametrize("name", OWN)
def test_more_than_order_and_padding_is_the_models_own_attention(
    pair: tuple[Any, Any], op_calls: Counter[str], name: str
) -> None:
    model, reference = pair
    expected = reference(IDS, **OWN[name]).logits.detach()
    assert (expected - reference(IDS).logits).abs().max() > 1e-2
    with torchax_environment(), torch.no_grad():
        given = {k: v.to("jax") if isinstance(v, torch.Tensor) else v for k, v in OWN[name].items()}
        found = model(IDS.to("jax"), **given).logits
    assert_close(found, expected)
    assert not op_calls


def test_a_window_is_the_models_own_attention(op_calls: Counter[str]) -> None:
    config = MistralConfig(**{**SMALL, "num_hidden_layers": 1, "sliding_window": 8})
    model, reference = both(spread_scores(MistralForCausalLM(config), seed=0))
    short, expected = IDS[:, :7], reference(IDS).logits.detach()
    with torchax_environment(), torch.no_grad():
        assert_close(model(IDS.to("jax")).logits, expected)
        assert not op_calls
        found = model(short.to("jax")).logits
    assert_close(found, expected[:, :7], ALL[:, :7])
    assert op_calls["layers"] == 1


def test_a_token_behind_a_cache_is_the_models_own_attention(
    pair: tuple[Any, Any], op_calls: Counter[str]
) -> None:
    model, reference = pair
    expected = reference(IDS).logits[:, -1:].detach()
    with torchax_environment(), torch.no_grad():
        ids = IDS.to("jax")
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        assert op_calls["layers"] == 2
        found = model(ids[:, -1:], past_key_values=cache).logits
    assert op_calls["layers"] == 2
    assert_close(found, expected, ALL[:, -1:])


def test_gradients_are_ordinary_attentions() -> None:
    """In eval mode through the op's place; in train mode the model's own attention runs."""
    model, reference = both(random_qwen3(num_layers=1, tied=False))
    weights = LEFT.float()

    # in one program, because a thousand of one operation each take longer
    def loss(parameters: Any, ids: Any, mask: Any, weights: Any) -> Any:
        out = torch.func.functional_call(model, parameters, (ids,), {"attention_mask": mask})
        return (out.logits.log_softmax(-1)[..., 3] * weights).sum()

    logits = reference(IDS, attention_mask=LEFT).logits
    expected = (logits.log_softmax(-1)[..., 3] * weights).sum()
    expected.backward()
    with torchax_environment():
        arguments = [x.to("jax") for x in (IDS, LEFT, weights)]
        gradients = interop.jax_jit(interop.jax_value_and_grad(loss))
        found = gradients(dict(model.named_parameters()), *arguments)
    largest = max(p.grad.abs().max() for p in reference.parameters())
    for name, parameter in reference.named_parameters():
        error = (found[1][name].torch() - parameter.grad).abs().max()
        # sums over 56 tokens in another order, of gradients that pass some dozen products
        assert error <= 1e-5 * largest, name


@pytest.mark.long
def test_in_train_mode_the_models_own_attention_runs(op_calls: Counter[str]) -> None:
    model, reference = both(random_qwen3(num_layers=1))
    model.train()
    with torchax_environment():
        found = model(IDS.to("jax")).logits
    assert_close(found, reference(IDS).logits.detach())
    assert not op_calls
    with pytest.raises(InputError, match="train mode"):
        scores(model)


# Changes


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)


def head_in_place(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
        model.lm_head.weight[:9].mul_(2)


def other_state(model: Any) -> None:
    model.load_state_dict(random_qwen3(tied=False, seed=5).state_dict())


def other_module(model: Any) -> None:
    device = model.model.norm.weight.device
    model.model.layers[0].input_layernorm = random_qwen3(seed=6).model.layers[0].input_layernorm
    with torch.no_grad():
        model.model.layers[0].input_layernorm.to(device).weight.mul_(0.5)


def other_data(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.detach() * 0.5


def fewer_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


CHANGES = [in_place, head_in_place, other_state, other_module, other_data, fewer_layers]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_the_next_score_is_the_changed_models(change: Callable[[Any], None]) -> None:
    model, reference = both(random_qwen3(tied=False))
    before = scores(model)
    with torchax_environment():
        change(model)
    change(reference)
    assert_scores_of(model, reference)
    assert (scores(model) - before).abs().max() > 1e-3
    assert kinds(model) == {"StackedRow"}


def test_a_model_that_moves_is_followed() -> None:
    """From the CPU to torchax and back, with the programs of either."""
    model = random_qwen3(num_layers=1)
    reference = copy.deepcopy(model)
    patch_model(model, device="jax")
    assert_scores_of(model, reference)
    moved(model)
    assert_scores_of(model, reference)
    assert kinds(model) == {"StackedRow"}
    with torchax_environment():
        state = {name: tensor.torch() for name, tensor in model.state_dict().items()}
        model.to("cpu")
    assert all(torch.equal(state[name], x) for name, x in reference.state_dict().items())
    assert kinds(model) == {"Parameter"}
    assert_scores_of(model, reference)
    unpatch_model(model)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


# Refusals


def test_what_cannot_be_followed_is_refused(pair: tuple[Any, Any]) -> None:
    model, reference = pair
    own = model.lm_head.weight
    drawn = torch.randn(320, 64)
    for other, told in (
        (drawn, r"'lm_head.weight' is on cpu; .* move all of it to torchax"),
        (drawn.half(), r"'lm_head.weight' is torch.float16"),
    ):
        is_half = other.dtype == torch.float16
        with torchax_environment():
            model.lm_head.weight = torch.nn.Parameter(other.to("jax") if is_half else other)
        with pytest.raises(UnsupportedModelError, match=told):
            scores(model)
    model.lm_head.weight = own
    assert_scores_of(model, reference)


def test_a_name_of_another_place_is_refused(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with pytest.raises(InputError, match=r"device='tpu': the model is on torchax, on .*cpu.*0"):
        patch_model(model, device="tpu")
    with pytest.raises(InputError, match="device='cuda' must be"):
        patch_model(model, device="cuda")
    program = program_of(model)
    assert program is program_of(patch_model(model, device="jax"))
    assert program is program_of(patch_model(model, device="auto"))


def test_without_programs_torchs_own_engines_do_not_run_it() -> None:
    model = patch_model(random_qwen3(num_layers=1))
    scorers = [
        MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask)
        for mask in ("segment", "dense")
    ]
    moved(model)
    for scorer in scorers:
        with pytest.raises(UnsupportedModelError, match=r"on torchax.*call packscore.patch_model"):
            scorer.score(PREFIX, ITEMS)


class OfTorchXla(torch.nn.Parameter):
    @property
    def device(self) -> torch.device:
        return torch.device("xla:0")


def test_tensors_of_torch_xla_are_refused() -> None:
    model = random_qwen3(num_layers=1)
    model.model.norm.weight.__class__ = OfTorchXla
    with pytest.raises(UnsupportedModelError, match=r"'model.norm.weight' is on xla:0.*torch_xla"):
        patch_model(model)


def test_untrained_heads_are_known_on_torchax_too() -> None:
    model = random_qwen3(num_layers=1, tied=False)
    with torch.no_grad():
        model.lm_head.weight[LABELS[1]] = 0
    with pytest.raises(UnsupportedModelError, match="never trained"):
        scores(patch_model(moved(model)))
    classifier = random_classifier(num_hidden_layers=1)
    classifier.__dict__[DRAWN] = classifier.score.weight.detach().clone()
    with pytest.raises(UnsupportedModelError, match="is random"):
        MultiItemScorer(patch_model(moved(classifier)))


# In a process of its own


def test_a_process_that_is_all_torchax() -> None:
    """`enable_globally` sends everything to jax, and the suite's own process must stay torch's."""
    run_fresh(
        """
        import torch, torchax
        from transformers import AutoModelForCausalLM
        from packscore import MultiItemScorer, patch_model, shipped_model_path

        def load():
            path = shipped_model_path()
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

        def one_by_one(model):
            rows = [model(torch.tensor([query + item])).logits[0, -1] for item in items]
            return torch.stack(rows).detach()[:, labels].softmax(-1)

        query, items, labels = [7, 8, 9], [[5, 6], [4]], [1, 2]
        reference = load()
        expected = one_by_one(reference)
        reference.model.norm.weight.data *= 2
        changed = one_by_one(reference)
        assert (expected - changed).abs().max() > 1e-2

        torchax.enable_globally()
        model = patch_model(load().to("jax"))
        scorer = MultiItemScorer(model, label_token_ids=labels)
        found = torch.tensor(scorer.score(query, items, apply_softmax=True))
        assert (found - expected).abs().max() <= 1e-5
        ids = torch.tensor([query + items[0]], device="jax")
        logits = model(ids).logits.torch()[0, -1]
        assert (logits[labels].softmax(-1) - expected[0]).abs().max() <= 1e-5
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        found = torch.tensor(scorer.score(query, items, apply_softmax=True))
        assert (found - changed).abs().max() <= 1e-5
        """
    )
