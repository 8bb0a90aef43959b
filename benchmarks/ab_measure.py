"""The A/B tables' measured part: the flows on a CPU, same weights, a new query in every run.

Each round draws a query and items that no system has seen, runs every system on them in turn, and
compares all their scores with one-by-one's on the first items. Nothing is timed before one round
has agreed, and a round that disagrees ends it all: there is no speed without the right scores.
In torch times are the processor's, of the one thread that runs, so that other work on the machine
counts little; those of programs are by the clock, for the host does not see what a device does.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from cpu_peers import LABELS, HuggingFace, Ids, System, Workload, random_ids
from packscore import MultiItemScorer, patch_model

BASE = "one by one"


class WrongScoresError(RuntimeError):
    """A system's scores are not those of one-by-one."""


def dense_extend(peer: HuggingFace) -> System:
    """The query into Hugging Face's own cache, then all items packed under one dense mask."""

    def score(prefix: Ids, items: list[Ids]) -> torch.Tensor:
        cache = DynamicCache(config=peer.decoder.config)
        peer.decoder(torch.tensor([prefix]), past_key_values=cache)
        segment = torch.cat([torch.full((len(item),), k) for k, item in enumerate(items)])
        own = (segment[:, None] == segment).tril()
        mask = torch.cat([own.new_ones(len(segment), len(prefix)), own], dim=1)
        hidden = peer.decoder(
            torch.tensor([[token for item in items for token in item]]),
            attention_mask=mask[None, None],
            position_ids=torch.cat([len(prefix) + torch.arange(len(x)) for x in items])[None],
            past_key_values=cache,
        ).last_hidden_state
        ends = torch.tensor([len(item) for item in items]).cumsum(0) - 1
        return peer.labels(hidden[0, ends])

    return score


def systems_of(model: PreTrainedModel, device: str | None = None) -> dict[str, System]:
    """Every system of the tables by name, on copies of one model's weights.

    Args:
      model: the weights.
      device: as in `patch_model`: programs compute all four ways; None: torch does.
    """
    peer = HuggingFace(model)
    patched = patch_model(copy.deepcopy(model), device=device)
    segment = MultiItemScorer(patched, label_token_ids=LABELS)
    shared = patched if device else model  # programs of both masks share the weights
    dense = MultiItemScorer(shared, mask_impl="dense", label_token_ids=LABELS)

    def packed(scorer: MultiItemScorer) -> System:
        return lambda prefix, items: torch.tensor(
            scorer.score(prefix, items, apply_softmax=True, flow="packed")
        )

    def extend(scorer: MultiItemScorer) -> System:
        def score(prefix: Ids, items: list[Ids]) -> torch.Tensor:
            with scorer.prefix(prefix) as held:
                return torch.tensor(held.score(items, apply_softmax=True))

        return score

    return {
        BASE: peer.one_by_one,
        "dense packed": packed(dense),
        # in torch a dense mask keeps no pages
        "dense prefill + extend": extend(dense) if device else dense_extend(peer),
        "segment packed": packed(segment),
        "segment prefill + extend": extend(segment),
    }


def inputs_of(workload: Workload, number: int) -> tuple[Ids, list[Ids]]:
    """The query and items of one round, unlike those of any other."""
    first = number * (len(workload.item_lens) + 1)
    items = [random_ids(n, seed=first + k + 1) for k, n in enumerate(workload.item_lens)]
    return random_ids(workload.prefix_len, seed=first), items


@torch.inference_mode()
def measure(
    systems: dict[str, System],
    workload: Workload,
    rounds: int,
    max_difference: float,
    clock: Callable[[], float] = time.process_time,
) -> list[dict[str, Any]]:
    """Check, then time, every system, in an order that is turned around every round.

    Raises:
      WrongScoresError: scores differ; nothing is returned.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    worst = dict.fromkeys(systems, 0.0)
    for number in range(rounds + 1):  # the first warms up and is checked alone
        prefix, items = inputs_of(workload, number)
        scores = {}
        for name in list(systems)[:: -1 if number % 2 else 1]:
            chosen = items[: workload.sampled_items] if name == BASE else items
            start = clock()
            scores[name] = systems[name](prefix, chosen)
            if number:
                scale = workload.scale if name == BASE else 1.0
                seconds[name].append((clock() - start) * scale)
        for name, found in scores.items():
            expected = scores[BASE]
            difference = float((found[: len(expected)] - expected).abs().max())
            if not difference <= max_difference:  # NaN is no agreement
                raise WrongScoresError(
                    f"{name} is {difference:.2g} off one-by-one, more than {max_difference}, on "
                    f"{workload.name}: no speed is reported"
                )
            worst[name] = max(worst[name], difference)
    return [row_of(name, seconds, worst[name], workload) for name in systems]


def row_of(
    name: str, seconds: dict[str, list[float]], worst: float, workload: Workload
) -> dict[str, Any]:
    """What one system took."""
    times, count, sampled = seconds[name], len(workload.item_lens), workload.sampled_items
    ratios = [base / own for base, own in zip(seconds[BASE], times, strict=True)]
    middle = 1e3 * statistics.median(times)
    return {
        "system": name,
        "ms": middle,
        "ms_min": 1e3 * min(times),
        "ms_max": 1e3 * max(times),
        "items_per_s": 1e3 * count / middle,
        "times_one_by_one": statistics.median(ratios),
        "times_one_by_one_min": min(ratios),
        "times_one_by_one_max": max(ratios),
        "max_difference": worst,
        "scaled_from_items": sampled if name == BASE and sampled < count else None,
    }
