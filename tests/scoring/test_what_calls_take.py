"""Every option and every kind of input of every public call: taken, or refused before a forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from input_tables import CALLS, KINDS, PAGE, WRONG, forwards, make_scorer, options_of, page
from packscore import InputError, InputTypeError, MultiItemScorer
from packscore.inputs import OPTIONS


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return make_scorer()


@pytest.mark.parametrize(
    ("call", "option"), [found[:2] for found in options_of()], ids=lambda value: str(value)
)
def test_an_option_of_a_wrong_type_or_value_is_refused(
    scorer: MultiItemScorer, call: str, option: str
) -> None:
    (make,) = (found[2] for found in options_of() if found[:2] == (call, option))
    for value in WRONG[option]:

        def run(value: Any = value) -> None:
            with pytest.raises((InputError, InputTypeError), match=rf"^{option}=") as info:
                make(scorer, value)
            assert "must " in str(info.value) or "gives a " in str(info.value)

        # the query is held before the call that is tried
        assert forwards(scorer.model, run) == int(call == "prefix.score")


def test_every_option_is_in_the_table() -> None:
    assert set(WRONG) == set(OPTIONS)
    tried = {option for _, option, _ in options_of()}
    assert set(OPTIONS) - tried == {"batch_size", "num_labels", "plain_calls", "return_items"}


REMEDIES = {
    "pandas DataFrame": r"is a DataFrame, which has columns; pass one, such as \S+=table\['text'\]",
    "Dataset": r"is a Dataset, which has columns; pass one, such as \S+=table\['text'\]",
    "dict": "is a dict, which has keys; pass a list",
    "UserDict": "is a UserDict, which has keys",
    "BatchEncoding": "is a BatchEncoding, which has keys",
    "set": "is a set, which has no order",
    "frozenset": "is a frozenset, which has no order",
    "one text": "is a str; pass a list",
    "half a surrogate pair in a list": r"\[1\].* has half of a surrogate pair",
    "None in a list": r"\[1\].*=None",
    "number in a list": r"\[1\].*=3.5",
}


@pytest.mark.parametrize("call", [*CALLS])
@pytest.mark.parametrize("kind", [*REMEDIES])
def test_what_only_looks_like_a_list_is_refused_with_its_remedy(
    scorer: MultiItemScorer, kind: str, call: str
) -> None:
    def run() -> None:
        with pytest.raises((InputError, InputTypeError), match=REMEDIES[kind]):
            CALLS[call](scorer, KINDS[kind]())

    # a query is held before its items come
    assert forwards(scorer.model, run) <= int(call in ("prefix.score", "score_stream"))


def test_the_page_is_what_the_calls_do(scorer: MultiItemScorer) -> None:
    assert PAGE.read_text() == page(scorer)


def test_arrays_and_numpy_numbers_are_what_they_hold(scorer: MultiItemScorer) -> None:
    expected = scorer.score("tea?", ["tea", "a boat"])
    for items in (np.array(["tea", "a boat"]), pd.Series(["tea", "a boat"], index=[9, 1])):
        assert scorer.score("tea?", items) == expected
    ranked = scorer.rank("tea?", ["tea", "a boat", "x"], top_k=np.int64(2))
    assert len(ranked) == 2
    assert scorer.score("tea?", ["tea"], apply_softmax=np.bool_(True))
    pairs = np.array([["tea?", "tea"], ["tea?", "a boat"]])
    assert scorer.predict(pairs).shape == (2,)
    ids = torch.tensor([5, 17])
    by_tensor = scorer.score("tea?", ["tea"], label_token_ids=ids)
    assert by_tensor == scorer.score("tea?", ["tea"], label_token_ids=[5, 17])
    assert by_tensor == scorer.score("tea?", ["tea"], label_token_ids=ids.numpy())
