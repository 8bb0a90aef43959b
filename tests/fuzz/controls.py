"""Mends taken out one at a time, by name; the machine has to find that each is gone.

`python tests/fuzz/controls.py` says after how many examples.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import logging
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drive import drive
from hypothesis import Phase
from ledger import BooksError, HungError, Ledger, LostError, WrongError

from packscore import core, patching
from packscore.flows import page_pool
from packscore.model import weight_watch
from packscore.model.family import output_head
from packscore.model.label_head import LinearHead
from packscore.model.weight_watch import WeightWatch
from packscore.torch_engine import engine as torch_engine

FAULTS = (WrongError, LostError, HungError, BooksError)
MOST_EXAMPLES = 400
Mend = Callable[[pytest.MonkeyPatch], None]
CONTROLS: dict[str, Mend] = {}


def control(take_out: Mend) -> Mend:
    CONTROLS[take_out.__name__] = take_out
    return take_out


@control
def no_values_are_sampled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_watch._Sample, "differs", lambda _: False)


@control
def no_steps_and_no_values(patch: pytest.MonkeyPatch) -> None:
    """Each sees fused steps by itself in models as small as these."""
    no_values_are_sampled(patch)
    patch.setattr(WeightWatch, "_was_trained", lambda *_: False)


@control
def pages_by_layer_idx(patch: pytest.MonkeyPatch) -> None:
    attend = patching.packed_attention

    def by_number(base: str, module: Any, *args: Any, kv_pages: Any = None, **options: Any) -> Any:
        if kv_pages is not None:
            number = module.layer_idx
            kv_pages = SimpleNamespace(pages=kv_pages.pages, next_layer=lambda: number)
        return attend(base, module, *args, kv_pages=kv_pages, **options)

    patch.setattr(patching, "packed_attention", by_number)


@control
def modules_and_dtypes_are_not_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WeightWatch, "_are_others", lambda *_: False)


@control
def nothing_is_foreign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_engine, "foreign_part", lambda *_: None)


@control
def the_head_is_looked_up_once(patch: pytest.MonkeyPatch) -> None:
    head = functools.cached_property(lambda self: output_head(self._model))
    head.__set_name__(LinearHead, "_head")
    patch.setattr(LinearHead, "_head", head)


@control
def parts_in_train_mode_score(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core, "random_part", lambda model: "" if model.training else None)


@control
def autocast_is_no_part_of_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_watch, "_autocast", lambda: ())


@control
def dropped_leases_are_not_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_pool, "finalize", lambda *_: SimpleNamespace())


@control
def pickles_do_not_register(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patching, "_unpickled", patching.PatchedConfig)


def examples_until_found(name: str, number: int = 0) -> tuple[int, BaseException | None]:
    """How many examples the machine takes without a mend, and what it says then."""
    ledger = Ledger()
    with pytest.MonkeyPatch.context() as patch:
        CONTROLS[name](patch)
        try:
            drive(
                "torch",
                ledger,
                number,
                max_examples=MOST_EXAMPLES,
                stateful_step_count=20,
                phases=[Phase.generate],
            )
        except FAULTS as fault:
            return ledger.examples, fault
    return ledger.examples, None


def main() -> int:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    missed = 0
    for name in sys.argv[1:] or CONTROLS:
        count, fault = examples_until_found(name)
        missed += fault is None
        says = f"{type(fault).__name__}: {str(fault)[:110]}" if fault else "not found"
        print(f"{name:38} {count:4} examples  {says}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
