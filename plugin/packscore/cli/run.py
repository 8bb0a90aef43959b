"""One run over a file: read, score, write, and go on where an earlier run stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from packscore import InputError, InputTypeError, NonFiniteScoreError
from packscore.cli.columns import Shape, label_columns
from packscore.cli.convert import convert
from packscore.cli.exits import ExitCode, tell
from packscore.cli.load import Loaded
from packscore.cli.options import ModelOptions
from packscore.cli.plan import priced
from packscore.cli.tasks import Task
from packscore.files.failures import RunError
from packscore.files.file_plan import FilePlan, begin, mark_complete, model_fingerprint
from packscore.files.inputs import Input
from packscore.files.journal import FileJournal, Journal, StreamJournal, UnwritableError
from packscore.files.look import ReadOptions
from packscore.files.records import BadRecord, Readable
from packscore.files.sources import is_stream, open_sink

# Of a run, before it says how long it is going to take.
TIMED_SECONDS = 5.0
# What one record may be refused for; anything else stops the run.
RECORD_ERRORS = (
    *(InputError, InputTypeError, NonFiniteScoreError),
    *(MemoryError, torch.OutOfMemoryError),  # packscore's own are MemoryErrors too
)


@dataclass
class Counts:
    """What a run did."""

    records: int = 0
    items: int = 0
    resumed: int = 0
    truncated: int = 0
    special: int = 0
    non_finite: int = 0


def settings_of(
    loaded: Loaded,
    options: ModelOptions,
    read: ReadOptions,
    input_format: str,
    task: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the output depends on, beside the input itself."""
    return {
        **task,
        "model": model_fingerprint(options.model, loaded.commit),
        "device": loaded.device,
        "dtype": loaded.dtype,
        "prompt": loaded.spec.spelled,
        "instruction": options.instruction,
        "label_token_ids": loaded.scorer.label_token_ids,
        "max_tokens": options.max_tokens,
        "on_long": options.on_long,
        "on_non_finite": options.on_non_finite,
        "format": input_format,
        **read.names.settings(),
        "delimiter": read.delimiter,
        "group": read.group,
        "max_line_bytes": read.max_line_bytes,
    }


def run_file(
    plan: FilePlan,
    entries: Input,
    task: Task,
    settings: dict[str, Any],
    shape: Shape,
    *,
    quiet: bool,
    foretell: Callable[[], object] = bool,
    price_per_hour: float | None = None,
) -> ExitCode:
    """Score a file, which is open, into another, which is locked.

    Args:
      plan: the files.
      entries: the input.
      task: what is made of a record.
      settings: all that the output depends on.
      shape: of the results.
      quiet: tell nothing.
      foretell: called before the first record, where there is anything to do.
      price_per_hour: of the machine.

    Returns:
      OK, or BAD_RECORDS where records went to the error file.

    Raises:
      RunError: the run cannot go on; what was written stays.
    """
    if not plan.streams and begin(plan, settings):
        bad = plan.error_file is not None and plan.error_file.exists()
        tell(f"{plan.output} is complete; nothing to do")
        if plan.converts:
            plan.results.unlink(missing_ok=True)
        return ExitCode.BAD_RECORDS if bad else ExitCode.OK
    foretell()
    started = time.perf_counter()
    with open_journal(plan) as journal:
        reserved = label_columns(plan.output_format, shape.labels)
        timing = Timing(entries, task.counted, price_per_hour, quiet=quiet)
        try:
            counts = _run_all(entries, journal, task, reserved, timing)
        except KeyboardInterrupt:
            _tell_how_to_go_on(plan)
            raise
    in_json = list[str]()
    if plan.converts:
        in_json = convert(plan.results, Path(plan.output), plan.output_format, shape)
    if not plan.streams:
        mark_complete(plan)
    if plan.converts:
        plan.results.unlink()
    if not quiet:
        seconds = time.perf_counter() - started
        _tell_counts(plan, counts, task.counted, journal.num_bad, seconds)
        if in_json:
            tell(f"JSON is in the columns {in_json}: their values have no one type of parquet's")
    return ExitCode.BAD_RECORDS if journal.num_bad else ExitCode.OK


def _run_all(
    entries: Input, journal: Journal, task: Task, reserved: frozenset[str], timing: Timing
) -> Counts:
    counts = Counts()
    try:
        for entry in entries:
            if journal.is_reported(entry.line):
                continue
            if isinstance(entry, BadRecord):
                journal.write_error(entry)
            elif journal.take_done(entry):
                counts.resumed += 1
            else:
                run_one(entry, journal, task, reserved, counts)
                timing.update(counts.items)
    finally:
        timing.close()
    journal.check_all_taken()
    return counts


