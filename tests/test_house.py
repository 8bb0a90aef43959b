"""The house as its files stand: who imports whom, what the faces name, and how large things get."""

from __future__ import annotations

import ast
import functools
import graphlib
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import pytest

import packscore
import packscore_kernels

ROOT = Path(__file__).resolve().parents[1]
# Who may import whom; docs/design.md quotes it. A room is a folder, or a file beside the folders. A
# row allows what it names and whatever those may import: only rooms above it, so there is no
# circle. errors, telling, results, installed, interfaces and packscore_kernels are for all.
ROOMS = """
errors, telling, results, installed, interfaces, encoded, shipped, files ->
inputs -> encoded
text -> inputs, encoded
decisions -> text
model -> text
flows -> model, text
torch_engine -> flows, model
programs -> flows, model
calls -> flows, model
patching -> torch_engine, calls
loading -> model
core -> patching, torch_engine, calls
reading -> core, decisions
prefixes -> reading
batcher -> reading
scoring -> prefixes, batcher, loading
integrations, verify -> scoring
testing -> verify
selftest -> verify, shipped
plot -> inputs
serve -> scoring
fleet -> scoring, files
cli -> serve, verify, files, selftest, fleet
__main__ -> cli
"""
# programs brings jax and torchax; from outside it is imported here and nowhere else.
DOORS_OF_PROGRAMS = {
    ("packscore.patching", "_compile", "call"),
    ("packscore.core", "_new_engines", "call"),
    ("packscore.selftest.parts", "parts", "call"),
    ("packscore", "", "types"),
    ("packscore.calls", "", "types"),
    ("packscore.patching", "", "types"),
    ("packscore.core", "", "types"),
    ("packscore.scoring", "", "types"),
}
# The same of packscore_kernels, where errors and hardware are for all. The reference is the
# specification: it shares the layout with the kernel and nothing else.
KERNEL_ROOMS = """
errors, hardware, interfaces, attention.layout ->
attention.reference -> attention.layout
attention -> attention.layout
attention.api -> attention, attention.reference
row_attention -> attention
layer ->
page_writes -> attention.layout
"""
FACES = (packscore, packscore_kernels)
# a public name counts as an import of its home, also where it is taken from the face
HOMES = {f"{face.__name__}.{name}": home for face in FACES for name, home in face._HOME_OF.items()}
MODULES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root in (ROOT / "plugin", ROOT / "jax_kernels")
    for path in sorted(root.rglob("*.py"))
}
# What makes one stop and think. A kernel's body is what pallas_call gets, its launch what calls it.
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, FILES_IN_A_FOLDER = 400, 60, 120, 20
# the signatures and docstrings of what users call
LONG_FILES = {"packscore.scoring"}
Kind = Literal["load", "call", "types"]


class Import(NamedTuple):
    """One import, as the file runs ("load"), inside a function ("call") or for types only."""

    module: str
    function: str  # the innermost; "" outside of functions
    kind: Kind
    target: str  # a module


def imports(
    node: ast.AST, module: str, function: str = "", kind: Kind = "load"
) -> Iterator[Import]:
    """Every import below a node, and every public name that is looked up in its face."""
    for child in ast.iter_child_nodes(node):
        targets: list[str] = []
        if isinstance(child, ast.Import):
            targets = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: a relative import hides whom it means"
            targets = [target_of(child.module or "", alias.name) for alias in child.names]
        elif isinstance(child, ast.Attribute) and ast.unparse(child) in HOMES:
            targets = [HOMES[ast.unparse(child)]]
        yield from (Import(module, function, kind, target) for target in targets)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, module, child.name, "call")
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports(ast.Module(child.body, []), module, function, "types")
            yield from imports(ast.Module(child.orelse, []), module, function, kind)
        else:
            yield from imports(child, module, function, kind)


def target_of(module: str, name: str) -> str:
    """The module that `from module import name` reaches."""
    dotted = f"{module}.{name}"
    return HOMES.get(dotted) or (dotted if dotted in MODULES else module)


@functools.cache
def all_imports() -> list[Import]:
    return [
        found
        for module, path in MODULES.items()
        for found in imports(ast.parse(path.read_text()), module)
    ]


def enters_programs(one: Import) -> bool:
    room = "packscore.programs"
    return one.target.startswith(room) and not one.module.startswith(room)


