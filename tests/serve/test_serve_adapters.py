"""LoRA adapters as models: the base's tensors shared, its scores unmoved, each one's own right."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from packscore import (
    LoadError,
    MultiItemScorer,
    UnsupportedModelError,
    patch_model,
    shipped_model_path,
)
from packscore.serve import create_app
from packscore.serve.adapters import bytes_of, with_adapter
from serve_helpers import DOCUMENTS, QUERY, post
from tolerances import PROBABILITY_MAX_FLOAT32

RANK = 4


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, unpatched: PreTrainedModel, tokenizer: Any
) -> list[Path]:
    """Two adapters of the shipped model, which change its scores."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = get_peft_model(copy.deepcopy(unpatched), config)
        wrapped.peft_config["default"].base_model_name_or_path = str(shipped_model_path())
        found.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        wrapped.save_pretrained(found[-1])
        tokenizer.save_pretrained(found[-1])
    return found


@pytest.fixture
def base(fresh: PreTrainedModel, tokenizer: Any) -> MultiItemScorer:
    return MultiItemScorer(
        patch_model(fresh), tokenizer, prompt="qwen3-reranker", prefix_cache_bytes=2**20
    )


def scores_of(scorer: MultiItemScorer) -> torch.Tensor:
    return torch.tensor(scorer.score(QUERY, DOCUMENTS))


def test_twins_share_the_bases_tensors_and_score_as_they_do_alone(
    base: MultiItemScorer, folders: list[Path]
) -> None:
    before, trained = scores_of(base), [p.requires_grad for p in base.model.parameters()]
    twins = [with_adapter(base, folder) for folder in folders]
    size = bytes_of(base.model)
    starts = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
    config: Any = base.model.config
    for twin, folder in zip(twins, folders, strict=True):
        own = {p.untyped_storage().data_ptr() for p in twin.model.parameters()}
        assert starts <= own
        # two matrices for q and for v of every layer
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        added = RANK * (2 * config.hidden_size + wide + narrow) * config.num_hidden_layers * 4
        assert bytes_of(twin.model, beside=base.model) == added
        assert bytes_of(twin.model) == size + added
        alone = MultiItemScorer.from_pretrained(
            folder, device="cpu", dtype="float32", prompt="qwen3-reranker"
        )
        found = scores_of(twin)
        assert (found - scores_of(alone)).abs().max() <= PROBABILITY_MAX_FLOAT32
        assert (found - before).abs().max() > 1e-3
    assert (scores_of(twins[0]) - scores_of(twins[1])).abs().max() > 1e-3
    assert (scores_of(base) - before).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert [p.requires_grad for p in base.model.parameters()] == trained


def test_twins_of_a_busy_model_answer_at_once(base: MultiItemScorer, folders: list[Path]) -> None:
    """Each with pages of its own, from several threads, the base among them."""
    scorers = [base, *(with_adapter(base, folder) for folder in folders)]
    expected = [scores_of(scorer) for scorer in scorers]
    wrong: list[float] = []

    def ask(index: int) -> None:
        for _ in range(5):
            difference = float((scores_of(scorers[index]) - expected[index]).abs().max())
            if difference > PROBABILITY_MAX_FLOAT32:
                wrong.append(difference)

    threads = [threading.Thread(target=ask, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_they_are_served_by_their_names(base: MultiItemScorer, folders: list[Path]) -> None:
    twin = with_adapter(base, folders[0])
    app = create_app({"base": base, "tuned": twin})
    for name, scorer in (("base", base), ("tuned", twin)):
        body = {"model": name, "query": QUERY, "items": DOCUMENTS}
        found = torch.tensor(post(app, "/v1/score", body).json()["scores"])
        assert (found - scores_of(scorer)).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_an_adapter_that_does_not_fit_is_refused_and_the_base_goes_on(
    base: MultiItemScorer, folders: list[Path], tmp_path: Path
) -> None:
    before = scores_of(base)
    shutil.copytree(folders[0], tmp_path / "broken")
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"no weights")
    for folder in (tmp_path, tmp_path / "broken", tmp_path / "nowhere"):
        with pytest.raises(LoadError, match=folder.name):
            with_adapter(base, folder)
    assert torch.equal(scores_of(base), before)


@pytest.mark.jax
def test_programs_share_no_weights_and_say_so(
    fresh: PreTrainedModel, tokenizer: Any, folders: list[Path], quick_programs: None
) -> None:
    scorer = MultiItemScorer(patch_model(fresh, device="jax"), tokenizer, prompt="qwen3-reranker")
    with pytest.raises(UnsupportedModelError, match="share no weights"):
        with_adapter(scorer, folders[0])
