"""Where a model's programs run, and by which kernels."""

from __future__ import annotations

from importlib.util import find_spec

import jax
from transformers import PreTrainedModel

from packscore.errors import InputError
from packscore.installed import install_command
from packscore.model.place import is_on_torchax
from packscore.programs.interfaces import check_programs, imported
from packscore.programs.traced_ops import KernelImplementation, torchax_environment


def resolve_device(
    device: str | None, model: PreTrainedModel
) -> tuple[jax.Device, KernelImplementation] | None:
    """(jax device, implementation of the kernels) for "tpu", "jax" or "auto"; None is torch.

    A model on torchax is scored where it is, which the name may say.

    Raises:
      InputError: the name is not one of these, is not where the model is, or there is no TPU.
      UnsupportedModelError: a model on torchax is on several devices.
      MissingPackageError, UnsupportedVersionError: of jax or torchax, see `programs.interfaces`.
    """
    if device not in ("tpu", "jax", "auto", None):
        raise InputError(f"{device=} must be 'tpu', 'jax', 'auto' or None")
    if device != "auto":  # which may mean torch
        torchax_environment()
        check_programs()
    if device == "tpu" and find_spec("libtpu"):
        imported("libtpu")  # jax only warns of a broken one, and sees no TPU
    if is_on_torchax(model):
        # imported here: nothing but `torchax_environment` may be the first to import torchax
        from packscore.programs.stacked_rows import place_of

        place = place_of(model)
        if device == "tpu" and place.platform != "tpu":
            raise InputError(
                f"{device=}: the model is on torchax, on {place}, and is scored where it is; pass "
                "device=None, or move it"
            )
        return place, "pallas" if place.platform == "tpu" else "xla"
    if device == "jax":
        return jax.devices()[0], "pallas" if jax.default_backend() == "tpu" else "xla"
    try:
        return jax.devices("tpu")[0], "pallas"
    except RuntimeError as error:
        if device == "tpu":
            raise InputError(
                f"{device=}: jax sees no TPU ({error}); on a TPU machine: "
                f"{install_command('tpu')}; elsewhere pass device='jax'"
            ) from error
        return None
