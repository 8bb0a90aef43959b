"""sentence-transformers' trainer with `packscore.CrossEncoder` inside, against its own.

Both are trained from the same folder with the same seeds. What every evaluation scores is compared,
and so is what the training leaves: weights of an evaluation before would show in the first, a
forward of its own in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from torch import nn
from transformers import set_seed

from helpers import random_classifier
from packscore import CrossEncoder
from packscore.model.weight_watch import SIGNS, _Sample
from tolerances import CLASS_LOGIT_BFLOAT16, CLASS_LOGIT_FLOAT32

QUERIES = ("delete a directory tree", "shuffle a list", "open a compressed file")
DOCUMENTS = (
    "Recursively delete a directory tree.",
    "Shuffle list x in place, and return None.",
    "Open a gzip-compressed file in binary or text mode.",
    " Rename a file\nor directory. ",
)
PAIRS = [(query, document) for document in DOCUMENTS for query in QUERIES]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier of one class with its tokenizer, as it is saved."""
    path = str(tmp_path_factory.mktemp("classifier"))
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    random_classifier(num_labels=1, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Recorder(BaseEvaluator):
    """An evaluator that keeps the scores behind its figure."""

    primary_metric = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Any] = []

    def __call__(self, model: Any, *_: Any, **__: Any) -> dict[str, float]:
        self.scores.append(model.predict(PAIRS, activation_fn=nn.Identity()))
        return {"mean": float(self.scores[-1].mean())}


def with_lora(model: sentence_transformers.CrossEncoder) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))


def trained(
    kind: type[sentence_transformers.CrossEncoder],
    folder: str,
    out: Path,
    prepare: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Scores of every evaluation, one before the training and one behind it, and the weights."""
    set_seed(0)
    model = kind(folder, model_kwargs={"dtype": torch.float32})
    prepare(model)
    columns = {name: [pair[i] for pair in PAIRS] for i, name in enumerate(("query", "document"))}
    data = Dataset.from_dict({**columns, "label": [float(k % 4 == 0) for k in range(len(PAIRS))]})
    schedule = {"max_steps": NUM_STEPS, "eval_strategy": "steps", "eval_steps": 1}
    where = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    saving = {"output_dir": str(out / kind.__module__), "save_strategy": "no"}
    arguments = CrossEncoderTrainingArguments(**{**schedule, **where, **saving, **options})
    evaluator = Recorder()
    evaluator(model)
    CrossEncoderTrainer(
        model,
        arguments,
        train_dataset=data,
        evaluator=evaluator,
        loss=BinaryCrossEntropyLoss(model),
    ).train()
    evaluator(model)
    return evaluator.scores, dict(model.named_parameters())


def compared(folder: str, out: Path, **options: Any) -> tuple[list[float], list[float]]:
    """How far the scores of each evaluation are from theirs, and theirs from the first ones."""
    (got, weights), (want, expected) = (
        trained(kind, folder, out, **options)
        for kind in (CrossEncoder, sentence_transformers.CrossEncoder)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    errors = [float(np.abs(one - other).max()) for one, other in zip(got, want, strict=True)]
    return errors, [float(np.abs(one - want[0]).max()) for one in want]


BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "metric_for_best_model": "eval_mean",
}
TRAININGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "mid-epoch": {
        "max_steps": -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "eval_steps": 2,
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "best-at-end": {**BEST, "learning_rate": 0.01, "greater_is_better": True},
    "lora": {"prepare": with_lora, "learning_rate": 0.01},
    "lora-best-at-end": {**BEST, "prepare": with_lora, "learning_rate": 0.01},
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS.keys())
def test_every_evaluation_scores_the_model_of_its_step(
    folder: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    errors, moves = compared(folder, tmp_path, **options)
    assert len(errors) >= 5
    assert max(errors) <= CLASS_LOGIT_FLOAT32
    # what the comparison rests on: scores of a step before would be far off
    assert min(moves[1:]) > 0.1


def test_under_autocast_evaluations_are_as_near_as_bfloat16_is(folder: str, tmp_path: Path) -> None:
    """The trainer scores under autocast, the evaluations around it are in float32."""
    errors, _ = compared(folder, tmp_path, bf16=True)
    assert errors[0] <= CLASS_LOGIT_FLOAT32
    assert max(errors) <= CLASS_LOGIT_BFLOAT16


@pytest.mark.parametrize("left", ["steps", "forwards", "values", "nothing"])
def test_each_sign_of_a_step_suffices(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Optimizer steps, forwards in train mode, values; the control is a watch that sees nothing."""
    since = SIGNS.since

    def some(count: int) -> Any:
        steps, forwards = since(count)
        return steps if left == "steps" else [], forwards if left == "forwards" else []

    monkeypatch.setattr(SIGNS, "since", some)
    if left != "values":
        monkeypatch.setattr(_Sample, "differs", lambda _: False)
    errors, _ = compared(folder, tmp_path)
    if left == "nothing":
        assert max(errors) > 0.1
    else:
        assert max(errors) <= CLASS_LOGIT_FLOAT32
