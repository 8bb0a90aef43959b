"""`packscore verify`: parity on the records of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from packscore import InputError, InputTypeError, MultiItemScorer
from packscore.cli.exits import ExitCode, tell
from packscore.cli.load import load
from packscore.cli.options import ModelOptions
from packscore.files.failures import RunError
from packscore.files.file_plan import check_format, check_input
from packscore.files.inputs import open_input
from packscore.files.look import ReadOptions
from packscore.files.readers import format_of
from packscore.files.records import Entry, Record
from packscore.verify import verify_parity


def verify_file(
    input_path: str,
    input_format: str | None,
    read: ReadOptions,
    options: ModelOptions,
    limit: int,
) -> ExitCode:
    """Print the parity table of the first good records of a file.

    Returns:
      OK, or FAILURE where the verdict is not "equal".

    Raises:
      RunError: no record can be scored.
    """
    check_format("--input-format", input_format)
    check_input(input_path)
    file_format = format_of(input_path, input_format, "--input-format")
    with open_input(input_path, file_format, read) as entries:
        tell(entries.understood)
        loaded = load(options)
        scorer = loaded.scorer
        records = list(islice(_can_be_scored(entries, scorer), limit))
    if not records:
        raise RunError(f"INPUT={input_path} holds no record that can be scored")
    tell(f"{len(records)} records, {options.model} on {loaded.device}")
    report = verify_parity(
        scorer.model,
        scorer.tokenizer,
        [(record.query, record.items) for record in records],
        prompt=loaded.spec,
        instruction=options.instruction,
        label_token_ids=scorer.label_token_ids,
        max_tokens=options.max_tokens,
    )
    loaded.cache.tell_new()
    return ExitCode.OK if report.passed else ExitCode.FAILURE


def _can_be_scored(entries: Iterable[Entry], scorer: MultiItemScorer) -> Iterator[Record]:
    for entry in entries:
        if not isinstance(entry, Record):
            continue
        try:
            scorer.encode(entry.query, entry.items)
        except (InputError, InputTypeError):
            continue
        yield entry
