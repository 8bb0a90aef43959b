"""How weights are cut over the chips that share one copy of a model.

Query heads with the keys and values they read, columns of the MLP, whole experts, and rows of the
embedding and of the head: of each a chip has its part. What has no such axis, all have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec as _PartitionSpec

from packscore.errors import InputError
from packscore.model.sizes import ModelSizes
from packscore_kernels.hardware import cdiv

PartitionSpec: Any = _PartitionSpec  # typed nowhere
# The axis of a mesh over which one copy of a model is cut, and that of its copies.
MODEL, DATA = "model", "data"
# Of a layer, by the ends of their names: the axis that is cut.
ROWS = (
    *("q_proj.weight", "q_proj.bias", "gate_proj.weight", "gate_proj.bias"),
    *("up_proj.weight", "up_proj.bias", "experts.gate_up_proj", "experts.down_proj"),
)
HEAD_ROWS = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
COLUMNS = ("o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Cut:
    """One weight over the chips of a copy.

    Args:
      chips: of the copy.
      axis: of one layer's weight; None: every chip has all of it.
      parts: that differ; where there are fewer than chips, neighbours have the same one.
    """

    chips: int
    axis: int | None = None
    parts: int = 1

    def part(self, size: int, chip: int) -> slice:
        """What a chip has of an axis of `size`; the last part of an uneven cut is shorter."""
        rows = cdiv(size, self.parts)
        first = chip * self.parts // self.chips * rows
        return slice(min(first, size), min(first + rows, size))

    def local(self, shape: tuple[int, ...], lead: int = 0) -> tuple[int, ...]:
        """The shape that every chip has of a weight, whose last part is filled up with zeros.

        Args:
          shape: of the weight.
          lead: axes before those of one layer's.
        """
        return self._with_axis(shape, lead, lambda size: cdiv(size, self.parts))

    def whole(self, shape: tuple[int, ...], lead: int = 0) -> tuple[int, ...]:
        """The shape of all chips' parts side by side, as a jax array of them has it."""
        return self._with_axis(shape, lead, lambda size: cdiv(size, self.parts) * self.chips)

    def _with_axis(self, shape: tuple[int, ...], lead: int, sized: Any) -> tuple[int, ...]:
        if self.axis is None:
            return shape
        at = lead + self.axis
        return *shape[:at], sized(shape[at]), *shape[at + 1 :]

    def spec(self, lead: int = 0) -> Any:
        """How jax names it."""
        if self.axis is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * (lead + self.axis), MODEL)


@dataclass(frozen=True)
class Cuts:
    """The cuts of all weights of a model.

    Args:
      sizes: of the whole model.
      chips: of a copy.
      num_classes: of a classifier, whose head every chip has; 0 for a language model.
    """

    sizes: ModelSizes
    chips: int
    num_classes: int = 0

    def of(self, group: str, name: str) -> Cut:
        """Of one weight.

        Args:
          group: "layers", "embed_tokens", "norm", "rotary" or "head", as in `Weights`.
          name: in one layer, or in the module of the group.
        """
        even = Cut(self.chips, 0, self.chips)
        if group == "layers":
            if name.endswith(HEAD_ROWS):
                return Cut(self.chips, 0, min(self.sizes.kv_heads, self.chips))
            if name.endswith(ROWS):
                return even
            if name.endswith(COLUMNS):
                return Cut(self.chips, 1, self.chips)
        is_vocabulary = group == "embed_tokens" or (group == "head" and not self.num_classes)
        return even if is_vocabulary and name == "weight" else Cut(self.chips)

    def specs(self, weights: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """How jax names the cuts of weights, or of shapes of weights."""
        return {
            group: {name: self.of(group, name).spec(lead_of(group)) for name in named}
            for group, named in weights.items()
        }


def lead_of(group: str) -> int:
    """Axes of an array of weights before those of one layer's: the layers are stacked."""
    return int(group == "layers")


def check_cut(sizes: ModelSizes, chips: int) -> None:
    """Refuse a number of chips that a model's sizes are no multiples of.

    Raises:
      InputError: heads, columns or experts would have to be split.
    """
    odd = _odd(sizes, chips)
    if odd:
        allowed = [n for n in range(1, chips + 1) if can_cut(sizes, n)]
        raise InputError(
            f"mesh: {chips} chips for one copy of the model do not divide its {', '.join(odd)}; "
            f"pass mesh={{'model': n}} with n one of {allowed}"
        )


def can_cut(sizes: ModelSizes, chips: int) -> bool:
    """Whether so many chips can share a model of these sizes."""
    return not _odd(sizes, chips)


def _odd(sizes: ModelSizes, chips: int) -> list[str]:
    """What of a model so many chips cannot share evenly."""
    odd = [f"{sizes.heads} heads"] if sizes.heads % chips else []
    if sizes.kv_heads % chips and chips % sizes.kv_heads:
        odd.append(f"{sizes.kv_heads} key and value heads")
    if sizes.experts and sizes.experts % chips:
        odd.append(f"{sizes.experts} experts")
    if not sizes.experts and sizes.mlp % chips:
        odd.append(f"{sizes.mlp} columns of the MLP")
    return odd
