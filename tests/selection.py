"""Which tests run by default, and in what order two processes take them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

HAS_JAX = all(importlib.util.find_spec(name) for name in ("jax", "torchax"))
# what a test file imports only where jax is, and what of it is numpy
OF_JAX = ("jax", "torchax", "packscore.programs", "packscore.ModelProgram", "packscore_kernels")
NUMPY = (
    *("packscore_kernels.attention.layout", "packscore_kernels.hardware"),
    *("packscore_kernels.SegmentLayout", "packscore_kernels.Group"),
)
# folders of tests that need jax whatever they import
JAX_FOLDERS = ("kernels", "programs", "tpu", "tpu_compile")

# Tests that are one unit of work, those that take longest first: whatever starts late is short, and
# no process waits for another at the end. All other files follow, a unit each, so that what the
# tests of a file share is made once.
LONGEST_FIRST = (
    "tests/tpu_compile/test_compile.py::test_whole_models_compile",
    "tests/tpu_compile/test_compile.py::test_every_variant_compiles",
    "tests/tpu_compile/test_compile.py::test_the_compiler_keeps",
    "tests/tpu_compile/test_compile.py",
    "tests/kernels/test_variants.py",
    "tests/programs/test_program.py",
    "tests/text/test_labels.py",
    "tests/test_docs.py",
    "tests/integrations/test_examples.py",
    "tests/scoring/test_memory.py",
    "tests/programs/test_program_exactness.py",
    "tests/kernels/test_layer.py",
    "tests/kernels/test_implementations.py",
    "tests/programs/test_fused_layer.py",
    "tests/flows/test_residency.py",
    "tests/scoring/test_exactness.py",
    "tests/kernels/test_counts.py",
    "tests/model/test_classifiers.py",
    "tests/test_imports.py",
    "tests/test_site.py",
)


def unit_of(nodeid: str) -> str:
    """The unit that a test belongs to: the first above that its name begins with, or its file."""
    units = (unit for unit in LONGEST_FIRST if nodeid.startswith(unit))
    return next(units, nodeid.partition("::")[0])


@functools.cache
def needs_jax(path: Path) -> bool:
    """Whether a test file can be read with jax alone, by its folder and the imports at its top."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    asked = [name for name in names if not _is_of(name, NUMPY)]
    return path.parent.name in JAX_FOLDERS or any(_is_of(name, OF_JAX) for name in asked)


def _is_of(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def takes_jax(item: pytest.Item) -> bool:
    """Whether a test's parameters say that it scores through programs: `"jax"` among them."""
    values = getattr(item, "callspec", None)
    found = list(values.params.values()) if values else []
    return any("jax" in x if isinstance(x, tuple) else x == "jax" for x in found)


def pairwise(rows: Sequence[tuple[Hashable, ...]]) -> set[int]:
    """Indices of a few rows that hold each value, and each pair of two columns' values, of all."""

    def parts(row: tuple[Hashable, ...]) -> set[Any]:
        return {*enumerate(row), *itertools.combinations(enumerate(row), 2)}

    held = [parts(row) for row in rows]
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(range(len(rows)), key=lambda k: len(held[k] & missing))
        chosen.add(best)
        missing -= held[best]
    return chosen


def cover(cases: Iterable[tuple[str, tuple[Any, ...], tuple[Hashable, ...]]]) -> list[Any]:
    """Parameters of a test: a pairwise cover of the cases by default, and the others when long.

    Args:
      cases: (id, the test's arguments, features of the case that are to meet in pairs).
    """
    table = list(cases)
    chosen = pairwise([features for _, _, features in table])
    return [
        pytest.param(*arguments, id=name, marks=() if k in chosen else pytest.mark.long)
        for k, (name, arguments, _) in enumerate(table)
    ]
