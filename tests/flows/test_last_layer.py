"""The last layer only where it is read: which rows run through it, the same scores and pages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from helpers import (
    FAMILIES,
    LABELS,
    SMALL,
    engine_of,
    lease_of,
    one_by_one,
    random_decoder,
    random_ids,
    random_qwen3,
    spread_scores,
)
from packscore import MultiItemScorer, patch_model, program_of
from packscore.model import last_layer
from packscore.programs import traced_model, traced_ops
from packscore.programs.head import in_steps
from packscore.torch_engine.pages import KvPages
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

PREFIX = random_ids(50, seed=1)
ITEMS = [random_ids(n, seed=n) for n in (5, 30, 1, 0, 9, 33)]
NUM_TOKENS = len(PREFIX) + sum(map(len, ITEMS))
# of a product its rows, in the last layer and in the one before it
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def decoder_of(family: str) -> PreTrainedModel:
    eager: Any = {"head_dim": 16, "attn_implementation": "eager"}
    if family == "mistral":
        return spread_scores(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)))
    if family == "gemma2":
        return spread_scores(Gemma2ForCausalLM(Gemma2Config(**SMALL, **eager, sliding_window=32)))
    if family == "gemma3":
        config = Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=32)
        return spread_scores(Gemma3ForCausalLM(config))
    if family == "gpt_oss":
        options = {**eager, "num_local_experts": 4, "sliding_window": 32}
        return spread_scores(GptOssForCausalLM(GptOssConfig(**SMALL, **options)))
    return random_decoder(family)


class Products(TorchDispatchMode):
    """Counts rows of the products with some weights, of which nothing in the model tells."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        layers = model.get_decoder().layers
        self.names = {
            getattr(layer.self_attn, name).weight.data_ptr(): (at, name)
            for at, layer in ((0, layers[0]), (-1, layers[-1]))
            for name in PRODUCTS
        }
        self.rows = dict.fromkeys(self.names.values(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            for weight in (x for x in args if isinstance(x, torch.Tensor)):
                if (name := self.names.get(weight.data_ptr())) is not None:
                    self.rows[name] += out.numel() // out.shape[-1]
        return out


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_every_family_runs_it_for_the_scored_rows(family: str) -> None:
    model = decoder_of(family)
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    for flow in ("packed", "extend", "plain"):
        if flow == "extend" and not engine_of(scorer).keeps_pages:
            continue
        if flow == "extend":
            scorer.prefix(PREFIX).release()
        with Products(model) as seen:
            found = scorer.score(PREFIX, ITEMS, flow=flow, return_usage=True)
        assert np.abs(np.array(found.scores) - expected.numpy()).max() <= PROBABILITY_MAX_FLOAT32
        usage = found.usage
        assert usage.last_layer_tokens == len(ITEMS)
        assert {seen.rows[0, name] for name in PRODUCTS} == {usage.computed_tokens}
        assert seen.rows[-1, "q_proj"] == seen.rows[-1, "o_proj"] == len(ITEMS)
        # those of the rows once more, by the layer itself
        keys = usage.computed_tokens + len(ITEMS)
        assert seen.rows[-1, "k_proj"] == seen.rows[-1, "v_proj"] == keys


def test_a_prefix_alone_runs_no_row_through_it() -> None:
    model = random_qwen3()
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    with Products(model) as seen:
        scorer.prefix(PREFIX).release()
    assert seen.rows[0, "q_proj"] == seen.rows[-1, "k_proj"] == len(PREFIX)
    assert seen.rows[-1, "q_proj"] == seen.rows[-1, "o_proj"] == 0


@pytest.mark.parametrize(("count", "computed"), [(0, 0), (1, 4), (5, 8), (16, 16)])
def test_a_program_computes_the_steps_that_hold_rows(count: int, computed: int) -> None:
    """How many turns its loop takes is data; one that reads nothing takes none."""
    run = jax.jit(lambda rows, count: in_steps(lambda x, _: x + 1, rows, count, 4))
    found = run(jnp.zeros(16, jnp.int32), jnp.int32(count))
    assert found.tolist() == [1] * computed + [0] * (16 - computed)


def test_more_rows_than_pay_run_it_whole() -> None:
    model = random_qwen3()
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    items = [[k] for k in range(20)]
    usage = scorer.score([7], items, return_usage=True).usage
    assert usage.last_layer_tokens == usage.computed_tokens == 21


def pages_of(scorer: MultiItemScorer) -> np.ndarray:
    """What the pages hold of PREFIX, of every layer: [layers, kv heads, 2, tokens, head_dim]."""
    engine = engine_of(scorer)
    with scorer.prefix(PREFIX) as held:
        (page,) = lease_of(held).pages.tolist()
        if isinstance(engine._pages, KvPages):
            slots = torch.arange(len(PREFIX)) + page * engine._pages.page_size
            found = torch.stack([engine._pages._layers[i][:, :, slots] for i in (0, 1)])
            return found.transpose(1, 2).numpy()
        array = np.asarray(engine._pages._array)
        return array[[page, page + engine.pool.num_pages]][:, :, :, : len(PREFIX)]


def whole_reader(self: Any, read: Any, *args: Any, **_: Any) -> Any:
    return read(self, *args, whole=True)


@pytest.mark.parametrize("path", ["torch", "xla", pytest.param("kernels", marks=pytest.mark.long)])
def test_pages_are_those_of_the_whole_layer_bit_by_bit(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for is_whole in (False, True):
        sizes: Any = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 128}
        model = random_qwen3(**(sizes if path == "kernels" else {}), intermediate_size=512)
        patch_model(model, device=None if path == "torch" else "jax")
        scorer = MultiItemScorer(model, label_token_ids=LABELS)
        engine = engine_of(scorer)
        if path == "torch":
            engine.whole_last = "this test" if is_whole else None
        else:
            program: Any = program_of(model)
            kind = "pallas_interpret" if path == "kernels" else "xla"
            program._executables.implementation = kind
            if is_whole:
                read = traced_model.TracedModel._reader
                whole = functools.partialmethod(whole_reader, read)
                monkeypatch.setattr(traced_model.TracedModel, "_reader", whole)
        scores = scorer.score(PREFIX, ITEMS)
        found.append((pages_of(scorer), np.array(scores)))
    (few, few_scores), (whole, whole_scores) = found
    assert np.array_equal(few, whole)
    assert few.any(axis=(1, 2, 3, 4)).all()
    assert np.abs(few_scores - whole_scores).max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("device", [None, "jax"])
def test_other_rows_would_be_seen(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the layer runs for the token before each that is read."""
    own = last_layer.at_rows

    def before(layer: Any, rows: Any, *args: Any, **keywords: Any) -> Any:
        return own(layer, (rows - 1).clip(0), *args, **keywords)

    monkeypatch.setattr(last_layer, "at_rows", before)
    monkeypatch.setattr(traced_ops, "at_rows", before)
    model = random_qwen3()
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    scorer = MultiItemScorer(patch_model(model, device=device), label_token_ids=LABELS)
    error = np.abs(np.array(scorer.score(PREFIX, ITEMS)) - expected.numpy()).max(axis=1)
    assert error.min() > 100 * PROBABILITY_MAX_FLOAT32


class OwnNorm(nn.Module):
    """A norm that somebody brought."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x)


def hook(model: Any) -> str:
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: None)
    return "a hook on the Qwen3MLP"


def hook_behind(model: Any) -> str:
    model.model.norm.register_forward_hook(lambda *_: None)
    return "a hook on the Qwen3RMSNorm"


def subclass(model: Any) -> str:
    layer = model.model.layers[-1]
    layer.__class__ = type("MyLayer", (type(layer),), {"__module__": "mine"})
    return "the MyLayer of mine"


def compiled(model: Any) -> str:
    model.model.layers[-1].mlp.compile(backend="eager")
    return "a compiled Qwen3MLP"


def outputs(model: Any) -> str:
    model.config.output_hidden_states = True
    return "output_hidden_states=True"


def fewer(model: Any) -> str:
    model.config.num_hidden_layers = 1
    return "num_hidden_layers=1 of 2 layers"


@pytest.mark.parametrize("change", [hook, hook_behind, subclass, compiled, outputs, fewer])
@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_what_is_not_plain_runs_whole_and_says_so(change: Any, mask_impl: Any) -> None:
    model = random_qwen3()
    why = change(model)
    expected = one_by_one(model, PREFIX, ITEMS, LABELS)
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS, mask_impl=mask_impl)
    found = scorer.score(PREFIX, ITEMS, return_usage=True)
    assert np.abs(np.array(found.scores) - expected.numpy()).max() <= PROBABILITY_MAX_FLOAT32
    assert found.usage.last_layer_tokens == found.usage.computed_tokens == NUM_TOKENS
    assert f"last layer: of all tokens, because of {why}" in str(scorer.explain(PREFIX, ITEMS))


def test_explain_says_that_it_runs_where_it_is_read() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS)
    assert "last layer: where it is read" in str(scorer.explain(PREFIX, ITEMS))
    # a hook on another layer sees what it sees anyway
    engine_of(scorer)._model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "last layer: where it is read" in str(scorer.explain(PREFIX, ITEMS))
