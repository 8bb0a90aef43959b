"""A dataset through a pool of workers, by Ray's own pool, bars and retries."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from packscore.errors import InputError
from packscore.fleet.cluster import ray_module


@dataclass(frozen=True)
class Workers:
    """The workers of a stage, in Ray's words.

    Args:
      count: how many, or (fewest, most) of a pool that grows and shrinks.
      num_cpus: of each. Ray sets `OMP_NUM_THREADS` to it, and so torch's threads.
      num_gpus: of each.
      resources: of each, beside these; {"TPU": 4} is a host of four chips.
      max_restarts: how often a worker that died is started again; -1 is without end.
      max_task_retries: how often a batch is tried again whose worker died. Errors that a stage
        raises are not: they end the run.

    Raises:
      InputError: a number is none that a pool can have.
    """

    count: int | tuple[int, int] = 1
    num_cpus: float = 1
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    max_restarts: int = 100
    max_task_retries: int = 10

    def __post_init__(self) -> None:
        fewest, most = self._bounds
        if not 1 <= fewest <= most:
            raise InputError(f"count={self.count} must be 1 or more, or (fewest, most)")
        needs = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, **self.resources}
        for name, amount in needs.items():
            if amount < 0:
                raise InputError(f"{name}={amount} must be 0 or more")

    @property
    def _bounds(self) -> tuple[int, int]:
        return (self.count, self.count) if isinstance(self.count, int) else self.count

    def options(self) -> dict[str, Any]:
        """Arguments of `map_batches` and `map_groups`."""
        pool = ray_module().data.ActorPoolStrategy
        fewest, most = self._bounds
        retries: dict[str, Any] = {
            "max_restarts": self.max_restarts,
            "max_task_retries": self.max_task_retries,
        }
        needs: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.num_gpus:
            needs["num_gpus"] = self.num_gpus
        if self.resources:
            retries["resources"] = dict(self.resources)  # `map_groups` has no name for them
        return {
            "compute": pool(min_size=fewest, max_size=most, initial_size=fewest),
            **needs,
            "ray_remote_args_fn": lambda: dict(retries),
        }


def run_stage(
    dataset: Any,
    stage: type,
    constructor: Mapping[str, Any],
    *,
    workers: Workers | None = None,
    batch_size: int | None = 64,
) -> Any:
    """A dataset with the columns that a stage adds; computed when it is read, as all of Ray Data.

    Args:
      dataset: a `ray.data.Dataset` of records.
      stage: `ScoreStage`, `RankStage` or `DecideStage`, made once in every worker.
      constructor: its arguments, `model` among them.
      workers: None is one of one CPU.
      batch_size: records that a worker takes at a time, and what is computed again if it dies; None
        takes whole blocks. It changes no score.

    Returns:
      A `ray.data.Dataset`.

    Raises:
      InputError: the constructor has no such argument.
      MissingPackageError: Ray is not installed.
    """
    _check_arguments(stage, constructor)
    with _named_otherwise():
        return dataset.map_batches(
            stage,
            fn_constructor_kwargs=dict(constructor),
            batch_size=batch_size,
            batch_format="pyarrow",
            **(workers or Workers()).options(),
        )


def run_groups(
    dataset: Any,
    key: str,
    stage: type,
    constructor: Mapping[str, Any],
    *,
    workers: Workers | None = None,
) -> Any:
    """`run_stage` for rows of (query, item) in any order: Ray sorts rows of a query together first.

    A sort moves all of the data through the cluster. `read_records` reads files in which rows of a
    query follow each other without it.

    Args:
      dataset: a `ray.data.Dataset` of rows.
      key: the column of queries.
      stage: `PairStage`.
      constructor, workers: as in `run_stage`.

    Returns:
      A `ray.data.Dataset`, in the order of the sort.

    Raises:
      InputError, MissingPackageError: as `run_stage` raises them.
    """
    _check_arguments(stage, constructor)
    with _named_otherwise():
        return dataset.groupby(key).map_groups(
            stage,
            fn_constructor_kwargs=dict(constructor),
            batch_format="pyarrow",
            **(workers or Workers()).options(),
        )


@contextmanager
def _named_otherwise() -> Iterator[None]:
    """Without Ray 2.60's warning that 2.64 takes retries by other names, which it has not yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        yield


def _check_arguments(stage: type, constructor: Mapping[str, Any]) -> None:
    """Refuse here what would fail in every worker."""
    check = getattr(stage, "check_arguments", None)
    try:
        inspect.signature(stage).bind(**constructor)
    except TypeError as error:
        raise InputError(f"constructor of {stage.__name__}: {error}") from error
    if check is not None:
        check(constructor)
