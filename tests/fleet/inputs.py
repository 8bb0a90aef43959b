"""Files of pairs, and what stands in the results that a run makes of them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packscore import shipped_model_path

MODEL = str(shipped_model_path())
WORDS = re.findall(
    r"\w+", "read a file, list and sort nodes of a tree; copy, move or delete by name"
)


def pairs(path: Path, num_queries: int, items: int, *, row_groups: int = 7) -> None:
    """A file of (query, document) rows, with columns that are carried and groups that differ."""
    draw = random.Random(num_queries)
    rows: dict[str, list[Any]] = {"query": [], "document": [], "doc_id": [], "weight": []}
    for q in range(num_queries):
        query = f"{_text(draw, 3)} {q}"
        # as many more as the one before has less: the sum is what was asked for
        for i in range(items + (items // 2 if q % 2 else -(items // 2))):
            rows["query"].append(query)
            rows["document"].append(_text(draw, 4))
            rows["doc_id"].append(f"{q}-{i}")
            rows["weight"].append(draw.random() if q > num_queries // 2 else None)
    table = pa.table(rows)
    pq.write_table(table, path, row_group_size=max(1, len(table) // row_groups))


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def lines(path: Path) -> list[bytes]:
    """The JSON lines of a file, or of all parts of a folder, in order."""
    parts = sorted(path.glob("part-*.jsonl")) if path.is_dir() else [path]
    return [line for part in parts for line in part.read_bytes().splitlines()]


def rankings(path: Path) -> list[dict[str, Any]]:
    """Records of JSON lines, or of the parts of a folder as one dataset of parquet."""
    if path.is_dir() and next(path.glob("part-*.parquet"), None):
        table = pq.ParquetDataset(sorted(path.glob("part-*.parquet"))).read()
        return list(table.to_pylist())
    return [json.loads(line) for line in lines(path)]


def faults(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """How rankings differ: pairs that are lost, there twice, of another score or elsewhere."""
    told = []
    ours, theirs = _scores(found), _scores(expected)
    for name, count in (ours[1] - theirs[1]).items():
        told.append(f"{name} is there {count} times too often")
    for name, count in (theirs[1] - ours[1]).items():
        told.append(f"{name} is lost {count} times")
    for name in ours[0].keys() & theirs[0].keys():
        if ours[0][name] != theirs[0][name]:
            told.append(f"{name}: {ours[0][name]}, not {theirs[0][name]}")
    if not told and [one["query"] for one in found] != [one["query"] for one in expected]:
        told.append("records are in another order")
    return told


def _scores(records: list[dict[str, Any]]) -> tuple[dict[str, float], Counter[str]]:
    entries = [entry for one in records for entry in one["ranking"]]
    return {x["id"]: x["score"] for x in entries}, Counter(x["id"] for x in entries)
