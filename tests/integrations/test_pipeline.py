"""The Hugging Face pipeline: what it returns, in which launches, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import packscore.integrations.pipeline
from helpers import one_by_one, random_classifier
from packscore import (
    InputError,
    InputTypeError,
    MultiItemScorer,
    PromptSpec,
    is_patched,
    patch_model,
    register_pipelines,
    shipped_model_path,
)
from packscore.integrations.pipeline import TASK, MultiItemScoringPipeline
from tolerances import PROBABILITY_MAX_FLOAT32, PROBABILITY_REORDERED

LABELS = [" file", " list", " time"]
CLASSIFY = PromptSpec(prefix="A sentence.", item=" {item}", suffix=" It is about a")
REQUESTS: list[dict[str, Any]] = [
    {"query": "delete a directory tree", "items": ["Recursively delete a tree.", "Shuffle.", ""]},
    {"query": "shuffle a list", "items": ["Shuffle list x in place, and return None."]},
    {"query": "open a file", "items": [f"Open a file in mode {n} " * n for n in range(1, 6)]},
    {"query": "sleep", "items": ["Suspend execution for some seconds.", "Delete a tree."]},
    {"query": "rename", "items": ["Rename a file or directory."] * 2},
]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The task, for the tests of this file alone."""
    register_pipelines()
    yield
    del PIPELINE_REGISTRY.supported_tasks[TASK]


@pytest.fixture(scope="module")
def pipe(shipped: PreTrainedModel, tokenizer: Any) -> Any:
    return pipeline(TASK, model=shipped, tokenizer=tokenizer, prompt="qwen3-reranker")


@pytest.fixture(scope="module")
def scorer(shipped: PreTrainedModel, tokenizer: Any) -> MultiItemScorer:
    return MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")


