"""What objects say of themselves: one short line, in every state, and nothing is started for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers import random_qwen3
from input_tables import forwards
from packscore import (
    PROMPTS,
    EncodedRequest,
    Explanation,
    ModelProgram,
    MultiItemScorer,
    Plan,
    Prefix,
    PromptSpec,
    ScoreResult,
    Usage,
    patch_model,
    program_of,
    shipped_model_path,
)
from packscore.integrations.pipeline import MultiItemScoringPipeline

CLASSES = (
    *(EncodedRequest, Explanation, ModelProgram, MultiItemScorer, Plan, Prefix, PromptSpec),
    *(ScoreResult, Usage),
)
LONG = "words " * 1000
LONGEST = 420


def is_short(told: str) -> bool:
    return "\n" not in told and len(told) <= LONGEST


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(shipped_model_path(), device="cpu", prompt="yes-no")


def test_a_scorer_tells_its_model_place_prompt_and_mask(scorer: MultiItemScorer) -> None:
    fresh = MultiItemScorer(scorer.model, scorer.tokenizer, prompt="yes-no")
    told: list[str] = []
    assert forwards(scorer.model, lambda: told.append(repr(fresh))) == 0
    assert told == [
        "MultiItemScorer(Qwen3ForCausalLM 'shipped_model', 4 layers of 128, cpu, bfloat16, "
        "in torch, prompt='yes-no', mask_impl='segment')"
    ]
    assert fresh._core._copies is None  # which would take memory
    on_meta = MultiItemScorer.from_pretrained(shipped_model_path(), device="meta", prompt="plain")
    assert ", meta, " in repr(on_meta)
    long = replace(PROMPTS["yes-no"], prefix=f"{LONG}{{query}}")
    assert is_short(repr(MultiItemScorer(scorer.model, prompt=long, tokenizer=scorer.tokenizer)))


def test_a_prefix_tells_its_state(scorer: MultiItemScorer) -> None:
    held = scorer.prefix("open a file")
    assert repr(held).startswith("Prefix('open a file', ")
    assert repr(held).endswith(" tokens, held)")
    scorer.clear_prefixes()
    assert repr(held).endswith(" tokens, stale)")
    held.release()
    assert repr(held).endswith(" tokens, released)")


def test_programs_tell_what_is_ready() -> None:
    model: Any = patch_model(random_qwen3(), device="jax")
    program = program_of(model)
    told = "Qwen3ForCausalLM, 2 layers of 64, cpu, float32, on cpu:0 by 'xla', 0 programs ready"
    assert repr(program) == f"ModelProgram({told}, up to 16,384 tokens)"
    assert "in programs on cpu:0" in repr(MultiItemScorer(model, label_token_ids=[5, 17]))
    del model
    assert repr(program).startswith("ModelProgram(its model is gone, on cpu:0")


def test_results_requests_and_plans_tell_sizes(
    scorer: MultiItemScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    items = ["a file", LONG, *map(str, range(200))]
    scorer = MultiItemScorer(scorer.model, scorer.tokenizer, prompt="yes-no", max_tokens=100)
    found = scorer.score("open", items, return_usage=True, flow="packed")
    ranked = scorer.rank("open", items[:2], return_documents=True, return_usage=True)
    explained = scorer.explain("open", items)
    told = [repr(x) for x in (found, found.usage, ranked, scorer.encode("open", items))]
    told += [repr(x) for x in (explained, explained.chosen, *PROMPTS.values())]
    assert all(map(is_short, told)), told
    assert told[0].startswith("ScoreResult(scores=202 of [")
    assert "tokens computed, flow='packed', mask_impl='" in told[1]
    assert "truncated_items=(1,)" in told[1]
    assert ", 202 items of up to " in told[3]
    assert told[3].endswith(" tokens, 1 truncated_items)")
    assert "ms predicted) before " in told[4]
    usage = replace(found.usage, non_finite_items=tuple(range(5000)))
    assert repr(usage).endswith("non_finite_items=5,000 of 0, ...)")
    assert is_short(repr(ScoreResult(np.zeros(10**6), usage)))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_what_is_not_whole_has_a_repr_too(kind: Any) -> None:
    assert repr(object.__new__(kind)) == f"{kind.__name__}(not whole)"


def test_prompts_that_are_told_alike_are_not_taken_for_each_other() -> None:
    """A pipeline keeps scorers by their prompts, and a run on files what it was made with."""
    specs = [PromptSpec(prefix=LONG[:60] + x, item=" {item}?", labels=("no", "yes")) for x in "ab"]
    assert repr(specs[0]) == repr(specs[1])
    assert specs[0].spelled != specs[1].spelled
    assert eval(specs[0].spelled, {"PromptSpec": PromptSpec}) == specs[0]
    loaded = MultiItemScorer.from_pretrained(shipped_model_path(), device="cpu")
    pipe = MultiItemScoringPipeline(model=loaded.model, tokenizer=loaded.tokenizer, prompt=specs[0])
    for spec in (*specs, specs[0]):
        pipe({"query": "", "items": ["open a file"]}, prompt=spec)
    assert len(pipe._scorers) == 2
