"""Ray itself, and the cluster that a run is on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from packscore.errors import MissingPackageError

# A cluster of this machine alone holds no more than counts: stages read and write files themselves.
LOCAL_STORE_BYTES = 128 << 20
LOCAL = "local"


def ray_module() -> Any:
    """Ray, with Ray Data.

    Raises:
      MissingPackageError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackageError("packscore.fleet", "ray") from error
    return ray


def address_of(given: str | None) -> str:
    """Where the cluster is: as given, or as Ray's own variable says; "local" starts one here."""
    return given or os.environ.get("RAY_ADDRESS") or LOCAL


@contextmanager
def connected(address: str | None = None, *, quiet: bool = False) -> Iterator[Any]:
    """Join a cluster, or start one on this machine, and leave it at the end.

    Args:
      address: as `ray.init` takes it; None is `RAY_ADDRESS`, or a cluster of this machine alone.
      quiet: show no progress bars and no output of workers, in all of this process.

    Yields:
      The module `ray`.

    Raises:
      MissingPackageError: Ray is not installed.
      ConnectionError: there is no cluster.
    """
    ray = ray_module()
    found = address_of(address)
    local = {"object_store_memory": LOCAL_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=found,
            log_to_driver=not quiet,
            logging_level="error" if quiet else "warning",
            **(local if found == LOCAL else {}),
        )
    except Exception as error:  # also bare ones, of a machine too busy to start it
        raise ConnectionError(f"Ray cannot be reached at {found!r}: {error}") from error
    if quiet:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()
