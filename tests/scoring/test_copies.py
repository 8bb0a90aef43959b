"""Scorers and patched models in copies and other processes: the same scores, pages of their own."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import joblib
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import LABELS, engine_of, one_by_one, random_classifier, random_ids, random_qwen3
from packscore import MultiItemScorer, is_patched, patch_model, unpatch_model
from tolerances import PROBABILITY_MAX_FLOAT32

PREFIX = random_ids(30, seed=1)
ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 6, 0, 9))]


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = [copy.deepcopy, through_pickle]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_a_copied_scorer_scores_with_its_own_model(duplicate: Any, mask_impl: Any) -> None:
    scorer = MultiItemScorer(
        patch_model(random_qwen3()), label_token_ids=LABELS, mask_impl=mask_impl
    )
    scores = scorer.score(PREFIX, ITEMS)
    with scorer.prefix(PREFIX) if mask_impl == "segment" else scorer.prefix([]):
        clone = duplicate(scorer)
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight.mul_(2)
    assert clone.score(PREFIX, ITEMS) == scores
    assert scorer.score(PREFIX, ITEMS) != scores
    if mask_impl == "segment":
        assert engine_of(clone).pool is not engine_of(scorer).pool


def test_scorers_with_a_prompt_and_of_classes(shipped: PreTrainedModel, tokenizer: Any) -> None:
    reranker = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")
    texts = ["Shuffle a list in place.", "Open a file."]
    classes = MultiItemScorer(patch_model(random_classifier()))
    for duplicate in COPIES:
        ranked = reranker.rank("shuffle", texts, flow="packed")
        assert duplicate(reranker).rank("shuffle", texts, flow="packed") == ranked
        scores = classes.score(PREFIX, ITEMS, flow="packed")
        assert duplicate(classes).score(PREFIX, ITEMS, flow="packed") == scores


def test_a_model_that_was_pickled_patched_is_patched(tmp_path: Path) -> None:
    """In a process that has not patched anything: attention finds its name there as well."""
    path = tmp_path / "model.pickle"
    model = patch_model(random_qwen3())
    path.write_bytes(pickle.dumps(model))
    code = f"""
        import pickle, sys, torch
        model = pickle.loads(open({str(path)!r}, "rb").read())
        print(model(torch.tensor([[1, 2, 3]])).logits[0, -1, :2].tolist())
        from packscore import MultiItemScorer, is_patched
        assert is_patched(model)
        print(MultiItemScorer(model, label_token_ids=[1, 2]).score([1, 2], [[3], [4, 5]]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logits, scores = map(eval, done.stdout.splitlines())
    expected = model(torch.tensor([[1, 2, 3]])).logits[0, -1, :2]
    assert (torch.tensor(logits) - expected).abs().max() <= 1e-5
    packed = one_by_one(unpatch_model(model), [1, 2], [[3], [4, 5]], [1, 2])
    assert (torch.tensor(scores) - packed).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_unpatching_leaves_no_mark() -> None:
    model = random_qwen3()
    before = set(model.__dict__)
    unpatch_model(patch_model(model))
    assert set(model.__dict__) == before
    assert not is_patched(model)


def score_in_process(scorer: MultiItemScorer, prefix: list[int]) -> list[list[float]]:
    torch.set_num_threads(1)
    return scorer.score(prefix, ITEMS)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_in_other_processes(method: str) -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS)
    expected = scorer.score(PREFIX, ITEMS)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        scores = pool.submit(score_in_process, scorer, PREFIX).result(timeout=300)
    assert np.abs(np.array(scores) - np.array(expected)).max() <= PROBABILITY_MAX_FLOAT32


def test_in_workers_of_joblib() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS)
    expected = scorer.score(PREFIX, ITEMS)
    with joblib.parallel_config("loky", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(score_in_process)(scorer, PREFIX) for _ in "ab")
    for scores in found:
        assert np.abs(np.array(scores) - np.array(expected)).max() <= PROBABILITY_MAX_FLOAT32


def test_in_a_map_over_a_data_set() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS)
    queries = [PREFIX[:k] for k in (9, 12, 20, 5)]
    expected = [scorer.score(query, ITEMS) for query in queries]
    rows = datasets.Dataset.from_dict({"query": queries})
    found = rows.map(lambda row: {"scores": score_in_process(scorer, row["query"])}, num_proc=2)
    assert np.abs(np.array(found["scores"]) - np.array(expected)).max() <= PROBABILITY_MAX_FLOAT32
