"""A patched model does everything it did, and undoing leaves nothing behind."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    pipeline,
)

from helpers import FAMILIES, FrozenCase, one_by_one, random_decoder, random_ids, random_qwen3
from packscore import (
    InputTypeError,
    MultiItemScorer,
    NotPatchedError,
    UnsupportedModelError,
    is_patched,
    patch_model,
    patched,
    shipped_model_path,
    unpatch_model,
    verify_parity,
)
from tolerances import PROBABILITY_MAX_FLOAT32

IDS = torch.arange(24).view(2, 12)
PADDED = torch.tensor([[0] * 4 + [1] * 8, [1] * 12])


@torch.no_grad()
def plain_outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """What users do with a model that is not about scoring."""
    generated = model.generate(
        IDS, attention_mask=PADDED, max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    embeds = model.get_input_embeddings()(IDS)
    return [
        model(IDS).logits,
        model(IDS, attention_mask=PADDED).logits,
        model(inputs_embeds=embeds, use_cache=False).logits,
        generated,
    ]


def assert_same(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    for expected, found in zip(before, after, strict=True):
        assert torch.equal(expected, found)


def assert_scores(
    model: PreTrainedModel, reference: PreTrainedModel, case: FrozenCase
) -> torch.Tensor:
    """Packed scores of `model` over two labels are those of `reference`; returns them."""
    scores = torch.tensor(
        MultiItemScorer(model).score(
            case.prefix, case.items, label_token_ids=case.labels, apply_softmax=True
        )
    )
    expected = one_by_one(reference, case.prefix, case.items, case.labels, apply_softmax=True)
    assert (scores - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_calls_are_bit_identical_before_during_and_after(family: str, attention: str) -> None:
    model = random_decoder(family)
    model.set_attn_implementation(attention)
    before = plain_outputs(model)
    assert patch_model(model) is model
    assert is_patched(model)
    assert_same(before, plain_outputs(model))
    MultiItemScorer(model).score([1, 2, 3], [[4], [5, 6]], label_token_ids=[7, 8])
    assert_same(before, plain_outputs(model))
    assert unpatch_model(model) is model
    assert not is_patched(model)
    assert model.config._attn_implementation == attention
    assert_same(before, plain_outputs(model))


def test_patching_twice_and_undoing_twice_change_nothing(fresh: PreTrainedModel) -> None:
    patch_model(patch_model(fresh))
    assert is_patched(fresh)
    unpatch_model(unpatch_model(fresh))
    assert fresh.config._attn_implementation == "sdpa"


def test_patched_leaves_the_model_as_found(fresh: PreTrainedModel) -> None:
    with patched(fresh) as inside:
        assert inside is fresh
        assert is_patched(fresh)
    assert not is_patched(fresh)
    with pytest.raises(KeyError), patched(fresh):
        raise KeyError
    assert not is_patched(fresh)
    patch_model(fresh)
    with patched(fresh):
        pass
    assert is_patched(fresh)


def test_only_this_instance_changes() -> None:
    config = Qwen3Config(**random_qwen3().config.to_dict())
    one, other = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config)
    assert one.config is other.config
    patch_model(one)
    assert is_patched(one)
    assert not is_patched(other)
    assert one.config is other.config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_configuration_is_the_models_own(attention: str, tmp_path: Path) -> None:
    """Whoever reads there which attention serves ordinary calls finds a name that it knows."""
    model = random_qwen3()
    model.set_attn_implementation(attention)
    config, layer = model.config, model.model.layers[0].self_attn
    patch_model(model)
    assert model.config is config
    assert config._attn_implementation == attention
    assert layer.config.hidden_size == config.hidden_size
    assert not is_patched(AutoModelForCausalLM.from_config(config))
    if attention == "eager":
        config.output_attentions = True
        model.save_pretrained(tmp_path)
        assert len(model(IDS).attentions) == config.num_hidden_layers
    unpatch_model(model)
    assert layer.config is config


def test_an_attention_that_is_set_later_serves_ordinary_calls() -> None:
    model, reference = patch_model(random_qwen3()), random_qwen3()
    scorer = MultiItemScorer(model, label_token_ids=[7, 8])
    request: Any = {"query": [1, 2, 3], "items": [[4], [5, 6]], "flow": "packed"}
    scores = scorer.score(**request)
    for attention in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        reference.set_attn_implementation(attention)
        assert_same(plain_outputs(reference), plain_outputs(model))
        assert bool(model(IDS, output_attentions=True).attentions) == (attention == "eager")
        assert scorer.score(**request) == scores
    model.set_attn_implementation("flex_attention")
    assert not is_patched(model)
    with pytest.raises(NotPatchedError, match="model is not patched"):
        scorer.score(**request)
    model.set_attn_implementation("sdpa")
    assert scorer.score(**request) == scores


def test_deep_copy_is_patched_and_apart(fresh: PreTrainedModel, case: FrozenCase) -> None:
    clone = copy.deepcopy(patch_model(fresh))
    unpatch_model(fresh)
    assert is_patched(clone)
    assert_scores(clone, fresh, case)


def test_saved_model_carries_no_trace(fresh: PreTrainedModel, tmp_path: Path) -> None:
    fresh.save_pretrained(tmp_path / "before")
    patch_model(fresh).save_pretrained(tmp_path / "patched")
    for file in ("config.json", "generation_config.json"):
        texts = [(tmp_path / folder / file).read_text() for folder in ("before", "patched")]
        assert json.loads(texts[0]) == json.loads(texts[1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    assert not is_patched(loaded)
    assert torch.equal(loaded(IDS).logits, fresh(IDS).logits)


def test_text_generation_pipeline(fresh: PreTrainedModel, tokenizer: Any) -> None:
    def generate() -> list[Any]:
        run = pipeline("text-generation", model=fresh, tokenizer=copy.deepcopy(tokenizer))
        texts = ["Return the", "A list of words is"]
        found: list[Any] = run(texts, max_new_tokens=4, do_sample=False, batch_size=2)
        return found

    before = generate()
    patch_model(fresh)
    assert generate() == before


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_is_scored_with_its_adapter(
    fresh: PreTrainedModel, unpatched: PreTrainedModel, case: FrozenCase, patch_first: bool
) -> None:
    reference = copy.deepcopy(fresh)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "lm_head"],
        init_lora_weights=False,
        ensure_weight_tying=True,
    )
    torch.manual_seed(0)
    expected_model = get_peft_model(reference, config).eval()
    torch.manual_seed(0)
    model = patch_model(fresh) if patch_first else fresh
    wrapped = patch_model(get_peft_model(model, config).eval())
    assert is_patched(wrapped)
    scores = assert_scores(wrapped, expected_model, case)
    with wrapped.disable_adapter():
        plain = assert_scores(wrapped, unpatched, case)
    assert (plain - scores).abs().max() > 1e-3
    before = wrapped(IDS).logits
    assert torch.equal(unpatch_model(wrapped)(IDS).logits, before)


def test_device_map_auto(case: FrozenCase, unpatched: PreTrainedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        shipped_model_path(), dtype=torch.float32, device_map="auto"
    )
    assert_scores(patch_model(model.eval()), unpatched, case)


def test_weights_offloaded_to_disk(
    case: FrozenCase, unpatched: PreTrainedModel, tmp_path: Path
) -> None:
    """accelerate keeps such weights on the meta device between calls."""
    # the tied embedding and head share a tensor, which accelerate keeps on one device
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "disk"}
    device_map |= {"model.layers": "disk", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        shipped_model_path(), dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert {p.device.type for p in model.model.layers.parameters()} == {"meta"}
    assert_scores(patch_model(model.eval()), unpatched, case)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (random_qwen3(attn_logit_softcapping=30.0), "attn_logit_softcapping=30.0 is not supported"),
        (
            random_qwen3(final_logit_softcapping=30.0),
            "final_logit_softcapping=30.0 is not supported",
        ),
        (
            random_qwen3(
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
            ),
            "rope_type='dynamic' makes one item's angles depend on the others' lengths",
        ),
        (random_qwen3(is_causal=False), "is_causal=False: the model must be a causal decoder"),
        (BertModel(BertConfig(num_hidden_layers=1)), "model_type='bert' is not supported"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_exact_is_refused_by_name(model: PreTrainedModel, message: str) -> None:
    for refused in (patch_model, lambda m: MultiItemScorer(m, mask_impl="dense")):
        with pytest.raises(UnsupportedModelError, match=message):
            refused(model)
    assert not is_patched(model)


def test_unused_sliding_window_is_fine() -> None:
    model = random_qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert is_patched(patch_model(model))


def test_other_attention_implementations_are_refused(fresh: PreTrainedModel) -> None:
    fresh.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention' has a mask of its own kind"):
        patch_model(fresh)


def test_another_implementation_in_one_layer_is_refused(fresh: PreTrainedModel) -> None:
    layer = fresh.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention' has a mask of its own kind"):
        patch_model(fresh)


def test_prompt_tuning_is_refused(fresh: PreTrainedModel) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="adds virtual tokens"):
        patch_model(get_peft_model(fresh, config))


def test_not_a_hugging_face_model() -> None:
    with pytest.raises(InputTypeError, match="model is a Linear; it must be a transformers"):
        patch_model(torch.nn.Linear(2, 2))


@pytest.mark.jax
def test_a_model_without_head_is_refused() -> None:
    model = patch_model(AutoModel.from_pretrained(shipped_model_path()).eval())
    for refused in (MultiItemScorer, lambda m: patch_model(m, device="jax")):
        with pytest.raises(UnsupportedModelError, match="Qwen3Model has no language-model head"):
            refused(model)


@pytest.mark.parametrize("found_patched", [True, False])
def test_verification_leaves_other_threads_alone(found_patched: bool) -> None:
    """They score with the model while it is verified, on twins over the same weights."""
    model = random_qwen3(tied=False)
    dense = MultiItemScorer(model, label_token_ids=[5, 17], mask_impl="dense")
    if found_patched:
        patch_model(model)
    prefix, items = random_ids(20, seed=1), [random_ids(n, seed=n) for n in (3, 9, 1)]
    expected = one_by_one(random_qwen3(tied=False), prefix, items, [5, 17])
    errors: list[float] = []
    done = threading.Event()

    def score() -> None:
        while not done.is_set():
            scores = torch.tensor(dense.score(prefix, items))
            errors.append(float((scores - expected).abs().max()))

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    reports = [
        verify_parity(model, samples=[(prefix, items)], label_token_ids=[5, 17], show=False)
        for _ in range(10)
    ]
    done.set()
    for thread in threads:
        thread.join()
    assert all(report.passed for report in reports)
    assert len(errors) > 10
    assert max(errors) <= PROBABILITY_MAX_FLOAT32
    assert is_patched(model) == found_patched
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


BATCHES = """
    import copy, pickle, sys
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from helpers import random_qwen3
    from packscore import MultiItemScorer, NotPatchedError, is_patched, patch_model, unpatch_model

    def batched(model):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        prompts, generation = [[5, 6, 7], [8, 9]], GenerationConfig(**options)
        # by itself it takes most of the machine's memory
        few = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        found = model.generate_batch(
            prompts, generation_config=generation, continuous_batching_config=few
        )
        return sorted(output.generated_tokens for output in found.values())

    model = random_qwen3()
    model.set_attn_implementation(sys.argv[1])
    expected = batched(model)
    # old versions leave their paged one behind: then a patched model says that it is so no more
    leaves = model.config._attn_implementation != sys.argv[1]
    model.set_attn_implementation(sys.argv[1])
    scorer = MultiItemScorer(patch_model(model), label_token_ids=[1, 2])
    scores = scorer.score([1, 2], [[3], [4]], flow="packed")
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert batched(copied) == expected
        assert is_patched(copied) != leaves
    if leaves:
        try:
            scorer.score([1, 2], [[3], [4]], flow="packed")
            raise AssertionError
        except NotPatchedError:
            model.set_attn_implementation(sys.argv[1])
            patch_model(model)
    assert scorer.score([1, 2], [[3], [4]], flow="packed") == scores
    try:
        model.init_continuous_batching(no_such=1)
        raise AssertionError
    except TypeError:
        assert is_patched(model)
    assert batched(unpatch_model(model)) == expected
"""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_batch_of_a_patched_model(attention: str) -> None:
    """Continuous batching takes attentions by name; the patch is back when it ends.

    In a process of its own: where torchax was imported, transformers finds no device for it.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BATCHES), attention],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
