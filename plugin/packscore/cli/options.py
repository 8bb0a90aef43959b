"""The options that commands share, and what they are read into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from packscore.files.failures import UsageError
from packscore.files.look import ReadOptions
from packscore.files.readers import delimiter_from
from packscore.files.records import FieldNames

if TYPE_CHECKING:
    from packscore.results import NonFiniteChoice
    from packscore.text.labels import LabelIds

DEFAULT_MAX_LINE_BYTES = 8 * 2**20
DTYPES = ("auto", "float32", "bfloat16", "float16")

Input = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .csv, .tsv or .parquet file of records, compressed or not; - is stdin."
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="The file to write, compressed as .gz; - is stdout (JSONL)."
    ),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub name or folder of the model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda[:N], mps (torch); tpu, jax (compiled programs)."),
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
CacheDir = Annotated[
    str | None,
    typer.Option(
        help="Folder that keeps compiled programs (tpu, jax) for later processes, or none; "
        "default: JAX_COMPILATION_CACHE_DIR, or in PACKSCORE_CACHE_DIR or the user's cache.",
        show_default=False,
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        help="A built-in prompt's name, auto (by the model's), or a .json file with a "
        "PromptSpec's parts."
    ),
]
Instruction = Annotated[str | None, typer.Option(help="Replaces the prompt's own instruction.")]
Labels = Annotated[
    str | None,
    typer.Option(help="Label texts with commas between them, such as no,yes.", show_default=False),
]
LabelTokenIds = Annotated[
    str | None,
    typer.Option(
        help="Labels as token ids, such as 2152,9693; the ids of one label with blanks between.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Budget of the query and one item, in tokens.")
]
OnLong = Annotated[
    Literal["truncate", "error"],
    typer.Option(help="truncate cuts and reports an item over the budget; error refuses it."),
]
OnNonFinite = Annotated[
    Literal["raise", "report"],
    typer.Option(
        help="raise makes a bad record of scores that are NaN or infinite; report writes null."
    ),
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        "--input-format",
        "--format",
        help="jsonl, csv, tsv or parquet; default: by the suffix.",
    ),
]
OutputFormat = Annotated[
    str | None, typer.Option(help="jsonl, csv, tsv or parquet; default: by the suffix.")
]
QueryField = Annotated[str, typer.Option(help="Field or column of the query; a.b is b inside a.")]
ItemsField = Annotated[
    str | None,
    typer.Option(
        help="Field or column of the items, such as docs.body; default: items, documents, docs, "
        "item, document or doc.",
        show_default=False,
    ),
]
IdField = Annotated[
    str | None,
    typer.Option(
        help="Field or column of the items' ids; default: docs.id where items are objects, "
        "item_id, document_id or doc_id where they are rows.",
        show_default=False,
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="Between columns: a character, or tab; default: told by the header.",
        show_default=False,
    ),
]
Group = Annotated[
    bool | None,
    typer.Option(
        "--group/--no-group",
        help="Of rows: bring all of a query together, in memory, or take those that follow each "
        "other as they are; default: the latter, and rank refuses a query that comes back.",
        show_default=False,
    ),
]
Errors = Annotated[
    Path | None,
    typer.Option(help="File for bad records; default: OUTPUT.errors.jsonl.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove an output that is there.")]
MaxLineBytes = Annotated[int, typer.Option(min=1, help="Longer lines are bad records.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No plan, no progress bar and no summary.")
]
Price = Annotated[
    float | None,
    typer.Option(
        "--price-per-hour",
        min=0.0,
        help="Of this machine, to be told what the run costs.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Count records and tokens, run and write nothing.")
]


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says about the model and its prompt.

    Args:
      model: a hub name or a folder.
      revision: of a hub name.
      device: "auto", "tpu", "jax", or a torch device such as "cuda:1".
      dtype: one of DTYPES.
      prompt: a built-in name, or a JSON file with the parts of a `PromptSpec`.
      instruction, max_tokens, on_long, on_non_finite: as `MultiItemScorer` takes them.
      labels: label texts, or None.
      label_token_ids: labels as ids, or None.
      cache_dir: folder of compiled programs; "none" keeps none, None is the default.
      reads_labels: whether the prompt must have labels.
      prefix_cache_bytes: as `MultiItemScorer` takes it; None is its default.

    Raises:
      UsageError: `dtype`, `on_long` or `on_non_finite` is not one of its values.
    """

    model: str
    revision: str | None
    device: str
    dtype: str
    prompt: str
    instruction: str | None
    labels: list[str] | None
    label_token_ids: LabelIds | None
    max_tokens: int | None
    on_long: Literal["truncate", "error"]
    on_non_finite: NonFiniteChoice = "raise"
    cache_dir: str | None = None
    reads_labels: bool = True
    prefix_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--on-long", self.on_long, ("truncate", "error"))
        _check_choice("--on-non-finite", self.on_non_finite, ("raise", "report"))


def read_options(
    query_field: str,
    items_field: str | None,
    id_field: str | None,
    max_line_bytes: int,
    delimiter: str | None,
    group: bool | None,
    *,
    once: bool = False,
) -> ReadOptions:
    """How the command line says that the input is read."""
    names = FieldNames(query_field, items_field, id_field)
    between = None if delimiter is None else delimiter_from(delimiter)
    return ReadOptions(names, max_line_bytes, between, group, once)


def split_labels(labels: str | None) -> list[str] | None:
    """`no,yes` as a list."""
    return None if labels is None else labels.split(",")


def split_ids(label_token_ids: str | None) -> LabelIds | None:
    """`15,17` as a list of ids, `15 16,17` as a list of lists.

    Raises:
      UsageError: an id is not a number.
    """
    if label_token_ids is None:
        return None
    try:
        labels = [[int(i) for i in label.split()] for label in label_token_ids.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--label-token-ids={label_token_ids!r} must be numbers with commas between labels, "
            "and blanks between the ids of one"
        ) from error
    are_single = all(len(ids) == 1 for ids in labels)
    return [ids[0] for ids in labels] if are_single else labels


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option}={value!r} must be one of {', '.join(choices)}")
