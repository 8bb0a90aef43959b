"""Sequence classifiers: packed class scores equal the unpatched model's, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from helpers import CLASSIFIERS, random_classifier, random_ids
from packscore import (
    InputError,
    InputTypeError,
    MultiItemScorer,
    UnsupportedModelError,
    patch_model,
    shipped_model_path,
)
from tolerances import (
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
    PROBABILITY_REORDERED,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

PREFIX = [id_ + (id_ == 0) for id_ in random_ids(37, seed=1)]  # 0 is the padding token
ITEMS = [[id_ + (id_ == 0) for id_ in random_ids(n, seed=n)] for n in (5, 60, 1, 0, 9, 130, 9)]
DEVICES = [None, "jax"]


@torch.no_grad()
def class_logits(model: PreTrainedModel, prefix: list[int] = PREFIX) -> torch.Tensor:
    """float32[num_items, num_classes] of the model as it is, one item at a time."""
    found = [model(torch.tensor([[*prefix, *item]])).logits for item in ITEMS]
    return torch.cat(found).float()


def score(scorer: MultiItemScorer, **options: Any) -> torch.Tensor:
    # by name, so that a second call gives the same bits
    return torch.tensor(scorer.score(PREFIX, ITEMS, flow="packed", **options))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_class_probabilities(family: str, device: str | None) -> None:
    model = random_classifier(family, num_labels=3)
    expected = class_logits(model).softmax(-1)
    assert expected.std(0).min() > 0.05
    scorer = MultiItemScorer(patch_model(model, device=device))
    found = score(scorer)
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    chosen = score(scorer, labels=["LABEL_2", "LABEL_0"])
    assert torch.equal(chosen, found[:, [2, 0]])
    over_labels = score(scorer, labels=["LABEL_2", "LABEL_0"], apply_softmax=True)
    normalised = expected[:, [2, 0]] / expected[:, [2, 0]].sum(-1, keepdim=True)
    assert (over_labels - normalised).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device: str | None) -> None:
    model = random_classifier(num_labels=3).bfloat16()
    expected = class_logits(model).softmax(-1)
    error = (score(MultiItemScorer(patch_model(model, device=device))) - expected).abs()
    assert error.max() <= PROBABILITY_MAX_BFLOAT16
    assert error.mean() <= PROBABILITY_MEAN_BFLOAT16


@pytest.mark.parametrize("device", DEVICES)
def test_one_class_gets_a_sigmoid(device: str | None) -> None:
    model = random_classifier(num_labels=1)
    logits = class_logits(model)
    scorer = MultiItemScorer(patch_model(model, device=device))
    for softmax in (False, True):
        found = score(scorer, apply_softmax=softmax)
        assert (found - logits.sigmoid()).abs().max() <= PROBABILITY_MAX_FLOAT32
    pairs = [(PREFIX, item) for item in ITEMS]
    raw = scorer.predict(pairs, activation_fn=torch.nn.Identity())
    assert (torch.tensor(raw) - logits[:, 0]).abs().max() <= PROBABILITY_MAX_FLOAT32
    ranked = scorer.rank(PREFIX, ITEMS)
    assert [x["corpus_id"] for x in ranked] == logits[:, 0].argsort(
        descending=True, stable=True
    ).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_two_classes_are_ranked_by_their_log_odds(device: str | None) -> None:
    model = random_classifier(num_labels=2)
    logits = class_logits(model)
    scorer = MultiItemScorer(patch_model(model, device=device))
    probabilities = scorer.predict([(PREFIX, item) for item in ITEMS])
    error = (torch.tensor(probabilities) - logits.softmax(-1)[:, 1]).abs()
    assert error.max() <= PROBABILITY_MAX_FLOAT32
    other_way = MultiItemScorer(model, labels=["LABEL_1", "LABEL_0"])
    turned = other_way.predict([(PREFIX, item) for item in ITEMS])
    assert (torch.tensor(turned + probabilities) - 1).abs().max() <= PROBABILITY_MAX_FLOAT32


def test_a_prompt_asks_a_classifier_for_its_classes(tokenizer: Any) -> None:
    """The prompt's own labels are tokens, which a classifier does not read."""
    names = {0: "bad", 1: "so-so", 2: "good"}
    model = random_classifier(num_labels=3, vocab_size=len(tokenizer), id2label=names)
    scorer = MultiItemScorer(patch_model(model), tokenizer, prompt="qwen3-reranker")
    question = "shuffle a list", ["Shuffle list x in place."]
    (scores,) = scorer.score(*question, flow="packed")
    assert len(scores) == 3
    assert sum(scores) == pytest.approx(1, abs=PROBABILITY_REORDERED)
    (good,) = scorer.score(*question, labels=["good"], flow="packed")
    assert good == [scores[2]]


@pytest.mark.parametrize("device", DEVICES)
def test_classes_are_read_before_padding_tokens(device: str | None) -> None:
    """Hugging Face reads at the last token that is no padding, wherever that token came from."""
    model = random_classifier(num_labels=2)
    items = [[5, 6, 0, 0], [0, 0], [7, 0, 8]]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([[*PREFIX, *item]])).logits for item in items])
    scorer = MultiItemScorer(patch_model(model, device=device))
    found = torch.tensor(scorer.score(PREFIX, items))
    assert (found - expected.softmax(-1)).abs().max() <= PROBABILITY_MAX_FLOAT32
    with pytest.raises(InputError, match=r"items\[1\] ends in nothing but padding \(pad_token_id"):
        scorer.score([5, 0], [[6], [0]])


