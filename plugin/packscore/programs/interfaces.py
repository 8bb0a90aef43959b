"""What programs read of the insides of jax and torchax: named here, and nowhere else."""

from __future__ import annotations

import importlib
import traceback
from types import ModuleType

from packscore import interfaces
from packscore.errors import MissingPackageError, UnsupportedVersionError
from packscore.installed import EXTRA_OF, remedy, tested, version_of
from packscore.interfaces import TORCHAX_ARRAY, Interface
from packscore_kernels.interfaces import PALLAS

# Packages that are broken by themselves where their own code fails.
BINARIES = ("jaxlib", "libtpu")
FEATURE = "patch_model(device='tpu' or 'jax')"

RESET_CACHE = Interface(
    "jax.experimental.compilation_cache.compilation_cache:reset_cache",
    "a folder that keeps compiled programs",
)
CACHE_OPTIONS = tuple(
    Interface(f"jax:config.{name}", "a folder that keeps compiled programs")
    for name in (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
)
TOPOLOGY = Interface(
    "jax.experimental.topologies:get_topology_desc", "compiling for a chip that is not there"
)
TRACER = Interface("jax.core:Tracer", "knowing an ordinary call that is traced")
USE_MESH = Interface("jax.sharding:use_abstract_mesh", "telling kernels which chip they are for")
ABSTRACT_MESH = Interface(
    "jax.sharding:Mesh.abstract_mesh", "telling kernels which chip they are for"
)
DEVICE_MESH = Interface(
    "jax.experimental.mesh_utils:create_device_mesh", "chips near each other for one copy"
)
SHARD_MAP = Interface("jax:shard_map", "a model over several chips")
PROFILE = Interface("jax.profiler:ProfileData", "what the parts of a request take")
RAGGED_PRODUCT = Interface("jax.lax:ragged_dot", "the products of a mixture's experts")
RUNTIME_ERROR = Interface("jax.errors:JaxRuntimeError", "knowing that a device has no room")
KERNELS = tuple(
    Interface(f"{module}:{name}", "the kernels")
    for module, names in PALLAS.items()
    for name in names
)
JAX: tuple[Interface, ...] = (
    *(RESET_CACHE, *CACHE_OPTIONS, TOPOLOGY, TRACER, USE_MESH, ABSTRACT_MESH),
    *(DEVICE_MESH, SHARD_MAP),
    *(PROFILE, RAGGED_PRODUCT, RUNTIME_ERROR, *KERNELS),
)

DEFAULT_ENVIRONMENT = Interface("torchax:default_env", "tracing a model")
DEVICE_MODULE = Interface("torchax:device_module", "leaving torch as it was")
TENSOR = Interface("torchax.tensor:Tensor", "models on torchax")
TENSOR_TO_JAX = Interface("torchax.tensor:Tensor.jax", "models on torchax")
ARRAY = Interface("torchax.tensor:Tensor.__init__", "models on torchax", mark=TORCHAX_ARRAY)
ENVIRONMENT = tuple(
    Interface(f"torchax.tensor:Environment.{name}", "tracing a model")
    for name in ("__enter__", "t2j_iso", "j2t_iso", "to_xla")
)
TO_TORCH_DTYPE = Interface("torchax.ops.mappings:j2t_dtype", "models on torchax")
TORCHAX: tuple[Interface, ...] = (
    *(DEFAULT_ENVIRONMENT, DEVICE_MODULE, TENSOR, TENSOR_TO_JAX, ARRAY),
    *(*ENVIRONMENT, TO_TORCH_DTYPE),
)


def check_jax() -> None:
    """Import jax, and ask for all that programs and kernels read of it.

    Raises:
      MissingPackageError: it is not installed.
      UnsupportedVersionError: it cannot be imported here, or something is not there.
    """
    imported("jax")
    interfaces.check(JAX)


def check_programs() -> None:
    """Ask for all that programs read of torch, transformers, jax and, imported, of torchax.

    Raises:
      UnsupportedVersionError: something is not there.
    """
    interfaces.check_programs()
    interfaces.check((*JAX, *TORCHAX))


def absent() -> dict[str, str]:
    """By its name what is not there of jax and torchax, in words; it imports both."""
    imported("torchax")
    return {str(error.missing): str(error) for error in interfaces.absent((*JAX, *TORCHAX))}


def imported(package: str) -> ModuleType:
    """A package that programs need; what it raises becomes one line.

    Raises:
      MissingPackageError: it is not installed.
      UnsupportedVersionError: it cannot be imported with the others that are.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:  # of a broken one, anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise MissingPackageError(FEATURE, EXTRA_OF[package]) from error
        at_fault = _at_fault(package, error)
        version = version_of(at_fault)
        said = (str(error).strip().splitlines() or ["no message"])[0]
        again = at_fault in BINARIES and version is not None
        beside = ", ".join(
            f"{name} {version_of(name)}"
            for name in ("torch", "jax", "jaxlib", "libtpu")
            if name != at_fault and version_of(name)
        )
        raise UnsupportedVersionError(
            f"{at_fault} {version} cannot be imported beside {beside} "
            f"({type(error).__name__}: {said}); {tested(at_fault)}; {remedy(at_fault, again)}",
            at_fault,
        ) from error


def _at_fault(package: str, error: Exception) -> str:
    """The package that fails below the one that was imported, as its frames tell."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    owners = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    below = [name for name in owners if name in BINARIES]
    return below[-1] if below else package