@pytest.fixture(scope="module")
def expected(scorer: MultiItemScorer) -> list[list[dict[str, Any]]]:
    """What `score` says, request by request."""
    return [
        [{"index": i, "score": row[1]} for i, row in enumerate(rows)]
        for rows in (scorer.score(**request, apply_softmax=True) for request in REQUESTS)
    ]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each launch holds."""
    sizes: list[int] = []
    score_requests = packscore.integrations.pipeline._score_requests

    def counted(scorer: Any, requests: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return score_requests(scorer, requests, *args, **options)

    monkeypatch.setattr(packscore.integrations.pipeline, "_score_requests", counted)
    return sizes


def test_registration_is_explicit_and_done_once(caplog: pytest.LogCaptureFixture) -> None:
    before = PIPELINE_REGISTRY.supported_tasks[TASK]
    register_pipelines()
    assert PIPELINE_REGISTRY.supported_tasks[TASK] is before
    assert before["impl"] is MultiItemScoringPipeline
    assert caplog.text == ""


def test_by_name_and_with_an_unpatched_model() -> None:
    made = pipeline(TASK, model=str(shipped_model_path()), prompt="qwen3-reranker")
    assert is_patched(made.model)
    scores = [entry["score"] for entry in made(REQUESTS[0])]
    assert scores[0] == max(scores) > 0.5


def test_one_request_is_what_score_gives(pipe: Any, expected: Any) -> None:
    found = pipe(REQUESTS[0])
    assert_same([found], expected[:1])
    assert [type(x) for entry in found for x in entry.values()] == [int, float] * 3
    assert len({entry["score"] for entry in expected[2]}) == 5


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "dataset", "torch-dataset"])
def test_batches_change_no_score(
    pipe: Any, expected: Any, launches: list[int], batch_size: int, kind: str
) -> None:
    inputs: Any = {
        "list": lambda: REQUESTS,
        "tuple": lambda: tuple(REQUESTS),
        "generator": lambda: (request for request in REQUESTS),
        "dataset": lambda: datasets.Dataset.from_list(REQUESTS),
        "torch-dataset": lambda: TorchRequests(),
    }[kind]()
    found = pipe(inputs, batch_size=batch_size)
    assert isinstance(found, list) == (kind in ("list", "tuple"))
    assert_same(found, expected)
    assert launches == {1: [1] * 5, 2: [2, 2, 1], 7: [5]}[batch_size]


def near(values: Any) -> Any:
    return pytest.approx(values, abs=PROBABILITY_REORDERED)


def assert_same(found: Any, expected: list[list[dict[str, Any]]]) -> None:
    """The same entries; scores to the order of sums, which a launch of several queries changes."""
    for entries, wanted in zip(found, expected, strict=True):
        assert [entry["index"] for entry in entries] == [entry["index"] for entry in wanted]
        for entry, want in zip(entries, wanted, strict=True):
            assert entry.keys() == want.keys()
            assert entry["score"] == pytest.approx(want["score"], abs=PROBABILITY_REORDERED)


class TorchRequests(Dataset[dict[str, Any]]):
    """A torch data set, of which only the length tells the end."""

    def __len__(self) -> int:
        return len(REQUESTS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return REQUESTS[index % len(REQUESTS)]


def test_a_generator_is_read_a_launch_at_a_time(pipe: Any, launches: list[int]) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield REQUESTS[1]

    found = pipe(endless(), batch_size=2)
    assert launches == []
    assert_same([next(found)], [next(found)])
    assert launches == [2]


def test_batch_size_of_the_pipeline_is_its_default(
    shipped: PreTrainedModel, tokenizer: Any, launches: list[int]
) -> None:
    options = {"prompt": "qwen3-reranker", "batch_size": 3, "top_k": 1}
    made = pipeline(TASK, model=shipped, tokenizer=tokenizer, **options)
    assert [len(entries) for entries in made(REQUESTS)] == [1] * 5
    assert [len(entries) for entries in made(REQUESTS, top_k=2)] == [2, 1, 2, 2, 2]
    made(REQUESTS, batch_size=4)
    assert launches == [3, 2, 3, 2, 4, 1]
    assert made([]) == []


def test_top_k_is_best_first_and_items_come_back(pipe: Any, scorer: MultiItemScorer) -> None:
    request = REQUESTS[2]
    ranked = scorer.rank(request["query"], request["items"])
    for top_k in (1, 3, 99):
        found = pipe(request, top_k=top_k, return_items=True)
        assert [entry["index"] for entry in found] == [x["corpus_id"] for x in ranked[:top_k]]
        for entry in found:
            assert entry["item"] == request["items"][entry["index"]]
    ties = pipe(REQUESTS[4], top_k=2)
    assert [entry["index"] for entry in ties] == [0, 1]
    assert ties[0]["score"] == ties[1]["score"]


def test_labels_of_the_call_and_of_a_request(
    pipe: Any, scorer: MultiItemScorer, tokenizer: Any
) -> None:
    query, items = REQUESTS[0].values()
    ids = [tokenizer.encode(label)[0] for label in LABELS]
    for softmax in (True, False):
        rows = scorer.score(query, items, labels=LABELS, apply_softmax=softmax)
        found = pipe(REQUESTS[0], labels=LABELS, apply_softmax=softmax)
        for i, (entry, row) in enumerate(zip(found, rows, strict=True)):
            best = row.index(max(row))
            scores = dict(zip(LABELS, row, strict=True))
            want = {"index": i, "label": LABELS[best], "score": row[best], "scores": scores}
            assert entry == {**want, "score": near(row[best]), "scores": near(scores)}
    by_id = pipe(REQUESTS[0], label_token_ids=ids, apply_softmax=False)
    assert [entry["scores"] for entry in by_id] == [
        dict(zip(ids, row, strict=True)) for row in rows
    ]
    # each request's own labels, in one launch with others that have none
    mixed = pipe([{**REQUESTS[0], "labels": LABELS[:2]}, REQUESTS[0]], batch_size=2)
    assert list(mixed[0][0]["scores"]) == LABELS[:2]
    assert set(mixed[1][0]) == {"index", "score"}


def test_labels_of_a_call_replace_those_of_the_pipeline(
    shipped: PreTrainedModel, tokenizer: Any
) -> None:
    made = pipeline(TASK, model=shipped, tokenizer=tokenizer, label_token_ids=[7, 8, 9])
    assert list(made(REQUESTS[1])[0]["scores"]) == [7, 8, 9]
    assert list(made(REQUESTS[1], labels=LABELS)[0]["scores"]) == LABELS
    spec = PromptSpec(prefix="{query}", item=" {item}", labels=tuple(LABELS))
    assert list(made(REQUESTS[1], prompt=spec)[0]["scores"]) == [7, 8, 9]
    three = pipeline(TASK, model=shipped, tokenizer=tokenizer, prompt=spec)
    assert list(three(REQUESTS[1])[0]["scores"]) == LABELS


def test_instruction_and_prompt_of_a_call(pipe: Any, shipped: Any, tokenizer: Any) -> None:
    told = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", instruction="Find code")
    scores = [row[1] for row in told.score(**REQUESTS[2], apply_softmax=True)]
    found = [entry["score"] for entry in pipe(REQUESTS[2], instruction="Find code")]
    assert found == near(scores)
    assert found != near([entry["score"] for entry in pipe(REQUESTS[2])])


def test_scorers_of_old_prompts_are_forgotten(pipe: Any, expected: Any) -> None:
    for number in range(3):
        pipe(REQUESTS[1], instruction=str(number))
        assert len(pipe._scorers) <= 2
    assert_same([pipe(REQUESTS[0])], expected[:1])


def test_sequences_with_candidate_labels(
    shipped: PreTrainedModel, unpatched: PreTrainedModel, tokenizer: Any
) -> None:
    texts = ["Open a gzip file.", "Sort it in place.", "Seconds since the epoch."]
    made = pipeline(TASK, model=shipped, tokenizer=tokenizer, prompt=CLASSIFY)
    found = made({"sequence": texts, "candidate_labels": LABELS})
    ids = tokenizer([f"A sentence. {text} It is about a" for text in texts])["input_ids"]
    label_ids = [tokenizer.encode(label)[0] for label in LABELS]
    expected = one_by_one(unpatched, [], ids, label_ids, apply_softmax=True)
    for entry, text, row in zip(found, texts, expected.tolist(), strict=True):
        assert entry["sequence"] == text
        assert entry["scores"] == sorted(entry["scores"], reverse=True)
        for label, score in zip(entry["labels"], entry["scores"], strict=True):
            assert score == pytest.approx(row[LABELS.index(label)], abs=PROBABILITY_MAX_FLOAT32)
    one = made({"sequence": texts[1], "candidate_labels": LABELS}, top_k=2)
    assert one["labels"] == found[1]["labels"][:2]
    comma = made({"sequence": texts[1], "candidate_labels": "file, list"})
    assert sorted(comma["labels"]) == ["file", "list"]


def test_labels_of_several_tokens(scorer: MultiItemScorer, pipe: Any, tokenizer: Any) -> None:
    texts = [" very good", " bad"]
    ids = [tokenizer.encode(text) for text in texts]
    assert max(map(len, ids)) > 1
    request = REQUESTS[0]
    expected = scorer.score(**request, labels=texts, apply_softmax=True)
    for labels, names in (({"labels": texts}, texts), ({"label_token_ids": ids}, map(tuple, ids))):
        found = pipe({**request, **labels})
        first, second = names
        for entry, row in zip(found, expected, strict=True):
            assert entry["scores"] == pytest.approx(
                {first: row[0], second: row[1]}, abs=PROBABILITY_REORDERED
            )
            assert entry["label"] == (first if row[0] > row[1] else second)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_a_classifier_gives_its_classes(tokenizer: Any, tmp_path: Path, num_labels: int) -> None:
    model = random_classifier(num_labels=num_labels, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = pipeline(TASK, model=str(tmp_path))
    assert type(made.model) is type(model)
    scores = MultiItemScorer(patch_model(model), tokenizer).score(**REQUESTS[0])
    for entry, row in zip(made(REQUESTS[0]), scores, strict=True):
        assert entry["score"] == near(max(row) if num_labels == 3 else row[-1])
        if num_labels == 3:
            assert entry["scores"] == near({f"LABEL_{i}": p for i, p in enumerate(row)})
            assert entry["label"] == f"LABEL_{row.index(max(row))}"
    if num_labels == 2:
        assert "scores" in made(REQUESTS[0], labels=["LABEL_0", "LABEL_1"])[0]


def test_token_ids_without_a_tokenizer(shipped: PreTrainedModel) -> None:
    made = MultiItemScoringPipeline(model=shipped, label_token_ids=[1, 2])
    expected = MultiItemScorer(shipped).score([5, 6], [[7], [8, 9]], label_token_ids=[1, 2])
    found = made({"query": [5, 6], "items": [[7], [8, 9]]}, apply_softmax=False)
    for entry, row in zip(found, expected, strict=True):
        assert list(entry["scores"].values()) == near(row)


def test_dense_leaves_the_model_unpatched(
    fresh: PreTrainedModel, tokenizer: Any, expected: Any
) -> None:
    options = {"prompt": "qwen3-reranker", "mask_impl": "dense"}
    made = pipeline(TASK, model=fresh, tokenizer=tokenizer, **options)
    assert not is_patched(fresh)
    for entry, want in zip(made(REQUESTS[0]), expected[0], strict=True):
        assert entry["score"] == pytest.approx(want["score"], abs=PROBABILITY_MAX_FLOAT32)


def test_progress_counts_requests(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(REQUESTS)
    assert capsys.readouterr().err == ""
    pipe(REQUESTS, batch_size=2, show_progress_bar=True)
    assert "5/5" in capsys.readouterr().err


def test_a_saved_pipeline_is_a_plain_checkpoint(pipe: Any, tmp_path: Path, expected: Any) -> None:
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    made = pipeline(TASK, model=model, tokenizer=pipe.tokenizer, prompt="qwen3-reranker")
    assert_same([made(REQUESTS[0])], expected[:1])


REQUEST = REQUESTS[0]
BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "option": (REQUEST, {"topk": 3}, InputTypeError, "topk=3 is no option of 'multi-item-scoring'"),
    "hypothesis": (REQUEST, {"hypothesis_template": "{}"}, InputTypeError, "hypothesis_template="),
    "workers": (REQUEST, {"num_workers": 2}, InputError, "num_workers=2 has no use here"),
    "batch": (REQUEST, {"batch_size": 0}, InputError, "batch_size=0 must be at least 1"),
    "top_k": (REQUEST, {"top_k": 0}, InputError, "top_k=0 must be at least 1"),
    "text": ("a query", {}, InputTypeError, "inputs='a query' must be a request"),
    "number": (3, {}, InputTypeError, "inputs=3 must be a request"),
    "entry": ([REQUEST, "x"], {}, InputTypeError, r"inputs\[1\]='x' must be a request"),
    "key": ({**REQUEST, "docs": []}, {}, InputError, r"inputs has unknown keys \['docs'\]; a req"),
    "missing": ({"query": "a"}, {}, InputError, r"inputs lacks \['items'\]; a request has"),
    "items": ({"query": "a", "items": "b"}, {}, InputTypeError, r"inputs\['items'\]='b' is a str"),
    "both": (
        {**REQUEST, "labels": ["a"], "label_token_ids": [1]},
        {},
        InputError,
        "two ways to say",
    ),
    "sequence": (
        {"sequence": "a", "candidate_labels": LABELS},
        {},
        InputError,
        "asks about a query, and a request with candidate_labels has none",
    ),
    "mixed": (
        {"sequence": "a", "items": []},
        {},
        InputError,
        r"inputs has unknown keys \['items'\]",
    ),
}


@pytest.mark.parametrize(("inputs", "options", "kind", "text"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_refused_by_name(
    pipe: Any, inputs: Any, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        pipe(inputs, **options)


def test_requests_without_items_give_none(pipe: Any, expected: Any) -> None:
    nothing = {"query": "a", "items": []}
    assert pipe(nothing) == []
    found = pipe([nothing, REQUESTS[0], nothing], batch_size=3)
    assert_same(found, [[], expected[0], []])
    assert pipe({"sequence": [], "candidate_labels": ["a", "b"]}, prompt="plain") == []


def test_an_instruction_without_a_place_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"instruction='Find' has no place in this prompt"):
        pipe(REQUESTS[0], prompt="plain", instruction="Find")


def test_a_bad_request_stops_a_list_before_the_model_runs(pipe: Any, launches: list[int]) -> None:
    with pytest.raises(InputError, match=r"inputs\[5\] lacks"):
        pipe([*REQUESTS, {"query": "a"}])
    assert launches == []


def test_an_unknown_option_of_the_pipeline_is_refused(shipped: Any, tokenizer: Any) -> None:
    with pytest.raises(InputTypeError, match="instructions='x' is no option"):
        pipeline(TASK, model=shipped, tokenizer=tokenizer, instructions="x")
