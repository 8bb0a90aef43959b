"""Many typed questions about many states on this CPU: `decide_many` beside what there was before.

    python benchmarks/decisions_cpu.py --threads 2         # 400 states x 5 questions, half an hour
    python benchmarks/decisions_cpu.py --states 16

The shape is that of LocalLLaMA/typed-decisions: 400 states, five questions each (nouls, choices, a
score). The texts and their lengths, of support tickets, are drawn from a seed. The model is four
layers of Qwen3-0.6B's shape with random weights, behind the shipped model's tokenizer. All ways
read the same ids, and take turns, group of states by group, in an order that is turned around each
time: answers are compared with those of one prompt a question, tokens that ran are counted. What is
reported is the median over groups of each way's time divided by decide_many's for the same group,
the range that nine of ten groups lie in, and tokens and seconds of all groups together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, Qwen3ForCausalLM

import provenance
from packscore import (
    Choice,
    DecisionPrompt,
    MultiItemScorer,
    Noul,
    Score,
    patch_model,
    shipped_model_path,
)
from workloads import make_model

MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
PARTS = (
    "the parcel",
    "my account",
    "the invoice of last month",
    "a refund",
    "the new release",
    "our team",
    "the second delivery",
)
ACTS = (
    "has not arrived",
    "was charged twice",
    "cannot be opened",
    "is broken again",
    "works at last",
    "was promised for Monday",
)


class Asked(NamedTuple):
    """One state with its questions, as ids."""

    prefix: list[int]
    items: list[list[int]]
    labels: list[list[int]]


class Ran(NamedTuple):
    """What a way gave for some states: probabilities of the options, and tokens computed."""

    probabilities: list[torch.Tensor]  # one a question, float32[num_options]
    tokens: int


Way = Callable[[int, int], Ran]  # of the states from .. up to


def states(count: int, seed: int) -> list[dict[str, Any]]:
    """Tickets of 30 to 200 words."""
    rng = random.Random(seed)

    def sentence() -> str:
        return f"{rng.choice(PARTS)} {rng.choice(ACTS)}, {rng.choice(PARTS)} {rng.choice(ACTS)}."

    return [
        {
            "subject": sentence(),
            "body": " ".join(sentence() for _ in range(rng.randint(2, 16))),
            "customer_for_years": rng.randint(0, 20),
        }
        for _ in range(count)
    ]


QUESTIONS = {
    "refund": Noul("Does the customer ask for money back?"),
    "angry": Noul("Is the customer angry?", {"true": "insults, threats, capital letters"}),
    "topic": Choice(
        "What is the ticket about?",
        {
            "shipping": "parcels that are late, lost or damaged",
            "billing": "invoices, charges and refunds",
            "access": "accounts that cannot be opened",
            "product": "something that is broken",
            "other": None,
        },
    ),
    "team": Choice("Who should answer?", {"first line": None, "second line": None, "legal": None}),
    "urgency": Score("How urgent is it?", ["can wait", "this week", "today", "at once"]),
}


class Plain:
    """The ways of the unpatched model; only the rows of the labels are computed of the head."""

    def __init__(self, model: Qwen3ForCausalLM, asked: list[Asked]) -> None:
        self.decoder, self.head, self.asked = model.get_decoder(), model.lm_head.weight, asked

    def options(self, hidden: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """[hidden_size] -> float32[num_options]."""
        return (self.head[labels].float() @ hidden.float()).softmax(-1)

    def one_prompt_a_question(self, start: int, stop: int) -> Ran:
        """A whole prompt for each question."""
        found, tokens = [], 0
        for one in self.asked[start:stop]:
            for item, labels in zip(one.items, one.labels, strict=True):
                ids = torch.tensor([one.prefix + item])
                hidden = self.decoder(ids, use_cache=False).last_hidden_state[0, -1]
                found.append(self.options(hidden, labels))
                tokens += ids.numel()
        return Ran(found, tokens)

    def prefix_cache(self, start: int, stop: int) -> Ran:
        """Each state once, then its questions as a padded batch behind copies of its cache."""
        found, tokens = [], 0
        for one in self.asked[start:stop]:
            cache, n = DynamicCache(config=self.decoder.config), len(one.items)
            self.decoder(torch.tensor([one.prefix]), past_key_values=cache)
            cache.batch_repeat_interleave(n)
            longest = max(map(len, one.items))
            ids = torch.tensor([item + [0] * (longest - len(item)) for item in one.items])
            mask = torch.tensor(
                [[1] * (len(one.prefix) + len(x)) + [0] * (longest - len(x)) for x in one.items]
            )
            rows = self.decoder(ids, attention_mask=mask, past_key_values=cache).last_hidden_state
            for row, item, labels in zip(rows, one.items, one.labels, strict=True):
                found.append(self.options(row[len(item) - 1], labels))
            tokens += len(one.prefix) + ids.numel()
        return Ran(found, tokens)


def packed(scorer: MultiItemScorer, texts: list[dict[str, Any]], *, at_once: int) -> Way:
    """packscore's own call, from texts to answers: encoding is in its time, not in the others'."""

    def run(start: int, stop: int) -> Ran:
        scorer.clear_prefixes()
        found: list[torch.Tensor] = []
        tokens = 0
        for first in range(start, stop, at_once):
            group = [(text, QUESTIONS) for text in texts[first : min(first + at_once, stop)]]
            for decision in scorer.decide_many(group):
                tokens += decision.usage.computed_tokens + decision.usage.padding_tokens
                for answer in decision.answers.values():
                    ps = getattr(answer, "probabilities", None)
                    values = [answer.noul, 1 - answer.noul] if ps is None else list(ps.values())
                    found.append(torch.tensor(values))
        return Ran(found, tokens)

    return run


@dataclass
class Measured:
    """What one way took."""

    seconds: list[float] = field(default_factory=list)  # of each group of states
    tokens: int = 0
    difference: float = 0.0  # of a probability from that of one prompt a question, at most


def measure(ways: dict[str, Way], count: int, group: int, most: float) -> dict[str, Measured]:
    """Run every way over every group of states, and compare their answers."""
    found = {name: Measured() for name in ways}
    for way in ways.values():
        way(0, 1)  # what only a first call does
    for i, start in enumerate(range(0, count, group)):
        ran = {}
        for name in list(ways)[:: -1 if i % 2 else 1]:
            began = time.perf_counter()
            ran[name] = ways[name](start, min(start + group, count))
            found[name].seconds.append(time.perf_counter() - began)
        expected = ran["one prompt a question"].probabilities
        for name, own in ran.items():
            pairs = zip(own.probabilities, expected, strict=True)
            worst = max(float((one - other).abs().max()) for one, other in pairs)
            assert worst <= most, (name, start, worst)
            found[name].difference = max(found[name].difference, worst)
            found[name].tokens += own.tokens
    return found


@torch.inference_mode()
def main() -> None:
    """Check, count, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--states", type=int, default=400)
    parser.add_argument("--group", type=int, default=8, help="states of one decide_many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(json.dumps(provenance.made("benchmarks/decisions_cpu.py", "packscore", "torch")))

    plain = make_model(dtype)
    tokenizer: Any = MultiItemScorer.from_pretrained(shipped_model_path(), device="meta").tokenizer
    patched = patch_model(make_model(dtype))
    segment = MultiItemScorer(patched, tokenizer)
    dense = MultiItemScorer(patched, tokenizer, mask_impl="dense")
    texts = states(args.states, seed=0)
    prompt, asked = DecisionPrompt.of(tokenizer), []
    for text in texts:
        request = segment.encode_questions(text, QUESTIONS)
        labels = [
            [ids[0] for ids in prompt.render(name, question)[0].labels]
            for name, question in QUESTIONS.items()
        ]
        asked.append(Asked(request.prefix.tolist(), [x.tolist() for x in request.items], labels))
    lens = sorted(len(one.prefix) for one in asked)
    print(
        f"{args.states} states of {lens[0]} to {lens[-1]} tokens, {len(QUESTIONS)} questions each"
    )
    others = Plain(plain, asked)
    ways: dict[str, Way] = {
        "decide_many": packed(segment, texts, at_once=args.group),
        "decide_many, dense mask": packed(dense, texts, at_once=1),
        "one prompt a question": others.one_prompt_a_question,
        "prefix cache + batch": others.prefix_cache,
    }
    found = measure(ways, args.states, args.group, MAX_DIFFERENCE[dtype])
    print(f"\n{'way':24} {'tokens':>9} {'off by':>7} {'seconds':>8} {'x decide_many':>13} 9 of 10")
    for name, own in found.items():
        pairs = zip(own.seconds, found["decide_many"].seconds, strict=True)
        ratios = sorted(took / least for took, least in pairs)
        aside = len(ratios) // 20
        print(
            f"{name:24} {own.tokens:9,} {own.difference:7.0e} {sum(own.seconds):8.1f}"
            f" {statistics.median(ratios):13.2f} {ratios[aside]:.2f}-{ratios[-1 - aside]:.2f}",
        )


if __name__ == "__main__":
    main()
