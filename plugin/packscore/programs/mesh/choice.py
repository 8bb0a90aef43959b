"""Which chips have which copy of a model: what `mesh` says, or what fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedModel

from packscore.errors import InputError
from packscore.flows.page_pool import PREFIX_CACHE_BYTES
from packscore.model.sizes import ModelSizes
from packscore.programs.interfaces import DEVICE_MESH
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.mesh.cuts import DATA, MODEL, can_cut, check_cut
from packscore.programs.sizes import DEFAULT_MAX_TOKENS

# What `patch_model` takes: one chip, all of them, so many, or a mesh of jax's own.
MeshChoice: TypeAlias = Literal["auto"] | Mapping[str, int] | Mesh | None
# How much of a chip's memory a program may plan with.
HBM_SHARE = 0.92


def resolve_mesh(
    mesh: Any, device: jax.Device, model: PreTrainedModel, itemsize: int | None = None
) -> tuple[ChipGroup, ...]:
    """The chips of each copy of a model.

    Args:
      mesh: None, "auto", {"data": copies, "model": chips of each} or a mesh with these axes.
      device: a chip of the kind that is meant.
      model: whose sizes say what can be cut; its weights need not be there.
      itemsize: bytes of a weight; None: as the model has them.

    Raises:
      InputError: it is none of these, asks for chips that are not there or that do not divide the
        model, or no number of chips holds the model.
    """
    if mesh is None:
        return (ChipGroup.of(device),)
    sizes = ModelSizes.of(model.config)
    chips = jax.local_devices(backend=device.platform)
    if isinstance(mesh, Mesh):
        grid = _grid_of(mesh, device)
    elif mesh == "auto":
        itemsize = itemsize or model.dtype.itemsize
        weights = itemsize * sum(math.prod(p.shape) for p in model.parameters())
        num_chips = fitting_chips(sizes, weights, itemsize, len(chips), memory_of(device))
        grid = arranged(len(chips) // num_chips, num_chips, chips)
    elif isinstance(mesh, Mapping):
        grid = arranged(*_counts(mesh, len(chips)), chips)
    else:
        raise InputError(
            f"{mesh=} must be None, 'auto', {{'data': copies, 'model': chips of each}} or a "
            "jax.sharding.Mesh with these axes"
        )
    check_cut(sizes, grid.shape[1])
    return tuple(ChipGroup(tuple(row)) for row in grid)


def arranged(data: int, model: int, chips: Sequence[Any]) -> Any:
    """[data, model] of chips, those of a row near each other."""
    return DEVICE_MESH()((data, model), devices=chips[: data * model])


def fitting_chips(
    sizes: ModelSizes, weight_bytes: int, itemsize: int, num_chips: int, memory: int | None
) -> int:
    """The fewest chips that hold a model between them: copies share nothing, so more are faster.

    Args:
      sizes: of the model.
      weight_bytes: of all its weights.
      itemsize: bytes of a value.
      num_chips: that there are, of which a copy has a part that divides them.
      memory: of one chip; None: nobody knows, and one will do.

    Raises:
      InputError: all of them do not.
    """
    needed = 0
    for n in (n for n in range(1, num_chips + 1) if num_chips % n == 0 and can_cut(sizes, n)):
        activations = DEFAULT_MAX_TOKENS * sizes.cut(n).activation_bytes(itemsize)
        needed = weight_bytes // n + PREFIX_CACHE_BYTES + activations
        if memory is None or needed <= HBM_SHARE * memory:
            return n
    raise InputError(
        f"mesh='auto': {num_chips} chips do not hold the model, which needs some "
        f"{needed / 1e9:.1f} GB of the {(memory or 0) / 1e9:.1f} that each of them has; load it in "
        "bfloat16, or take more chips"
    )


def memory_of(device: jax.Device) -> int | None:
    """Bytes of a chip's memory; None of a CPU's, which all of its devices share."""
    stats: dict[str, Any] = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if device.platform == "cpu" or limit is None else int(limit)


def _counts(mesh: Mapping[str, int], num_chips: int) -> tuple[int, int]:
    """(copies, chips of each)."""
    odd = [name for name in mesh if name not in (DATA, MODEL)]
    if odd or not mesh:
        raise InputError(
            f"mesh={dict(mesh)!r} has the axes {list(mesh)}; name 'data' (copies of the model), "
            "'model' (chips that share one), or both"
        )
    for name, count in mesh.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"mesh={{{name!r}: {count!r}}} must be an int of at least 1")
    data, model = mesh.get(DATA, 1), mesh.get(MODEL, 1)
    if data * model > num_chips:
        raise InputError(
            f"mesh={dict(mesh)!r} needs {data * model} chips, and this process has {num_chips}; "
            "pass smaller counts, or 'auto' for all there are"
        )
    return data, model


def _grid_of(mesh: Mesh, device: jax.Device) -> Any:
    """[data, model] of a mesh of the user's own."""
    odd = [name for name in mesh.axis_names if name not in (DATA, MODEL)]
    if odd:
        raise InputError(
            f"mesh has the axes {mesh.axis_names}; name them 'data' (copies of the model) and "
            "'model' (chips that share one)"
        )
    grid = np.asarray(mesh.devices)
    if mesh.axis_names == (MODEL, DATA):
        grid = grid.T
    elif len(mesh.axis_names) == 1:
        grid = grid[None] if mesh.axis_names == (MODEL,) else grid[:, None]
    here = set(jax.local_devices(backend=device.platform))
    away = [one for one in grid.flat if one not in here]
    if away:
        raise InputError(
            f"mesh has {away[0]}, which is not one of this process's {device.platform} devices; "
            "a process drives its own chips: pass a mesh of jax.local_devices()"
        )
    return grid
