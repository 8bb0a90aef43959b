"""Fixtures that every part of the suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from helpers import FrozenCase, random_ids
from packscore import patch_model, shipped_model_path
from selection import HAS_JAX

# the models are small: more threads cost more than they give, above all on a busy machine
torch.set_num_threads(int(os.environ.get("PACKSCORE_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The shipped model's tokenizer: Qwen's pipeline with a small vocabulary."""
    return AutoTokenizer.from_pretrained(shipped_model_path())


def _load_shipped() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(shipped_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def shipped() -> PreTrainedModel:
    """The shipped reranker in float32, patched; tests leave it as it is."""
    return patch_model(_load_shipped())


@pytest.fixture(scope="session")
def unpatched() -> PreTrainedModel:
    """The shipped reranker in float32 as Hugging Face loads it: the reference."""
    return _load_shipped()


@pytest.fixture
def fresh() -> PreTrainedModel:
    """A shipped reranker of the test's own, not patched."""
    return _load_shipped()


@pytest.fixture(scope="session")
def case(shipped: PreTrainedModel, tokenizer: Any) -> FrozenCase:
    """Token ids of a query and seven items for the shipped model, and its labels no and yes."""
    vocab_size = len(tokenizer)
    items = [
        random_ids(n, vocab_size, seed=k + 1) for k, n in enumerate((7, 1, 30, 12, 12, 0, 200))
    ]
    labels = tokenizer.convert_tokens_to_ids(["no", "yes"])
    return FrozenCase(random_ids(90, vocab_size, seed=0), items, labels)


@pytest.fixture(scope="module")
def quick_programs() -> Iterator[None]:
    """Programs compiled without LLVM's optimisations, which are two thirds of the work.

    What they compute is the same; test_program.py runs programs as they ship.
    """
    if not HAS_JAX:  # what is left of the module runs in torch
        yield
        return
    import jax

    compile_lowered = jax.stages.Lowered.compile

    def quickly(lowered: Any) -> Any:
        return compile_lowered(lowered, compiler_options={"xla_backend_optimization_level": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", quickly)
        yield


@pytest.fixture(scope="session")
def broken_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """The shipped reranker with NaN in the embedding of "é", and so in items that hold one."""
    model, folder = _load_shipped(), str(tmp_path_factory.mktemp("broken"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("é")["input_ids"], 0] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
