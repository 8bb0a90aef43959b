"""Apps over the shipped model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from packscore import MultiItemScorer
from packscore.serve import create_app


@pytest.fixture(scope="module")
def scorer(shipped: PreTrainedModel, tokenizer: Any) -> MultiItemScorer:
    """The shipped reranker's; it keeps no pages, so that a request is the same to the bit again."""
    return MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", prefix_cache_bytes=0)


@pytest.fixture(scope="module")
def app(scorer: MultiItemScorer) -> Any:
    """All endpoints over it, under the name tiny."""
    return create_app({"tiny": scorer})
