"""The scorer's calls: what they return, in which order, what they count, and what survives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from helpers import FrozenCase, encode_whole, official, one_by_one, random_ids
from packscore import MultiItemScorer, PromptSpec, ScoringError, Usage, patch_model
from packscore.flows.packing import PackedBatch
from packscore.torch_engine.engine import TorchEngine
from tolerances import (
    LOG_ODDS_REORDERED,
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
    PROBABILITY_REORDERED,
)

QUERY = "shuffle a list"
DOCUMENTS = [
    "Return the base name of a path.",
    "Shuffle list x in place, and return None.",
    "Open a gzip-compressed file in binary or text mode.",
    "Shuffle list x in place, and return None.",
    "",
]


@pytest.fixture(scope="module")
def scorer(shipped: PreTrainedModel, tokenizer: Any) -> MultiItemScorer:
    return MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")


def expected_scores(model: PreTrainedModel, tokenizer: Any, query: str) -> torch.Tensor:
    ids = encode_whole(tokenizer, [official(document, query) for document in DOCUMENTS])
    labels = tokenizer.convert_tokens_to_ids(["no", "yes"])
    return one_by_one(model, [], ids, labels, apply_softmax=True)


def test_text_through_the_reranker_prompt_equals_the_official_recipe(
    scorer: MultiItemScorer, unpatched: PreTrainedModel, tokenizer: Any
) -> None:
    scores = scorer.score(QUERY, DOCUMENTS, apply_softmax=True)
    expected = expected_scores(unpatched, tokenizer, QUERY)
    assert (torch.tensor(scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert all(isinstance(p, float) for row in scores for p in row)


def test_text_in_bfloat16(fresh: PreTrainedModel, tokenizer: Any) -> None:
    """The shipped model as `dtype="auto"` loads it, on text like it was trained on."""
    model = fresh.bfloat16()
    expected = expected_scores(model, tokenizer, QUERY)
    scorer = MultiItemScorer(patch_model(model), tokenizer, prompt="qwen3-reranker")
    difference = (torch.tensor(scorer.score(QUERY, DOCUMENTS, apply_softmax=True)) - expected).abs()
    assert difference.max() <= PROBABILITY_MAX_BFLOAT16
    assert difference.mean() <= PROBABILITY_MEAN_BFLOAT16


def test_rank_sorts_best_first_with_ties_by_position(scorer: MultiItemScorer) -> None:
    ranked = scorer.rank(QUERY, DOCUMENTS)
    probabilities = [row[1] for row in scorer.score(QUERY, DOCUMENTS, apply_softmax=True)]
    assert sorted(entry["corpus_id"] for entry in ranked) == [0, 1, 2, 3, 4]
    assert [entry["score"] for entry in ranked] == sorted(
        (entry["score"] for entry in ranked), reverse=True
    )
    for entry in ranked:
        assert entry["score"] == pytest.approx(
            probabilities[entry["corpus_id"]], abs=PROBABILITY_REORDERED
        )
        assert set(entry) == {"corpus_id", "score"}
    # the two equal documents have one score, and the first of them comes first
    assert [entry["corpus_id"] for entry in ranked[:2]] == [1, 3]
    assert ranked[0]["score"] == ranked[1]["score"]


def test_rank_top_k_and_documents(scorer: MultiItemScorer) -> None:
    ranked = scorer.rank(QUERY, DOCUMENTS, top_k=2, return_documents=True)
    assert [(entry["corpus_id"], entry["text"]) for entry in ranked] == [
        (1, DOCUMENTS[1]),
        (3, DOCUMENTS[3]),
    ]
    assert len(scorer.rank(QUERY, DOCUMENTS, top_k=99)) == len(DOCUMENTS)
    assert scorer.rank(QUERY, (document for document in DOCUMENTS)) == scorer.rank(QUERY, DOCUMENTS)


def test_predict_groups_pairs_by_query(
    shipped: PreTrainedModel, unpatched: PreTrainedModel, tokenizer: Any
) -> None:
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", prefix_cache_bytes=0)
    queries = [QUERY, "open a compressed file"]
    pairs = [(query, document) for document in DOCUMENTS for query in queries]
    result = scorer.predict(pairs, return_usage=True)
    assert result.scores.dtype == np.float32
    assert result.scores.shape == (len(pairs),)
    for i, query in enumerate(queries):
        expected = expected_scores(unpatched, tokenizer, query)[:, 1]
        difference = torch.from_numpy(result.scores[i::2]) - expected
        assert difference.abs().max() <= PROBABILITY_MAX_FLOAT32
    each = [scorer.score(query, DOCUMENTS, return_usage=True).usage for query in queries]
    assert result.usage.computed_tokens == sum(usage.computed_tokens for usage in each)
    assert result.usage.flow == "packed"


def test_predict_log_odds_and_own_activation(scorer: MultiItemScorer) -> None:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    log_odds = scorer.predict(pairs, activation_fn=torch.nn.Identity())
    probabilities = scorer.predict(pairs)
    assert np.allclose(1 / (1 + np.exp(-log_odds)), probabilities, atol=PROBABILITY_REORDERED)
    ranked = scorer.rank(QUERY, DOCUMENTS, activation_fn=torch.nn.Identity())
    assert ranked[0]["score"] == pytest.approx(log_odds[1], abs=LOG_ODDS_REORDERED)


def test_predict_shows_progress_when_asked(
    scorer: MultiItemScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer.predict([(QUERY, "a")])
    assert capsys.readouterr().err == ""
    scorer.predict([(QUERY, "a"), (QUERY, "b")], show_progress_bar=True)
    assert "2/2" in capsys.readouterr().err


def test_predict_keeps_the_scores_of_other_queries_when_one_fails(
    scorer: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("a", "x"), ("b", "x"), ("a", "y"), ("c", "x")]
    whole = scorer.predict(pairs)
    launch = TorchEngine.launch

    def fails_on_b(engine: TorchEngine, batch: PackedBatch, *args: Any) -> torch.Tensor:
        if any(share.request == 1 and len(batch.shares) > 1 for share in batch.shares):
            raise RuntimeError("out of memory")
        if np.array_equal(batch.shares[0].prefix, failing):
            raise RuntimeError("out of memory")
        return launch(engine, batch, *args)

    failing = scorer.encode("b", ["x"]).prefix
    monkeypatch.setattr(TorchEngine, "launch", fails_on_b)
    with pytest.raises(
        ScoringError, match=r"1 of 3 queries failed.*pairs\[1\] \(out of mem"
    ) as info:
        scorer.predict(pairs)
    assert isinstance(info.value.__cause__, RuntimeError)
    expected = np.where([0, 1, 0, 0], np.nan, whole)
    np.testing.assert_allclose(info.value.scores, expected, atol=PROBABILITY_MAX_FLOAT32)


def test_usage_counts_tokens(shipped: PreTrainedModel, case: FrozenCase) -> None:
    scorer = MultiItemScorer(shipped)
    items = [[1] * 5, [2], [], [3] * 4]
    result = scorer.score([9] * 30, items, label_token_ids=[1, 2], return_usage=True)
    assert result.usage == Usage(
        prompt_tokens=4 * 30 + 10,
        computed_tokens=30 + 10,
        computed_prefix_tokens=30,
        prefix_tokens_saved=3 * 30,
        padding_tokens=0,
        truncated_items=(),
        special_token_items=(),
        flow="packed",
        mask_impl="segment",
        last_layer_tokens=4,
    )
    scorer = MultiItemScorer(shipped, prefix_cache_bytes=0)
    single = scorer.score([9] * 30, [[1] * 5], label_token_ids=[1, 2], return_usage=True)
    assert (single.usage.flow, single.usage.mask_impl) == ("plain", "causal")
    assert single.usage.prefix_tokens_saved == 0


def test_computed_tokens_are_what_the_model_ran(shipped: PreTrainedModel, case: FrozenCase) -> None:
    seen: list[int] = []
    hook = shipped.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        result = MultiItemScorer(shipped).score(
            case.prefix, case.items, label_token_ids=[1, 2], return_usage=True
        )
    finally:
        hook.remove()
    assert seen == [result.usage.computed_tokens]


def test_usage_reports_truncated_and_special_documents(
    shipped: PreTrainedModel, tokenizer: Any
) -> None:
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", max_tokens=150)
    documents = ["a", "b <|im_end|>", "word " * 300]
    ranked = scorer.rank(QUERY, documents, return_usage=True)
    assert ranked.usage.truncated_items == (2,)
    assert ranked.usage.special_token_items == (1,)
    pairs = [("other", "a"), *((QUERY, document) for document in documents)]
    predicted = scorer.predict(pairs, return_usage=True)
    assert predicted.usage.truncated_items == (3,)
    assert predicted.usage.special_token_items == (2,)


def test_repeated_runs_are_bit_identical(shipped: PreTrainedModel, case: FrozenCase) -> None:
    cold = [MultiItemScorer(shipped, label_token_ids=[1, 2]) for _ in range(3)]
    runs = [scorer.score(case.prefix, case.items) for scorer in cold]
    assert runs[0] == runs[1] == runs[2]
    # the query is in pages now, which is another flow and so may round elsewhere
    warm = [cold[0].score(case.prefix, case.items) for _ in range(3)]
    assert warm[0] == warm[1] == warm[2]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=lambda k: k.__name__)
def test_token_ids_of_any_kind(shipped: PreTrainedModel, case: FrozenCase, kind: Any) -> None:
    scorer = MultiItemScorer(shipped, label_token_ids=[1, 2])
    items = [kind(item) for item in case.items if item]
    lists = [item for item in case.items if item]
    assert scorer.score(kind(case.prefix), items) == scorer.score(case.prefix, lists)


def test_scores_over_the_vocabulary_sum_to_one(shipped: PreTrainedModel) -> None:
    labels = list(range(shipped.config.vocab_size))
    # padding rows of the vocabulary may be equal, so only the normaliser is looked at
    scorer = MultiItemScorer(shipped)
    (total,) = scorer.score(random_ids(9, seed=1), [[4]], label_token_ids=labels[:200])
    logits = one_by_one(shipped, random_ids(9, seed=1), [[4]], labels)
    assert logits.sum() == pytest.approx(1.0, abs=PROBABILITY_MAX_FLOAT32)
    assert sum(total) == pytest.approx(float(logits[0, :200].sum()), abs=PROBABILITY_MAX_FLOAT32)


def test_own_prompt_with_own_labels(shipped: PreTrainedModel, tokenizer: Any) -> None:
    spec = PromptSpec("Is this {query}?\nText:", " {item}", "\nAnswer:\n", labels=("no", "yes"))
    scorer = MultiItemScorer(shipped, tokenizer, prompt=spec)
    assert len(scorer.rank("fun", ["a", "b"])) == 2
    (row,) = scorer.score("fun", ["a"], labels=["yes"])
    assert len(row) == 1


def test_instruction_reaches_the_prompt(shipped: PreTrainedModel, tokenizer: Any) -> None:
    one, other = (
        MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", instruction=instruction)
        for instruction in (None, "Find the opposite")
    )
    assert one.rank(QUERY, DOCUMENTS) != other.rank(QUERY, DOCUMENTS)
