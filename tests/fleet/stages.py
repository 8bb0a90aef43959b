"""Stages of Ray Data, and the deployment of Ray Serve, against a scorer in this process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fleet.inputs import MODEL, pairs
from packscore import MultiItemScorer
from packscore.fleet import (
    DecideStage,
    PairStage,
    RankStage,
    ScoreStage,
    Workers,
    read_records,
    run_groups,
    run_stage,
)
from packscore.fleet.cluster import connected

LOADING = {"device": "cpu", "prompt": "qwen3-reranker"}
ARGUMENTS: dict[str, Any] = {"model": MODEL, **LOADING}
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, PAGE = ROOT / "examples", ROOT / "docs/fleet.md"


def check_stages(folder: Path) -> str:
    """Each stage gives what a scorer gives, whatever the batches."""
    pairs(folder / "in.parquet", 12, 8)
    scorer = MultiItemScorer.from_pretrained(MODEL, **LOADING)
    asked = {"q": {"type": "noul", "instructions": "Is it about files?"}}
    with connected(quiet=True) as ray:
        records = read_records(str(folder / "in.parquet"), block_rows=20).materialize()
        found = sorted(records.take_all(), key=lambda one: one["line"])
        assert len(found) == 12, found
        _check_scores(scorer, records, found)
        workers = Workers(1)
        ranked = run_stage(records, RankStage, {**ARGUMENTS, "top_k": 3}, workers=workers)
        for one in ranked.take_all():
            top = scorer.rank(one["query"], list(one["items"]), top_k=3, flow="packed")
            assert [dict(entry) for entry in one["ranking"]] == top, one
        states = ray.data.from_items([{"state": one["query"]} for one in found])
        given = {"model": MODEL, "device": "cpu", "questions": asked}
        for one in run_stage(states, DecideStage, given, workers=workers).take_all():
            decided = scorer.decide(one["state"], asked, flow="packed").to_systemone()
            assert json.loads(one["answers"]) == json.loads(json.dumps(decided)), one
    return f"{len(found)} records by ScoreStage, RankStage and DecideStage: equal"


def _check_scores(scorer: MultiItemScorer, records: Any, found: list[dict[str, Any]]) -> None:
    expected = {
        one["query"]: scorer.score(one["query"], list(one["items"]), flow="packed") for one in found
    }
    for batch_size, workers in ((1, Workers(2)), (7, Workers(1))):
        scored = run_stage(
            records, ScoreStage, ARGUMENTS, workers=workers, batch_size=batch_size
        ).take_all()
        got = {one["query"]: [list(row) for row in one["scores"]] for one in scored}
        assert len(scored) == len(found), scored
        assert got == expected, (batch_size, got, expected)


def check_groups(folder: Path) -> str:
    """Rows of a query that are scattered, brought together by Ray."""
    pairs(folder / "in.parquet", 10, 8)
    table = pq.read_table(folder / "in.parquet")
    scorer = MultiItemScorer.from_pretrained(MODEL, **LOADING)
    rows = table.to_pylist()
    with connected(quiet=True) as ray:
        shuffled = ray.data.from_arrow(table.take(_scattered(len(table))))
        given = {**ARGUMENTS, "item": "document"}
        found = run_groups(shuffled, "query", PairStage, given, workers=Workers(1)).take_all()
    got = {one["doc_id"]: one["score"] for one in found}
    scores = scorer.predict([(row["query"], row["document"]) for row in rows])
    assert len(found) == len(rows), (len(found), len(rows))
    far = max(abs(got[r["doc_id"]] - s) for r, s in zip(rows, scores, strict=True))
    assert far < 0.02, far  # bfloat16, in another order of items
    return f"{len(found)} scattered rows by PairStage: equal to {far:.1e}"


def _scattered(count: int) -> list[int]:
    return [i * 37 % count for i in range(count)] if count % 37 else list(range(count))[::-1]


def check_docs(folder: Path) -> str:
    """The page's snippets, in the order of the page, in one process."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = folder / "page.py"
    # first, as a user's own script does
    begun = "import ray\n\nray.init(num_cpus=2, include_dashboard=False)\n"
    script.write_text(begun + "\n".join(found))
    done = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return f"{len(found)} snippets of docs/fleet.md"


def check_serve(folder: Path) -> str:
    """The example answers a request over HTTP as the scorer does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-P", str(EXAMPLES / "ray_serve.py"), MODEL, "--port", str(port)],
        cwd=folder,
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    documents = ["Rename a file or directory.", "Recursively delete a directory tree."]
    body = {"query": "delete a directory tree", "documents": documents}
    try:
        answer = _asked(process, f"http://127.0.0.1:{port}/v1/rerank", body)
    finally:
        process.terminate()
        process.communicate(timeout=60)
    scorer = MultiItemScorer.from_pretrained(MODEL, device="cpu", prompt="qwen3-reranker")
    expected = {x["corpus_id"]: x["score"] for x in scorer.rank(body["query"], documents)}
    got = {x["index"]: x["relevance_score"] for x in answer["results"]}
    assert got == expected, (got, expected)
    return f"one request to examples/ray_serve.py: {got}, as the scorer's own"


def _asked(process: subprocess.Popen[str], url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + 240
    while True:
        assert process.poll() is None, (process.communicate()[1] or "")[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < until, "no answer"
            time.sleep(1)
