"""Every way to compute scores, beside the model's own eager attention, one item at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from packscore.errors import InputError, UnsupportedModelError
from packscore.selftest.report import Check
from packscore.selftest.subjects import Subject, checked_request
from packscore.selftest.ways import FLOWS, LABEL_IDS, Way
from packscore.text.labels import Labels
from packscore.verify import TOLERANCES, eager_twin_of, log_probs_one_by_one


def checks(subject: Subject, ways: Sequence[Way]) -> Iterator[Check]:
    """Every flow of every scorer.

    Args:
      subject: the model as it was loaded.
      ways: scorers of copies of it.
    """
    model = subject.model
    query, items = checked_request(model.config.vocab_size)
    eager = eager_twin_of(model)
    labels = Labels(tuple((index,) for index in LABEL_IDS))
    request = ways[0].scorer.encode(query, items)
    expected = log_probs_one_by_one(eager, request, labels).softmax(-1)
    bound = TOLERANCES[model.dtype].max_abs
    dtype = str(model.dtype).removeprefix("torch.")
    for way in ways:
        for flow, call in FLOWS.items():
            found, refused = None, None
            way.scorer.clear_prefixes()
            try:
                scores = torch.tensor(call(way.scorer, query, items), dtype=torch.float64)
                found = float((scores - expected).abs().max())
            except (InputError, UnsupportedModelError) as error:
                refused = str(error)
            yield Check(subject.name, dtype, way.runs, way.mask, flow, found, bound, refused)
