"""Stages of `packscore.fleet` without Ray: what they make of a batch, and what they refuse."""

from __future__ import annotations

import json
import sys
from typing import Any

import pyarrow as pa
import pytest

from packscore import InputError, InputTypeError, MultiItemScorer, shipped_model_path
from packscore.errors import MissingPackageError
from packscore.fleet import (
    DecideStage,
    PairStage,
    RankStage,
    ScoreStage,
    Workers,
    read_records,
    run_groups,
    run_stage,
)

LOADING: dict[str, Any] = {"device": "cpu", "prompt": "qwen3-reranker"}
MODEL = str(shipped_model_path())
ITEMS = [["Delete a tree.", "Open a file."], ["Open a file."], []]
RECORDS = pa.table({"n": [1, 2, 3], "query": ["delete", "open", "x"], "items": ITEMS})


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(MODEL, **LOADING)


@pytest.fixture
def loaded(scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage has this scorer."""
    monkeypatch.setattr(MultiItemScorer, "from_pretrained", lambda *_, **__: scorer)


@pytest.mark.usefixtures("loaded")
def test_a_batch_comes_back_with_what_a_scorer_gives(scorer: MultiItemScorer) -> None:
    pairs = list(zip(RECORDS["query"].to_pylist(), ITEMS, strict=True))
    scored = ScoreStage(MODEL, **LOADING)(RECORDS)
    assert scored.column_names == ["n", "query", "items", "scores"]
    assert scored["scores"].to_pylist() == [scorer.score(q, i, flow="packed") for q, i in pairs]
    ranked = RankStage(MODEL, top_k=1, **LOADING)(RECORDS)
    top = [scorer.rank(q, i, top_k=1, flow="packed") for q, i in pairs]
    assert ranked["ranking"].to_pylist() == top
    # of an empty batch the columns have their types
    empty = ScoreStage(MODEL, **LOADING)(RECORDS.slice(0, 0))
    assert empty.schema == scored.schema


@pytest.mark.usefixtures("loaded")
def test_rows_of_a_query_are_scored_together_and_stay_in_order(scorer: MultiItemScorer) -> None:
    rows = pa.table({"query": ["a", "a", "b", "a"], "item": ["x", "y", "x", "x"]})
    scores = PairStage(MODEL, **LOADING)(rows)["score"].to_pylist()
    one = scorer.predict([("a", "x"), ("a", "y")], flow="packed").tolist()
    alone = [scorer.predict([pair], flow="packed").item() for pair in (("b", "x"), ("a", "x"))]
    assert scores == [*one, *alone]


@pytest.mark.usefixtures("loaded")
def test_states_are_asked_alike_or_each_its_own(scorer: MultiItemScorer) -> None:
    asked = {"q": {"type": "noul", "instructions": "Is it a file?"}}
    expected = json.loads(json.dumps(scorer.decide("a", asked, flow="packed").to_systemone()))
    states = pa.table({"state": ["a", "a"]})
    given = states.append_column("questions", pa.array([json.dumps(asked)] * 2))
    for stage, batch in (
        (DecideStage(MODEL, questions=asked), states),
        (DecideStage(MODEL), given),
    ):
        assert [json.loads(one) for one in stage(batch)["answers"].to_pylist()] == [expected] * 2


@pytest.mark.usefixtures("loaded")
def test_a_batch_that_does_not_fit_is_refused_by_name() -> None:
    stage = ScoreStage(MODEL, query="q", **LOADING)
    with pytest.raises(InputTypeError, match="a batch is a dict; pass batch_format='pyarrow'"):
        stage({"q": ["a"]})
    with pytest.raises(InputError, match=r"column 'q' is missing; the batch has \['n', 'query'"):
        stage(RECORDS)
    there = RECORDS.append_column("scores", pa.array([0, 0, 0]))
    with pytest.raises(InputError, match="column 'scores' is there already"):
        ScoreStage(MODEL, **LOADING)(there)
    with pytest.raises(InputError, match="warmup_tokens=64: torch compiles nothing"):
        ScoreStage(MODEL, warmup_tokens=64, **LOADING)


def test_a_pool_is_checked_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, why in (
        ({"count": 0}, "count=0 must be 1 or more"),
        ({"count": (2, 1)}, r"count=\(2, 1\) must be"),
        ({"num_cpus": -1}, "num_cpus=-1 must be 0 or more"),
        ({"resources": {"TPU": -4}}, "TPU=-4 must be"),
    ):
        with pytest.raises(InputError, match=why):
            Workers(**wrong)
    with pytest.raises(InputError, match="promt='plain': neither ScoreStage nor"):
        run_stage(None, ScoreStage, {"model": MODEL, "promt": "plain"})
    with pytest.raises(InputError, match="PairStage: missing a required argument: 'model'"):
        run_groups(None, "query", PairStage, {})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"packscore.fleet needs .*\[ray\]"):
        Workers().options()


def test_a_file_of_scattered_rows_is_no_dataset_of_records(tmp_path: Any) -> None:
    from pyarrow import parquet

    path = str(tmp_path / "in.parquet")
    parquet.write_table(pa.table({"query": ["a", "b", "a"], "item": ["x", "y", "z"]}), path)
    with pytest.raises(InputError, match="queries that come back after another one"):
        read_records(path)
