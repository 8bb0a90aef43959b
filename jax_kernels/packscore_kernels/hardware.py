"""Small facts about numbers and chips: the one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax

LANES = 128


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def align_to(a: int, b: int) -> int:
    """The smallest multiple of b that is at least a."""
    return cdiv(a, b) * b


def shape_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A shape and dtype, typed."""
    # imported here: numbers are wanted by code that runs without jax
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Chip:
    """What the kernel's tiles depend on, and what its cycles are compared with."""

    name: str
    vmem_bytes: int  # of one core
    clock_hz: float
    peak_flops: float  # bf16, of one chip
    hbm_bytes_per_s: float
    hbm_bytes: int
    devices: int  # that jax makes of one such chip
    topology: str  # what libtpu calls one such chip
    link_bytes_per_s: float  # to one neighbour, in one direction

    def all_reduce_ms(self, num_bytes: float, chips: int) -> float:
        """Of an array that so many chips have, in a ring through neighbours, both ways at once.

        Published bandwidth and nothing else: no start, and nothing that hides behind arithmetic.
        Two chips have but one link between them.
        """
        share = {1: 0.0, 2: 1.0}.get(chips, (chips - 1) / chips)
        return 1e3 * share * num_bytes / self.link_bytes_per_s


_MIB, _GIB = 2**20, 2**30
# Published peaks; clocks follow from them and the matrix units' number and size. Links: nine tenths
# of what is published of a chip (v5e 1 600, v6e 3 200 Gbit/s), divided by its ports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 16 * _MIB, 1.05e9, 275e12, 1.2e12, 32 * _GIB, 1, "v4:1x1x1", 45e9),
        Chip("v5e", 128 * _MIB, 1.5e9, 197e12, 0.82e12, 16 * _GIB, 1, "v5e:1x1", 45e9),
        Chip("v5p", 64 * _MIB, 1.75e9, 459e12, 2.76e12, 95 * _GIB, 1, "v5p:1x1x1", 90e9),
        Chip("v6e", 128 * _MIB, 1.75e9, 918e12, 1.64e12, 32 * _GIB, 1, "v6e:1x1", 90e9),
        Chip("tpu7x", 64 * _MIB, 2.2e9, 2307e12, 7.4e12, 192 * _GIB, 2, "tpu7x:1x1x1", 90e9),
    )
}
# Of all that is predicted from a compiler's schedule: what `benchmarks/public_points.py` found.
KNOWN_ERROR = (
    "measured beside predicted, in public on v6e: bfloat16 products -5 to +5 %, attention in long "
    "steps +11 %, what waits for HBM +16 %, many short steps +28 %, int8 products +35 %"
)
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def chip_of(device: jax.Device) -> str | None:
    """The name in `CHIPS` of a TPU device, None for anything else."""
    return _KINDS.get(device.device_kind)


def vmem_capacity() -> int | None:
    """VMEM of one core of the TPU that is traced for, None where there is none."""
    from jax.experimental.pallas import tpu as pltpu

    try:
        capacity: int = pltpu.get_tpu_info().vmem_capacity_bytes
    except (ValueError, NotImplementedError):  # as where a kernel is interpreted
        return None
    return capacity


class Core(NamedTuple):
    """What a kernel has to itself: one core of a chip, which has one or two."""

    vmem_bytes: int
    flops: float  # bf16
    hbm_bytes_per_s: float


def core() -> Core:
    """The core of the TPU that is traced for; where there is none, a v5e's."""
    from jax.experimental.pallas import tpu as pltpu

    try:
        info = pltpu.get_tpu_info()
    except (ValueError, NotImplementedError):  # as where a kernel is interpreted
        chip = CHIPS["v5e"]
        return Core(chip.vmem_bytes, chip.peak_flops, chip.hbm_bytes_per_s)
    return Core(info.vmem_capacity_bytes, info.bf16_ops_per_second, info.mem_bw_bytes_per_second)


def deep_passes() -> bool:
    """Whether a pass of the matrix unit takes 256 terms, of the TPU that is traced for.

    True where there is none: what interprets a kernel runs what newer chips do.
    """
    from jax.experimental.pallas import tpu as pltpu

    try:
        return bool(pltpu.get_tpu_info().mxu_column_size >= 2 * LANES)
    except (ValueError, NotImplementedError):
        return True


def precision_of(dtype: Any) -> jax.lax.Precision:
    """What a kernel's product of this dtype asks of a TPU: float32 means float32.

    Always said: what is not said is whatever the process has for `jax.default_matmul_precision`,
    and in a kernel a TPU refuses to be asked for more than the one pass that bfloat16 needs.
    """
    from jax.lax import Precision

    return Precision.HIGHEST if dtype == "float32" else Precision.DEFAULT


def vmem_limit(used_bytes: int) -> int:
    """Room for what a kernel counts and for the compiler's own, within the chip's memory."""
    limit = int(1.3 * used_bytes) + 2**22
    return min(limit, vmem_capacity() or limit)
