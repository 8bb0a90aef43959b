"""Where a model's weights are: in torch, on torchax, or where nothing here reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from packscore.errors import UnsupportedModelError
from packscore.interfaces import BACKEND_NAME
from packscore.model.stored import Stored

# What has to be in the environment before torch is imported, so that TorchTPU stays out of it.
WITHOUT_TORCHTPU = "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
TORCHTPU_STANDS_BEFORE_TORCHAX = (
    "TorchTPU loaded itself with torch and took the one name torch has for another accelerator, "
    f"which torchax needs; set {WITHOUT_TORCHTPU} in the environment before torch is imported"
)
UNREAD = {
    "xla": "torch_xla; load the model on the CPU, or move it to torchax",
    "tpu": (
        f"TorchTPU; set {WITHOUT_TORCHTPU} in the environment before torch is imported, and load "
        "the model on the CPU"
    ),
}


def is_on_torchax(model: nn.Module) -> bool:
    """Whether the model was moved to torchax: its tensors hold jax arrays."""
    first = next(model.parameters(), None)
    return first is not None and _is_of_torchax(first)


def _is_of_torchax(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "jax"


def check_place(model: nn.Module) -> None:
    """Refuse weights that neither torch's own kernels nor programs read.

    Raises:
      UnsupportedModelError: they are torch_xla's or TorchTPU's.
    """
    for name, parameter in model.named_parameters():
        if found := UNREAD.get(parameter.device.type):
            raise UnsupportedModelError(
                f"parameter {name!r} is on {parameter.device}, which is {found}; "
                "patch_model(model, device='tpu') then scores it on the TPU"
            )


def torchtpu_is_loaded() -> bool:
    """Whether TorchTPU has the one name that torch gives away, which torchax needs as well."""
    name: str = BACKEND_NAME()()
    return name == "tpu"


def rows_in_torch(weight: Any, rows: list[int] | slice) -> torch.Tensor:
    """Some rows of a weight as a tensor of torch's own.

    They are a copy on the CPU of one on torchax, and of one that is in its checkpoint.
    """
    if isinstance(weight, Stored):
        return weight.read_rows(rows)
    if not _is_of_torchax(weight):
        found: torch.Tensor = weight.detach()[rows]
        return found
    array = weight.jax()[rows if isinstance(rows, slice) else np.asarray(rows)]
    return torch.from_numpy(np.array(array, np.float32)).to(weight.dtype)