def test_the_head_of_an_adapter_is_used() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False)
    wrapped = get_peft_model(random_classifier(num_labels=3), config).eval()
    with torch.no_grad():
        wrapped.base_model.model.score.modules_to_save.default.weight.mul_(-1)
    expected = class_logits(wrapped).softmax(-1)
    found = score(MultiItemScorer(patch_model(wrapped)))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
@pytest.mark.parametrize("fused", [False, True], ids=["counted", "fused"])
def test_a_head_that_loading_drew_is_refused(tmp_path: Path, fused: bool) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        shipped_model_path(), num_labels=2, dtype=torch.float32
    ).eval()
    message = "the checkpoint has no score.weight, so the head of this Qwen3ForSequenceClass"
    for device in DEVICES:
        with pytest.raises(UnsupportedModelError, match=message):
            MultiItemScorer(patch_model(model, device=device))
    # a step of all but the head, and one of all
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    for learns in (False, True):
        with pytest.raises(UnsupportedModelError, match=message):
            MultiItemScorer(model)
        model.score.requires_grad_(learns)
        model(torch.tensor([[1, 2]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    trained = MultiItemScorer(model).score([1], [[2], [3]])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    again = MultiItemScorer(patch_model(loaded.eval())).score([1], [[2], [3]])
    assert torch.allclose(torch.tensor(again), torch.tensor(trained), atol=PROBABILITY_MAX_FLOAT32)


def test_a_checkpoint_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    random_classifier(num_labels=3).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True
    ).eval()
    with pytest.raises(UnsupportedModelError, match=r"the checkpoint has no score\.weight"):
        MultiItemScorer(patch_model(model))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 64), "model: the head's row of class 0 is all zero"),
        (torch.ones(3, 64), r"model: the head's rows of classes \[0, 1, 2\] are not all different"),
        (torch.full((3, 64), torch.nan), "model: the head's row of class 0 is not finite"),
    ],
    ids=["zero", "equal", "nan"],
)
def test_untrained_heads_are_refused(weight: torch.Tensor, message: str) -> None:
    model = random_classifier(num_labels=3)
    model.score.weight = torch.nn.Parameter(weight)
    with pytest.raises(UnsupportedModelError, match=message):
        MultiItemScorer(patch_model(model))


def test_labels_that_do_not_fit() -> None:
    model = patch_model(random_classifier(num_labels=3))
    scorer = MultiItemScorer(model)
    with pytest.raises(InputError, match=r"label_token_ids=\[1, 2\]: Qwen3ForSequenceClassificat"):
        scorer.score(PREFIX, ITEMS, label_token_ids=[1, 2])
    with pytest.raises(InputError, match="scores classes and not tokens; pass labels="):
        MultiItemScorer(model, label_token_ids=[1, 2])
    with pytest.raises(InputError, match=r"labels\[1\]='yes' is not a class of the model; it must"):
        scorer.score(PREFIX, ITEMS, labels=["LABEL_0", "yes"])
    with pytest.raises(InputError, match="names one class twice; name each class once"):
        scorer.score(PREFIX, ITEMS, labels=["LABEL_0", "LABEL_0"])
    with pytest.raises(InputTypeError, match=r"labels\[0\]=0 must be a string, a class's name"):
        scorer.score(PREFIX, ITEMS, labels=[0])  # type: ignore[list-item]
    for call in (scorer.rank, lambda q, d: scorer.predict([(q, d[0])])):
        with pytest.raises(InputError, match=r"compare two classes.* and this scorer has 3; pass"):
            call(PREFIX, ITEMS)
    two = MultiItemScorer(model, labels=["LABEL_0", "LABEL_2"])
    assert len(two.rank(PREFIX, ITEMS)) == len(ITEMS)
    one = MultiItemScorer(model, labels=["LABEL_0"])
    with pytest.raises(InputError, match=r"compare two classes.* and this scorer has 1; pass"):
        one.rank(PREFIX, ITEMS)


def test_heads_that_give_no_distribution_are_refused() -> None:
    model = random_classifier(num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(UnsupportedModelError, match="gives no distribution over classes; use"):
        MultiItemScorer(patch_model(model))
    tagger = AutoModelForTokenClassification.from_config(random_classifier().config).eval()
    with pytest.raises(UnsupportedModelError, match="has no language-model head and is no seq"):
        MultiItemScorer(patch_model(tagger))


def test_the_dense_mask_scores_classes_too() -> None:
    model = random_classifier(num_labels=3)
    expected = class_logits(model).softmax(-1)
    found = score(MultiItemScorer(model, mask_impl="dense"))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
def test_one_warmup_serves_scores_and_plain_calls() -> None:
    from packscore import program_of

    model = random_classifier(num_labels=3)
    scorer = MultiItemScorer(patch_model(model, device="jax"))
    program: Any = program_of(model)
    assert program.warmup(max_tokens=200, plain_calls=True) == 4
    program.strict = True
    scorer.score(PREFIX, ITEMS[:5])
    model(torch.tensor([PREFIX, PREFIX]))
    assert program.compile_count == 4


@pytest.mark.parametrize("prefix", [[], [5, 0]], ids=["none", "ends-in-padding"])
def test_a_stream_and_a_held_query_before_which_is_nothing_to_read(prefix: list[int]) -> None:
    """Classes are read in the items, and the query need hold no token that is read."""
    model, items = random_classifier(), [[7], [8, 9]]
    scorer = MultiItemScorer(patch_model(model))
    expected = torch.tensor(scorer.score(prefix, items))
    with scorer.prefix(prefix) as held:
        found = [list(scorer.score_stream(prefix, iter(items))), held.score(items)]
    for scores in found:
        assert (torch.tensor(scores) - expected).abs().max() <= PROBABILITY_REORDERED