def may_import(table: str, for_all: set[str]) -> dict[str, set[str]]:
    """By room: itself, what its row names, and what those may import."""
    allowed: dict[str, set[str]] = {}
    for row in table.strip().splitlines():
        rooms, below = (side.replace(",", " ").split() for side in row.split("->"))
        reached = for_all.union(*(allowed[room] for room in below))
        allowed |= {room: {room, *reached} for room in rooms}
    return allowed


def room_of(module: str, rooms: dict[str, set[str]]) -> str:
    """The narrowest room of the table that a module is in."""
    parts = module.split(".")[1:]
    while parts and ".".join(parts) not in rooms:
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize(
    ("package", "table", "for_all"),
    [
        ("packscore", ROOMS, {"errors", "results", "installed", "interfaces", "telling"}),
        ("packscore_kernels", KERNEL_ROOMS, {"errors", "hardware"}),
    ],
    ids=["packscore", "packscore_kernels"],
)
def test_rooms_import_what_the_table_allows(package: str, table: str, for_all: set[str]) -> None:
    """Inside functions and for types as well. The face is no room: it names everybody."""
    allowed = may_import(table, for_all)
    inside = f"{package}."
    strays = [
        one
        for one in all_imports()
        if one.module.startswith(inside) and one.target.startswith(inside)
        if room_of(one.target, allowed) not in allowed[room_of(one.module, allowed)]
        if not enters_programs(one)
    ]
    assert strays == []
    assert {room_of(name, allowed) for name in MODULES if name.startswith(inside)} == set(allowed)
    assert textwrap.indent(table.strip(), "    ") in (ROOT / "docs/design.md").read_text()


def test_programs_have_two_doors() -> None:
    found = {one[:3] for one in all_imports() if enters_programs(one)}
    assert found == DOORS_OF_PROGRAMS


def test_nothing_but_programs_imports_jax_and_kernels_import_no_torch() -> None:
    """Not even inside a function."""
    foreign = {
        "packscore": {"jax", "jaxlib", "torchax"},
        "packscore_kernels": {"torch", "torchax", "transformers", "packscore"},
    }
    strays = [
        one
        for one in all_imports()
        if one.target.partition(".")[0] in foreign[one.module.partition(".")[0]]
        if not one.module.startswith("packscore.programs")
    ]
    assert strays == []


def test_no_file_imports_itself_in_a_circle() -> None:
    """Not even by an import inside a function, or for types only."""
    graph: dict[str, set[str]] = {}
    for one in all_imports():
        if one.target in MODULES:
            graph.setdefault(one.module, set()).add(one.target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_the_face_tells_type_checkers_what_its_table_tells_python(face: ModuleType) -> None:
    tree = ast.parse(MODULES[face.__name__].read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = [
        (line.module, alias.name, alias.asname)
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]
    names = [(home, name) for home, names in face._HOMES.items() for name in names]
    assert sorted(told) == sorted((f"{face.__name__}.{home}", name, name) for home, name in names)


def test_no_test_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for one in imports(ast.parse(path.read_text()), path.stem):
            assert not any(part.startswith("test_") for part in one.target.split(".")), one


def kernels_and_launches(tree: ast.Module) -> set[str]:
    """Names of the functions that a pallas_call runs, and of those that call it."""
    found: set[str] = set()
    for function in functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("pallas_call"):
                run = {name.id for name in ast.walk(node.args[0]) if isinstance(name, ast.Name)}
                found |= {function.name, *run}
    return found


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_functions_and_folders_stay_small() -> None:
    large: list[str] = []
    for module, path in MODULES.items():
        source = path.read_text()
        tree = ast.parse(source)
        if len(source.splitlines()) > FILE_LINES and module not in LONG_FILES:
            large.append(f"{module}: {len(source.splitlines())} lines")
        kernels = kernels_and_launches(tree)
        for function in functions(tree):
            lines = body_lines(function)
            if lines > (KERNEL_LINES if function.name in kernels else FUNCTION_LINES):
                large.append(f"{module}.{function.name}: {lines} lines")
    folders = Counter(path.parent for path in MODULES.values())
    large += [f"{path}: {n} files" for path, n in folders.items() if n > FILES_IN_A_FOLDER]
    assert large == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their bare names."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