def run_one(
    record: Readable, journal: Journal, task: Task, reserved: frozenset[str], counts: Counts
) -> None:
    """Score one record and write what came of it."""
    try:
        taken = reserved & record.fields.keys()
        if taken:
            raise InputError(f"has the fields {sorted(taken)}, which the output needs; rename them")
        result, usage = task.run(record)
        if usage.truncated_items:
            result["truncated_items"] = list(usage.truncated_items)
        if usage.non_finite_items:
            result["non_finite_items"] = list(usage.non_finite_items)
        journal.write_result(record, result)
    except (*RECORD_ERRORS, UnwritableError) as error:
        journal.write_error(_refused(record, str(error) or type(error).__name__))
    except OSError:
        raise
    except Exception as error:
        raise RunError(f"line {record.line} of INPUT: {type(error).__name__}: {error}") from error
    else:
        counts.records += 1
        counts.items += record.size
        counts.truncated += len(usage.truncated_items)
        counts.special += len(usage.special_token_items)
        counts.non_finite += len(usage.non_finite_items)


def _refused(record: Readable, reason: str) -> BadRecord:
    known = {"id": record.fields["id"]} if "id" in record.fields else {}
    return BadRecord(record.line, reason, known)


class Timing:
    """A bar on stderr over what is read, and once, in a line, how long all of it is going to take.

    Args:
      reader: the input.
      counted: what it has, in words.
      price_per_hour: of the machine, for the line.
      quiet: neither; without a terminal there is the line alone.
    """

    def __init__(
        self, reader: Input, counted: str, price_per_hour: float | None, *, quiet: bool
    ) -> None:
        self._reader, self._counted = reader, counted
        self._price_per_hour, self._quiet = price_per_hour, quiet
        self._bar: tqdm[Any] | None = None
        self._position, self._started = 0, time.perf_counter()
        # behind the first record, which warms up what the others find warm
        self._warm: tuple[int, float] | None = None
        self._is_told = quiet or reader.total is None

    def update(self, items: int) -> None:
        """Show that so many items have been scored."""
        if self._bar is None:
            # made now, so that what an earlier run did does not count as this one's speed
            self._bar = self._new_bar()
        seconds = time.perf_counter() - self._started
        rate = items / seconds if seconds else 0.0
        done = f"{items:,} {self._counted}, {rate:,.0f} {self._counted}/s"
        self._bar.set_postfix_str(done, refresh=False)
        self._bar.update(self._reader.position - self._position)
        self._position = self._reader.position
        if not self._is_told:
            self._tell_once(items)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _tell_once(self, items: int) -> None:
        now = time.perf_counter()
        if self._warm is None:
            self._warm = self._position, now
        position, since = self._warm
        if now - since < TIMED_SECONDS or self._position == position or not self._reader.total:
            return
        self._is_told = True
        left = self._reader.total - self._position
        seconds = now - self._started + left * (now - since) / (self._position - position)
        with tqdm.external_write_mode(file=sys.stderr):
            tell(
                f"{items:,} {self._counted} took {now - self._started:.1f} s; "
                f"in all about {priced(seconds, self._price_per_hour)}"
            )

    def _new_bar(self) -> tqdm[Any]:
        total = self._reader.total
        shown = "{percentage:3.0f}%|{bar}| " if total else ""
        left = "<{remaining}" if total else ""
        return tqdm(
            total=total,
            initial=self._position,
            disable=self._quiet or not sys.stderr.isatty(),
            bar_format=f"{shown}[{{elapsed}}{left}{{postfix}}]",
            dynamic_ncols=True,
        )


@contextmanager
def open_journal(plan: FilePlan) -> Iterator[Journal]:
    """The journal of a plan, closed at the end."""
    journal: Journal
    errors: BinaryIO = sys.stderr.buffer
    if not plan.streams:
        journal = FileJournal(plan.results, plan.errors or Path(f"{plan.output}.errors.jsonl"))
    else:
        if plan.error_file is not None:
            errors = plan.error_file.open("wb" if plan.overwrite else "xb")
        elif plan.errors is not None:
            errors = open_sink(plan.errors)
        journal = StreamJournal(open_sink(Path(plan.output)), errors)
    try:
        yield journal
    finally:
        journal.close()


def _tell_how_to_go_on(plan: FilePlan) -> None:
    if not (is_stream(plan.input) or plan.streams):
        tell(f"what is done is in {plan.results}; the same command with --resume goes on")


def _tell_counts(
    plan: FilePlan, counts: Counts, counted: str, num_bad: int, seconds: float
) -> None:
    rate = counts.items / seconds if seconds else 0.0
    before = f" ({counts.resumed:,} were there before)" if counts.resumed else ""
    tell(
        f"{counts.records:,} records{before}, {counts.items:,} {counted} in {seconds:.1f} s, "
        f"{rate:,.0f} {counted}/s"
    )
    if counts.truncated:
        tell(f"{counts.truncated:,} items lost their end to the budget (truncated_items)")
    if counts.special:
        tell(f"{counts.special:,} items hold the text of special tokens; it was read as text")
    if counts.non_finite:
        tell(f"{counts.non_finite:,} scores are not finite (non_finite_items)")
    if num_bad:
        tell(f"{num_bad:,} bad records, by line and reason in {plan.errors or 'stderr'}")
