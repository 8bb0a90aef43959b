"""One server process over loopback: large bodies, hang-ups, and a stop while it is asked."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from packscore import MultiItemScorer, shipped_model_path
from serve_helpers import DOCUMENTS, QUERY
from tolerances import PROBABILITY_MAX_FLOAT32

CLIENTS = 32
MB = 2**20
ERRORS_OF_ACCEPTED = (httpx.ReadError, httpx.RemoteProtocolError, httpx.TimeoutException)


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the shipped model, and its address."""
    command = [
        sys.executable,
        "-m",
        "packscore",
        "serve",
        "--model",
        f"tiny={shipped_model_path()}",
    ]
    command += ["--device", "cpu", "--dtype", "float32", "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = ""
        while " at http" not in line:
            line = process.stderr.readline()
            assert line, process.wait()
        # nobody reads what it logs, which fills a pipe
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, line.rpartition(" at ")[2].strip()
    finally:
        process.kill()
        process.wait()


def upload(address: str, megabytes: int) -> tuple[int, bytes]:
    """The answer to a body of so many, which is sent whatever the server thinks of it."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=60)
    try:
        headers = {"content-type": "application/json", "content-length": str(megabytes * MB)}
        pieces = (b" " * MB for _ in range(megabytes))
        connection.request("POST", "/v1/rerank", body=pieces, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def hang_up(address: str) -> None:
    """Ask, and be gone."""
    where = urlsplit(address)
    body = b'{"query": "a", "documents": ["b"]}'
    head = f"POST /v1/rerank HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((str(where.hostname), where.port or 80)) as connection:
        connection.sendall(head.encode() + body)


def counted(address: str) -> dict[str, float]:
    """What the server counts of its one model."""
    text = httpx.get(f"{address}/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels == {"model": "tiny"}
    }


async def load(address: str, expected: dict[int, float], stop: asyncio.Event) -> Counter[str]:
    """Clients that ask without a pause; what came of it, by kind."""
    found: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        documents = DOCUMENTS[number % 3 :]
        for i in range(1000):
            body = {"query": QUERY, "documents": documents}
            try:
                response = await client.post(f"{address}/v2/rerank", json=body)
            except httpx.ConnectError:
                found["not accepted"] += 1
                return
            except ERRORS_OF_ACCEPTED as error:
                found[f"lost: {error!r}"] += 1
                return
            if response.status_code == 503 and int(response.headers["retry-after"]) >= 1:
                found["refused"] += 1
                await asyncio.sleep(0.05)
                continue
            results = response.json()["results"]
            wrong = [
                one
                for one in results
                if abs(one["relevance_score"] - expected[one["index"] + number % 3])
                > PROBABILITY_MAX_FLOAT32
            ]
            is_right = response.status_code == 200 and len(results) == len(documents) and not wrong
            found["right" if is_right else f"wrong: {response.status_code}"] += 1
            if i == 1:
                stop.set()

    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(ask(client, number) for number in range(CLIENTS)))
    return found


def test_a_server_answers_all_that_it_accepted_before_it_ends(scorer: MultiItemScorer) -> None:
    expected = {one["corpus_id"]: one["score"] for one in scorer.rank(QUERY, DOCUMENTS)}
    with serving("--max-body-bytes", str(MB), "--drain-seconds", "0.5") as (process, address):
        memory = psutil.Process(process.pid).memory_info
        assert upload(address, 2)[0] == 413
        before = memory().rss
        status, told = upload(address, 100)
        assert (status, b"body" in told) == (413, True)
        assert memory().rss - before < 20 * MB

        for _ in range(20):
            hang_up(address)

        async def stop_under_load() -> Counter[str]:
            begun = asyncio.Event()

            async def stop() -> None:
                await begun.wait()
                process.send_signal(signal.SIGTERM)

            stopping = asyncio.create_task(stop())
            try:
                return await load(address, expected, begun)
            finally:
                await stopping

        counts = counted(address)
        assert counts["packscore_queue_requests"] == 0
        asked = counts["packscore_queue_accepted_total"]
        assert counts["packscore_queue_cancelled_total"] <= asked <= 20
        found = asyncio.run(stop_under_load())
        assert process.wait(30) == 0
    assert set(found) <= {"right", "refused", "not accepted"}, found
    assert found["right"] > CLIENTS
    assert found["refused"] > 0
