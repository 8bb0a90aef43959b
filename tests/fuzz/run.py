"""The machine for as long as one likes: `python tests/fuzz/run.py --minutes 60 --seed 7`.

It goes on behind a failure, with other examples, and prints the line that makes each one again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# as the suite has it, and before transformers and jax load
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import faulthandler
import itertools
import json
import logging
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from drive import drive
from hypothesis import Phase
from ledger import BooksError, HungError, Ledger, LostError, WrongError

# engines of one round after another: most of the time goes to packed attention in torch
ENGINES = ("torch", "torch", "dense", "torch", "torch", "jax")
EXAMPLES = {"torch": 10, "dense": 10, "jax": 2}
VERDICTS = {WrongError: "wrong", LostError: "lost", HungError: "hung", BooksError: "books"}
STUCK_SECONDS = 900  # of a round: then not even an alarm gets through


def run_round(number: int, engine: str, ledger: Ledger, shrink: bool) -> BaseException | None:
    """One set of examples; the failure it ends with."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    examples = EXAMPLES[engine]
    try:
        drive(engine, ledger, number, max_examples=examples, stateful_step_count=25, phases=phases)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    finally:
        ledger.is_closed = False
    return None


def rounds(first: int, engines: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    for k in itertools.count():
        yield first * 100_000 + k, engines[k % len(engines)]


def told(error: BaseException, number: int, engine: str) -> str:
    """What failed, the steps that lead to it, and the command that takes them again."""
    # a failure of hypothesis' own, or of this code, has a trace of its own to show
    known = isinstance(error, tuple(VERDICTS))
    trace = "" if known else "".join(traceback.format_exception(error)[-6:])
    steps = "\n".join(getattr(error, "__notes__", []))
    again = f"python tests/fuzz/run.py --round {number} --engine {engine}"
    return f"{type(error).__name__}: {error}\n{trace}{steps}\nreproduce: {again}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=sorted(set(ENGINES)), help="this one alone")
    parser.add_argument("--round", type=int, help="one round alone, as a failure names it")
    parser.add_argument("--no-shrink", action="store_true", help="show failures as they came")
    parser.add_argument("--output", type=Path, help="a file that gets the result, a line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    engines = (given.engine,) if given.engine else ENGINES
    todo = rounds(given.seed, engines)
    if given.round is not None:
        todo = iter([(given.round, engines[0])])
    ledger, found, start = Ledger(), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="packscore_fuzz_") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for number, engine in todo:
            if time.monotonic() - start > 60 * given.minutes:
                break
            faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
            error = run_round(number, engine, ledger, not given.no_shrink)
            faulthandler.cancel_dump_traceback_later()
            if error is not None:
                found[VERDICTS.get(type(error), "other")] += 1
                print(told(error, number, engine), flush=True)
    minutes = (time.monotonic() - start) / 60
    result = {"seed": given.seed, "minutes": round(minutes, 2), "failures": dict(found)}
    print(ledger.tables())
    print(json.dumps(result | {"p10_p50_p90_max": ledger.quantiles()}))
    verdicts = ", ".join(f"{found[name]} {name}" for name in (*VERDICTS.values(), "other"))
    print(f"{ledger.scores:,} scores compared in {ledger.examples:,} examples: {verdicts}")
    if given.output is not None:
        with given.output.open("a") as file:
            file.write(json.dumps(result | ledger.as_json()) + "\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
