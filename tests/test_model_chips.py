"""The table of models and chips, from sizes worked out by hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

from model_chips import COLUMNS, HERE, LAYERS, MARKS, MODELS, PAGE, chips_for, memory_of, table
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR

GIB = 2**30


def test_weights_are_those_of_the_models() -> None:
    for name, billions in {
        "Qwen3-0.6B": 0.596,
        "Qwen3-8B": 8.19,
        "Qwen3-32B": 32.76,
        "Qwen3-30B-A3B": 30.53,
        "Qwen3-235B-A22B": 235.1,
        "Qwen2.5-7B": 7.62,
        "Llama-3.2-1B": 1.236,
        "Llama-3.2-3B": 3.21,
        "mxbai-rerank-base-v2": 0.494,
        "mxbai-rerank-large-v2": 1.54,
    }.items():
        assert memory_of(MODELS[name]).weights == pytest.approx(2e9 * billions, rel=5e-3), name


def test_the_smallest_slice_holds_a_model() -> None:
    memory = memory_of(MODELS["Qwen3-32B"])  # 61 GiB of weights
    assert chips_for(memory, CHIPS["v6e"]) == 4
    assert chips_for(memory, CHIPS["v5e"]) == 8
    assert chips_for(memory, CHIPS["v5p"]) == 1
    # a device is a core, with half of the chip's memory
    assert chips_for(memory._replace(weights=95 * GIB), CHIPS["tpu7x"]) == 4
    assert chips_for(memory._replace(weights=2000 * GIB), CHIPS["v5e"]) is None


def test_a_table_says_what_was_counted_and_what_needs_a_slice() -> None:
    fits = {"kernels": "held", "memory": (GIB, GIB, GIB), "chips": 1}
    needs = {"kernels": "chunked", "memory": (60 * GIB, GIB, GIB), "chips": 4}
    cells = {chip: dict.fromkeys(MODELS, fits) for chip in COLUMNS}
    cells["v6e"] = {**cells["v6e"], "Qwen3-32B": needs}
    times = {"Qwen3-0.6B, v6e": {"ms": 26.6, "date": "2026-11-26"}}
    text = table(cells, times)
    (first,) = (line for line in text.splitlines() if line.startswith("| Qwen3-0.6B "))
    assert first.split(" | ")[1:3] == ["held; 3.0 GiB", "held; 3.0 GiB; **27 ms**"]
    (large,) = (line for line in text.splitlines() if line.startswith("| Qwen3-32B "))
    assert large.split(" | ")[2] == "chunked; 15.5 GiB; 4 chips"
    assert KNOWN_ERROR[1:] in text
    assert "2026-11-26" in text


def test_layers_that_stand_for_all_are_taken_for_nothing_else() -> None:
    for model in MODELS.values():
        assert all(n % LAYERS for n in (*model[1:8], model.expert or 1, 12_288, 16_384, 128))


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed here")
def test_the_page_has_the_table_of_today() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "model_chips.py")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    begin, end = MARKS
    page = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert page.strip() == text.stdout.strip()
