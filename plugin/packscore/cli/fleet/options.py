"""The options of `--ray`, and what they are read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packscore.files.failures import UsageError
from packscore.files.folder import DEFAULT_PART_ROWS, PART_FORMATS, FolderPlan, plan_folder
from packscore.installed import install_command

if TYPE_CHECKING:
    from packscore.fleet import Workers

Ray = Annotated[
    bool,
    typer.Option("--ray", help="Score parts of a parquet file with Ray; OUTPUT is a folder."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Of the Ray cluster, such as auto; default: RAY_ADDRESS, or one of this machine.",
        show_default=False,
    ),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="With --ray: how many, a model in each; default: as many as fit.",
        show_default=False,
    ),
]
WorkerResources = Annotated[
    str | None,
    typer.Option(
        help="With --ray: what a worker takes, such as CPU=4,GPU=1 or TPU=4; default: CPU=1, and "
        "GPU=1 or TPU=1 by --device.",
        show_default=False,
    ),
]
PartRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"With --ray: rows of INPUT that make a part; default: {DEFAULT_PART_ROWS}.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class RayOptions:
    """What the command line says about the cluster.

    Args:
      address: of it.
      num_workers: None is as many as fit.
      resources: of a worker, in Ray's names; None is by the device.
      part_rows: rows of a part.
    """

    address: str | None = None
    num_workers: int | None = None
    resources: Mapping[str, float] | None = None
    part_rows: int = DEFAULT_PART_ROWS

    def workers(self, device: str, cluster: Mapping[str, float], most: int) -> Workers:
        """The pool.

        Args:
          device: of the models.
          cluster: what all of its machines have.
          most: more workers would have nothing to do.
        """
        # imported here: what it is used by brings torch
        from packscore.fleet import Workers

        needs = dict(self.resources or self._needs_of(device))
        fitting = min(int(cluster.get(name, 0) // amount) for name, amount in needs.items())
        count = self.num_workers or max(1, fitting)
        cpus, gpus = needs.pop("CPU", 0), needs.pop("GPU", 0)
        return Workers(min(count, most), num_cpus=cpus, num_gpus=gpus, resources=needs)

    def _needs_of(self, device: str) -> dict[str, float]:
        kind = device.partition(":")[0]
        more = {"cuda": {"GPU": 1.0}, "tpu": {"TPU": 1.0}}.get(kind, {})
        return {"CPU": 1.0, **more}


def ray_options(
    ray: bool,
    ray_address: str | None,
    workers: int | None,
    worker_resources: str | None,
    part_rows: int | None,
) -> RayOptions | None:
    """What was said of Ray; None without it.

    Raises:
      UsageError: an option is for `--ray` alone, or cannot be read.
    """
    given = {"--ray-address": ray_address, "--workers": workers, "--part-rows": part_rows}
    given["--worker-resources"] = worker_resources
    if not ray:
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option}={value} is for --ray, which was not given")
        return None
    resources = None if worker_resources is None else _read_resources(worker_resources)
    return RayOptions(ray_address, workers, resources, part_rows or DEFAULT_PART_ROWS)


def _read_resources(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = part.partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            found[""] = 0
    if "" in found or any(not amount > 0 for amount in found.values()):
        raise UsageError(
            f"--worker-resources={text!r} must be names and numbers above 0, such as CPU=4,GPU=1"
        )
    return found


def plan_parts(
    ray: RayOptions,
    input_path: str,
    output_path: str,
    errors: Path | None,
    input_format: str | None,
    output_format: str | None,
    *,
    resume: bool,
    overwrite: bool,
) -> FolderPlan:
    """The files of a run in parts.

    Raises:
      UsageError: they do not fit, or Ray is not installed.
    """
    if not find_spec("ray"):
        raise UsageError(f"--ray needs Ray, which is not installed: {install_command('ray')}")
    if errors is not None:
        raise UsageError(
            f"--errors={errors}: with --ray bad records go to errors-*.jsonl in --output"
        )
    return plan_folder(
        input_path,
        output_path,
        input_format,
        output_format or PART_FORMATS[0],
        part_rows=ray.part_rows,
        resume=resume,
        overwrite=overwrite,
    )
