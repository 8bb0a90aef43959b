"""Inner names of other packages: in one place each, and an error by name where one is missing."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import random_decoder, random_qwen3
from packscore import (
    MultiItemScorer,
    UnsupportedVersionError,
    interfaces,
    patch_model,
    register_pipelines,
    shipped_model_path,
)
from packscore.installed import version_of
from packscore.interfaces import TABLE, Interface
from packscore.model.family import SUPPORTED_MODEL_TYPES
from packscore.programs import interfaces as of_programs
from packscore_kernels.interfaces import PALLAS
from processes import run_fresh

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "plugin"
HOMES = ("packscore/interfaces.py", "packscore/programs/interfaces.py")
PACKAGES = ("torch", "transformers", "jax", "jaxlib", "torchax")
# What is inner: a name that begins with one underscore; a module below a package's own, but for
# these; all of torchax, which promises nothing yet.
DOCUMENTED = "documented under this name"
PUBLIC_MODULES = {
    **dict.fromkeys(("torch.nn", "torch.nn.functional", "torch.func", "torch.optim"), DOCUMENTED),
    **dict.fromkeys(("torch.cuda", "torch.compiler", "torch.profiler"), DOCUMENTED),
    **dict.fromkeys(("torch.backends", "torch.backends.mps", "torch.backends.mha"), DOCUMENTED),
    "torch.version": "what CUDA torch was built for; told by the doctor",
    "transformers.utils": "for the next",
    "transformers.utils.logging": DOCUMENTED,
    **dict.fromkeys(("jax.numpy", "jax.lax", "jax.nn", "jax.tree", "jax.sharding"), DOCUMENTED),
    **dict.fromkeys(("jax.stages", "jax.profiler", "jax.tree_util"), DOCUMENTED),
}
# Names that begin with an underscore and are nobody's inside.
OTHER_NAMES = {
    "_id": "a key of users' records",
    "_buffer_dict": "a folder of PEFT's",
    "_commit_hash": "told beside scores where transformers knows it",
    "_packscore_drawn_head": "what packscore itself keeps on a model",
    **dict.fromkeys(
        ("_inference", "_resolve_inference_device", "_resolve_prompt"),
        "of sentence_transformers.CrossEncoder, which is extended, and whose version is fixed",
    ),
}


@functools.cache
def sources(folder: Path = PLUGIN) -> dict[str, ast.Module]:
    paths = sorted(folder.rglob("*.py"))
    return {str(path.relative_to(folder)): ast.parse(path.read_text()) for path in paths}


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[a-zA-Z]\w*", name))


def own_names(trees: Iterable[ast.Module]) -> set[str]:
    """Private names that packscore itself gives, but for those that stand in its tables."""
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    inner = (one.name for one in ALL)
    return {name for name in found if is_private(name)} - {*inner, interfaces.TORCHAX_ARRAY}


def named(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the packages that a file imports, or reads of what it imported."""
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                homes[alias.asname or top] = alias.name if alias.asname else top
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                homes[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in homes and re.fullmatch(r"[\w.]+", rest):
                yield f"{homes[first]}.{rest}"


@functools.cache
def is_module(dotted: str) -> bool:
    top, *rest = dotted.split(".")
    found: Any = importlib.import_module(top)
    for name in rest:
        if not hasattr(found, name) and isinstance(found, types.ModuleType):
            try:
                return importlib.util.find_spec(dotted) is not None
            except ModuleNotFoundError:  # a name of a module that is no package
                return False
        found = getattr(found, name, None)
    return isinstance(found, types.ModuleType)


def inner_names(tree: ast.Module, own: set[str]) -> set[str]:
    """What a file reads of the insides of other packages."""
    found: set[str] = set()
    for dotted in named(tree):
        parts = dotted.split(".")
        if parts[0] == "torchax":
            found.add(dotted)
        elif parts[0] in PACKAGES:
            below = (".".join(parts[:n]) for n in range(2, len(parts) + 1))
            found |= {name for name in below if is_module(name) and name not in PUBLIC_MODULES}
    known = own | OTHER_NAMES.keys()
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        elif isinstance(node, ast.keyword | ast.alias):
            name = (node.arg if isinstance(node, ast.keyword) else node.name) or ""
        if is_private(name) and name not in known:
            found.add(name)
    return found


ALL = (*TABLE, *of_programs.JAX, *of_programs.TORCHAX)


def test_inner_names_are_read_in_their_homes_alone() -> None:
    trees = sources()
    own = own_names(trees.values())
    found = {path: inner_names(tree, own) for path, tree in trees.items() if path not in HOMES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from torch.nn.modules import module as hooks", "torch.nn.modules"),
        ("from torch.utils._python_dispatch import x", "torch.utils._python_dispatch"),
        ("import torch.overrides as modes", "torch.overrides"),
        ("import torch\ntorch.ops.aten.add", "torch.ops"),
        ("from torch import nn\nnn.modules.dropout", "torch.nn.modules.dropout"),
        ("tensor._version", "_version"),
        ("own['_forward_hooks']", "_forward_hooks"),
        ("state.update(_elem=1)", "_elem"),
        ("from transformers.masking_utils import sdpa_mask", "transformers.masking_utils"),
        ("import transformers\ntransformers.models.qwen3", "transformers.models"),
        ("import torchax", "torchax"),
        ("from torchax.tensor import Tensor", "torchax.tensor.Tensor"),
        ("import jax\njax.core.Tracer", "jax.core"),
        ("from jax.experimental import topologies", "jax.experimental.topologies"),
        ("from jax import numpy", None),
        ("from torch.nn import functional as F\nF.linear(self._mine)", None),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_the_rule_sees_what_it_is_for(code: str, found: str | None) -> None:
    names = inner_names(ast.parse(code), {"_mine"})
    assert (found in names) if found else not names


def test_what_is_read_inside_forwards_stands_in_the_table() -> None:
    trees = sources()
    for path in HOMES:
        read = {
            node.attr
            for node in ast.walk(trees[path])
            if isinstance(node, ast.Attribute) and is_private(node.attr)
        }
        assert read <= {one.name for one in ALL}


def test_pallas_has_the_names_that_the_kernels_use() -> None:
    used = {module: set[str]() for module in PALLAS}
    for tree in sources(ROOT / "jax_kernels").values():
        for dotted in named(tree):
            module = max((m for m in PALLAS if dotted.startswith(f"{m}.")), key=len, default=None)
            name = dotted.removeprefix(f"{module}.").partition(".")[0]
            if module and f"{module}.{name}" not in PALLAS:
                used[module].add(name)
    assert used == {module: set(names) for module, names in PALLAS.items()}


def test_every_family_has_its_eager_attention() -> None:
    folders = {name.removesuffix("_text") for name in SUPPORTED_MODEL_TYPES}
    assert set(interfaces.FAMILIES) == folders
    assert interfaces.absent(TABLE) == []


def take_away(one: Interface, patch: pytest.MonkeyPatch) -> None:
    """Let a name be missing: delete it, or what it is read of where that is C's and stays."""
    module, _, attributes = one.path.partition(":")
    names = [name.removesuffix("()") for name in attributes.split(".")]
    if "()" in attributes:  # an instance's: one without it is made
        made = getattr(importlib.import_module(module), names[0])

        def without() -> Any:
            instance = made()
            del instance.__dict__[one.name]
            return instance

        patch.setattr(importlib.import_module(module), names[0], without)
        return
    owners = [importlib.import_module(module)]
    for name in names[:-1]:
        owners.append(getattr(owners[-1], name))
    try:
        if one.mark:
            patch.setattr(owners[-1], names[-1], stub_of(one))
        else:
            patch.delattr(owners[-1], names[-1])
    except (AttributeError, TypeError):
        pass
    if not interfaces.absent([one]):
        patch.setattr(owners[-2], names[-2], Without(owners[-1], names[-1]))


def stub_of(one: Interface) -> Any:
    """A function that mentions what others want of it, and not what this one does."""
    others = tuple(x.mark for x in ALL if x.path == one.path and x != one)
    return types.FunctionType(compile("0", "", "eval").replace(co_consts=(0, *others)), {})


class Without:
    def __init__(self, owner: Any, name: str) -> None:
        self.__dict__.update(owner=owner, name=name)

    def __getattr__(self, name: str) -> Any:
        if name == self.name:
            raise AttributeError(name)
        return getattr(self.owner, name)


def needed(*when: str) -> list[Any]:
    chosen = [one for one in TABLE if one.when in when and one.family in (None, "qwen3")]
    more = (*of_programs.JAX, *of_programs.TORCHAX) if "programs" in when else ()
    return [pytest.param(one, id=f"{one.path}{one.mark}") for one in (*chosen, *more)]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_qwen3()


def check_told(told: pytest.ExceptionInfo[UnsupportedVersionError], one: Interface) -> None:
    error, package = told.value, one.path.partition(":")[0].partition(".")[0]
    assert error.package == package
    assert error.missing is not None
    assert error.missing.startswith(one.path.replace(":", "."))
    assert error.missing.endswith(one.name)
    assert f"{package} {version_of(package)} has no {error.missing}" in str(error)
    assert one.use in str(error)
    assert "; pip install " in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("one", needed("patch"))
def test_a_missing_name_is_told_when_a_model_is_patched(one: Interface, model: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take_away(one, patch)
        with pytest.raises(UnsupportedVersionError) as told:
            patch_model(model)
    check_told(told, one)


@pytest.mark.parametrize("one", needed("programs"))
def test_a_missing_name_is_told_when_programs_are_made(one: Interface, model: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.devices", lambda *_: pytest.fail("a device was asked for"))
        take_away(one, patch)
        with pytest.raises(UnsupportedVersionError) as told:
            patch_model(model, device="jax")
    check_told(told, one)


def parts() -> list[Any]:
    of = {"experts": "qwen3_moe"}
    return [
        pytest.param(of.get(kind, "qwen3"), path, id=path)
        for kind, paths in interfaces.PARTS.items()
        for path in paths
    ]


@pytest.mark.parametrize(("family", "path"), parts())
def test_a_missing_part_is_told_when_programs_are_made(family: str, path: str) -> None:
    model = random_decoder(family, num_hidden_layers=1) if family != "qwen3" else random_qwen3()
    build = type(model)._from_config

    def without(config: Any) -> Any:
        skeleton = build(config)
        owner, _, name = f"get_decoder.{path}".rpartition(".")
        found: Any = skeleton.get_decoder()
        for step in owner.split(".")[1:]:
            found = getattr(found, step)
        delattr(found, name)
        return skeleton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.device_put", lambda *_: pytest.fail("weights were put on a device"))
        patch.setattr(type(model), "_from_config", without)
        with pytest.raises(UnsupportedVersionError, match=re.escape(f"Model.{path}, which")):
            patch_model(model, device="jax")


@pytest.mark.parametrize("one", needed("pipeline"))
def test_a_missing_name_is_told_when_pipelines_are_registered(one: Interface) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take_away(one, patch)
        with pytest.raises(UnsupportedVersionError) as told:
            register_pipelines()
    check_told(told, one)


@pytest.mark.parametrize("one", needed("loading"))
def test_a_missing_name_is_told_when_a_checkpoint_is_loaded(one: Interface) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take_away(one, patch)
        with pytest.raises(UnsupportedVersionError) as told:
            MultiItemScorer.from_pretrained(shipped_model_path())
    check_told(told, one)


# Stand-ins of packages as they are where they do not fit: (package, what it raises, at fault).
BROKEN = {
    "torchax-of-another-torch": (
        "torchax",
        "raise AttributeError(\"module 'torch' has no attribute '_custom'\")",
        "torchax",
    ),
    "torchax-without-a-name-of-torch": (
        "torchax",
        "from torch.utils import _gone",
        "torchax",
    ),
    "torchax-that-registers-twice": ("torchax", "raise RuntimeError('taken\\ntwice')", "torchax"),
    "jaxlib-of-another-jax": (
        "jax",
        "raise RuntimeError('jaxlib version 0.9.0 is newer than and incompatible with jax')",
        "jax",
    ),
    "jax-without-jaxlib": (
        "jax",
        "raise ModuleNotFoundError('jax requires jaxlib to be installed')",
        "jax",
    ),
    "jaxlib-that-does-not-load": ("jaxlib", "raise ImportError('cannot open libfoo')", "jaxlib"),
    "libtpu-that-does-not-load": ("libtpu", "raise RuntimeError('no such GLIBC')", "libtpu"),
}
# One process: each case is a fork of it, which says what it caught. Those of torchax come behind
# the others, for they have jax.
TRY_EACH = """
from transformers import AutoModelForCausalLM
from packscore import PackscoreError, patch_model, shipped_model_path
model = AutoModelForCausalLM.from_pretrained(shipped_model_path()).eval()
assert "jax" not in sys.modules
for name, (folder, hidden) in cases.items():
    if "torchax" in name:
        import packscore.programs.device
        assert "torchax" not in sys.modules
    read, write = os.pipe()
    if os.fork() == 0:
        sys.path.insert(0, folder)
        sys.modules.update(dict.fromkeys(hidden))
        try:
            patch_model(model, device="tpu" if "libtpu" in name else "jax")
            told = "nothing", "", None
        except PackscoreError as error:
            told = type(error).__name__, str(error), getattr(error, "package", None)
        except BaseException as error:
            told = f"untyped {type(error).__name__}", str(error), None
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(json.dumps([name, *json.loads(answer.read())]))
    os.wait()
"""


def test_packages_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, list[str]]] = {}
    for name, (package, body, _) in BROKEN.items():
        folder = tmp_path / name / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(body)
        cases[name] = str(folder.parent), []
    cases["no-jax-here"] = str(tmp_path), ["jax"]
    cases["no-torchax-here"] = str(tmp_path), ["torchax"]
    cases = dict(sorted(cases.items(), key=lambda case: "torchax" in case[0]))
    out = run_fresh(f"import json, os, sys\ncases = {cases!r}\n{TRY_EACH}")
    told = {name: rest for name, *rest in map(json.loads, out.splitlines())}
    assert told.keys() == cases.keys()
    for name, (kind, message, package) in told.items():
        assert "\n" not in message
        assert "pip install " in message, (name, kind)
        if name in BROKEN:
            again = BROKEN[name][2] in of_programs.BINARIES
            assert ("--force-reinstall" in message) is again
            assert (kind, package) == ("UnsupportedVersionError", BROKEN[name][2]), message
            assert f"{package} {version_of(package)} cannot be imported beside " in message
        else:
            assert kind == "MissingPackageError", message
