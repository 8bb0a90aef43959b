"""JevBench's 50 laws of coherent decisions, asked of `scorer.decide` in this process.

    pip install jevbench==0.1.0
    python benchmarks/jevbench_laws.py          # the shipped model, a random one, a control

JevBench (https://github.com/JevBench/jevbench) knows no right answers. It edits questions, never
the state, and looks whether answers keep to each other. The five laws of the group BAT say that an
answer does not move with the other questions of a request: those hold by construction here, of any
model, and the command ends with 1 where one does not. The others are about the model: a small one,
or a random one, breaks many. The control is the random model with all questions written into the
state, as in one prompt for all; it has to break BAT (but `duplicate_question`, whose two copies are
in one request).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import provenance
from packscore import MultiItemScorer, patch_model, shipped_model_path

Answers = dict[str, Any]
Model = Callable[[Any, Mapping[str, Any]], Answers]

# Questions share one state, and are computed together or alone in another order of sums.
SAME_ANSWER = 1e-5
TOLERANCE = 0.05  # JevBench's own


def answering(scorer: MultiItemScorer) -> Model:
    """What JevBench calls: a state and System One's questions to System One's answers."""

    def answers(state: Any, questions: Mapping[str, Any]) -> Answers:
        found: Answers = scorer.decide(state, dict(questions)).to_systemone()["answers"]
        return found

    return answers


def together(scorer: MultiItemScorer) -> Model:
    """The control: every question is read behind all of them."""
    alone = answering(scorer)
    return lambda state, questions: alone([state, dict(questions)], questions)


def shipped(name: str) -> MultiItemScorer:
    """The model inside packscore, or another, in float32 on the CPU."""
    return MultiItemScorer.from_pretrained(name, device="cpu", dtype="float32")


def random_model(name: str) -> MultiItemScorer:
    """The same shape with large random weights, whose answers lie far apart."""
    tokenizer: Any = shipped(name).tokenizer
    config = AutoConfig.from_pretrained(name)
    config.initializer_range = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return MultiItemScorer(patch_model(model), tokenizer)


def table(report: Any) -> list[tuple[str, str, int, int, float]]:
    """(group, law, tests, how many broke it, largest deviation) of every law that was tested."""
    from jevbench.results import card

    return [
        (row["group"], row["relation"], row["n"], row["violations"], row["worst"][0]["deviation"])
        for row in card(report.result, fixed=TOLERANCE)
    ]


def main() -> None:
    """Run the laws on each model and print what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(shipped_model_path()))
    parser.add_argument("--suite", default="jevbench-mini")
    args = parser.parse_args()
    import jevbench

    print(provenance.today(), provenance.versions("jevbench", "packscore", "torch", "transformers"))
    random = random_model(args.model)
    runs = {
        "the model": (answering(shipped(args.model)), {}),
        "random weights": (answering(random), {}),
        "control": (together(random), {"dimensions": ["BAT"]}),
    }
    held = True
    for name, (model, only) in runs.items():
        report = jevbench.evaluate(
            jevbench.from_callable(model), args.suite, cache=":memory:", bootstrap=0, **only
        )
        rows = table(report)
        print(f"\n{name}: {len(report.errors)} errors")
        print(f"{'group':22} {'law':32} {'tests':>5} {'broken':>6} {'largest':>8}")
        for group, law, tests, broken, largest in rows:
            print(f"{group:22} {law:32} {tests:5} {broken:6} {largest:8.1e}", flush=True)
        isolation = [row for row in rows if row[0].startswith("BAT")]
        if name == "control":
            held &= any(broken for *_, broken, _ in isolation)
        else:
            held &= not any(broken or largest > SAME_ANSWER for *_, broken, largest in isolation)
        held &= bool(isolation) and not report.errors
    print(
        "\nBAT holds, and the control breaks it" if held else "\nBAT DOES NOT HOLD, or no control"
    )
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
