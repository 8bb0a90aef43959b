"""`packscore serve` under load, every answer compared with the scorer's own in this process.

    python benchmarks/serve_load.py              # 2 000 requests of mixed sizes from 200 clients
    python benchmarks/serve_load.py --prefixes   # 10 000 requests over 200 queries: memory, pages
    python benchmarks/serve_load.py --stop       # kill -TERM under load: what became of requests

The clients run in this process, beside the server, on the same cores: what they take is in the
times. One at a time is one client against the same server; one request a launch is 200 clients
against a server that lets one request at a time into its queue. The model is the small one inside
packscore, unless another is named.
"""

from __future__ import annotations

import argparse
import asyncio
import builtins
import itertools
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

import provenance
from packscore import MultiItemScorer, shipped_model_path

SAME_SCORE = 1e-5  # in float32, the contract's
WORDS = re.findall(r"[a-z]{2,}", " ".join(str(x.__doc__) for x in vars(builtins).values()))
Numbers = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """A request, and the numbers that its answer has to have."""

    path: str
    body: dict[str, Any]
    expected: Numbers


@dataclass
class Outcome:
    """What became of requests."""

    seconds: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    furthest: float = 0.0

    def take(self, asked: Asked, status: int, answer: Any, seconds: float) -> None:
        """Count an answer, and compare it."""
        if status != 200:
            self.counts[f"refused with {status}"] += 1
            return
        found = numbers(answer)
        if found.keys() != asked.expected.keys():
            self.counts["wrong"] += 1
            return
        apart = max(abs(found[key] - p) for key, p in asked.expected.items())
        self.furthest = max(self.furthest, apart)
        self.counts["right" if apart <= SAME_SCORE else "wrong"] += 1
        self.seconds.append(seconds)


def words(rng: random.Random, least: int, most: int) -> str:
    """So many words of Python's documentation."""
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def rerank(rng: random.Random, query: str, most: int) -> tuple[str, dict[str, Any]]:
    """Documents for a query: 1 to `most`, half of the requests with few."""
    n = round(most ** rng.random())
    return "/v1/rerank", {"query": query, "documents": [words(rng, 1, 40) for _ in range(n)]}


def mixed(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One of the endpoints, with few items or many."""
    path, body = rerank(rng, words(rng, 2, 8), 40)
    kind = rng.random()
    if kind < 0.6:
        return path, body
    if kind < 0.8:
        scored = {"query": body["query"], "items": body["documents"]}
        return "/v1/score", scored | {"apply_softmax": rng.random() < 0.5}
    options = dict.fromkeys(rng.sample(sorted(set(WORDS)), 5))
    each = [
        {"type": "noul", "instructions": words(rng, 3, 12)},
        {"type": "choice", "instructions": words(rng, 3, 12), "criteria": options},
        {"type": "score", "instructions": words(rng, 3, 12), "criteria": list(options)},
    ]
    asked = {str(i): rng.choice(each) for i in range(rng.randint(1, 6))}
    return "/v1/systemone", {"state": words(rng, 10, 80), "questions": asked}


def numbers(answer: dict[str, Any]) -> Numbers:
    """An answer's scores by what they are of."""
    if "results" in answer:
        return {str(one["index"]): one["relevance_score"] for one in answer["results"]}
    if "scores" in answer:
        return {f"{i} {k}": p for i, row in enumerate(answer["scores"]) for k, p in enumerate(row)}
    found: Numbers = {}
    for name, one in answer["answers"].items():
        each = {"yes": one["noul"]} if one["type"] == "noul" else one["probabilities"]
        found |= {f"{name} {option}": p for option, p in each.items()}
    return found


def in_process(scorer: MultiItemScorer, path: str, body: dict[str, Any]) -> Asked:
    """A request with what the scorer says by itself, one call at a time."""
    if path == "/v1/rerank":
        ranked = scorer.rank(body["query"], body["documents"])
        answer = [{"index": x["corpus_id"], "relevance_score": x["score"]} for x in ranked]
        return Asked(path, body, numbers({"results": answer}))
    if path == "/v1/score":
        softmax = body["apply_softmax"]
        scores = scorer.score(body["query"], body["items"], apply_softmax=softmax)
        return Asked(path, body, numbers({"scores": scores}))
    decision = scorer.decide(body["state"], body["questions"])
    return Asked(path, body, numbers(decision.to_systemone()))


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    port: int

    def get(self, path: str) -> str:
        """What it says to a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return str(answer.read().decode())

    def counted(self, name: str) -> float:
        """A counter of /metrics; NaN where it is not there."""
        found = re.search(rf"^packscore_{name}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.M)
        return float(found[1]) if found else float("nan")

    @property
    def megabytes(self) -> float:
        """What it has in memory."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@contextmanager
def serving(*command: str) -> Iterator[Server]:
    """A server, ready, on a free port; it has to end well."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(rb"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
        server = Server(process, int(found[1]))
        for _ in range(600):
            try:
                server.get("/ready")
                break
            except OSError:
                time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        assert process.wait(120) == 0
        process.stderr.close()


def of(name: str) -> tuple[str, ...]:
    """The command that serves a model on a free port."""
    serve = (sys.executable, "-m", "packscore", "serve", "--quiet", "--port", "0")
    return (*serve, "--model", name, "--device", "cpu", "--dtype", "float32")


def one_a_launch(name: str) -> None:
    """A server in which a request enters the queue when the one before has its answer."""
    import uvicorn

    from packscore.serve import create_app

    scorer: Any = loaded(name)
    scorer.start_batcher(window_seconds=0)
    turn = asyncio.Lock()

    def in_turn(call: Any) -> Any:
        async def asked(*args: Any, **options: Any) -> Any:
            async with turn:
                return await call(*args, **options)

        return asked

    for call in ("async_rank", "async_score", "async_decide"):
        setattr(scorer, call, in_turn(getattr(scorer, call)))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    server = uvicorn.Server(uvicorn.Config(create_app(scorer), log_config=None))
    # the signal is raised again when it has stopped, and is a good end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    asyncio.run(server.serve([listener]))


def loaded(name: str) -> MultiItemScorer:
    """The scorer of a model, in float32."""
    options: Any = {"device": "cpu", "dtype": "float32", "prompt": "qwen3-reranker"}
    return MultiItemScorer.from_pretrained(name, **options)


class Connection:
    """One client's, which it keeps."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        """(status, body) of an answer.

        Raises:
          ConnectionRefusedError: nobody listens any more.
          asyncio.IncompleteReadError, ConnectionResetError: it was closed without an answer.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        try:
            told = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            answer = await reader.readexactly(int(told.partition("content-length: ")[2].split()[0]))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            raise
        if "\r\nconnection: close" in told:
            self.close()
        return int(told.split()[1]), answer

    def close(self) -> None:
        """Let it go; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask_all(server: Server, asked: list[Asked], n: int, watch: Any = None) -> Outcome:
    """All requests, from n clients that each wait for an answer before they ask again."""
    outcome, left = Outcome(), iter([(one, json.dumps(one.body).encode()) for one in asked])

    async def client(connection: Connection) -> None:
        for one, body in left:
            began = time.perf_counter()
            status, answer = await connection.ask(one.path, body)
            outcome.take(one, status, json.loads(answer), time.perf_counter() - began)
            if watch is not None:
                watch(outcome.counts.total())
        connection.close()

    await asyncio.gather(*(client(Connection(server.port)) for _ in range(n)))
    return outcome


def load(scorer: MultiItemScorer, name: str, options: argparse.Namespace) -> bool:
    """Mixed requests: merged, one at a time, one request a launch."""
    rng = random.Random(1)
    asked = [in_process(scorer, *mixed(rng)) for _ in range(options.requests)]
    few = asked[: max(1, len(asked) // 10)]
    print(f"{len(asked)} requests, {sum(len(one.expected) for one in asked)} numbers")
    print(f"{'':30} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'a launch':>8}  answers")
    alone = (sys.executable, __file__, "--model", name, "--one-a-launch")
    ways = [
        (f"{options.clients} clients", of(name), asked, options.clients),
        ("one at a time", of(name), few, 1),
        (f"{options.clients}, one request a launch", alone, asked, options.clients),
    ]
    held, launched = True, 0.0
    for way, started, these, n in ways:
        with serving(*started) as server:
            asyncio.run(ask_all(server, few, 4))  # to warm up
            before = [server.counted(x) for x in ("queue_ran_total", "launches_total")]
            began = time.perf_counter()
            outcome = asyncio.run(ask_all(server, these, n))
            took = time.perf_counter() - began
            after = [server.counted(x) for x in ("queue_ran_total", "launches_total")]
        ran, launches = (x - y for x, y in zip(after, before, strict=True))
        cuts = statistics.quantiles(outcome.seconds, n=100)
        told = f"{dict(outcome.counts)}, {outcome.furthest:.0e} apart at most"
        print(
            f"{way:30} {len(these) / took:10.1f} {1e3 * cuts[49]:8.1f} {1e3 * cuts[98]:8.1f} "
            f"{ran / launches:8.1f}  {told}",
            flush=True,
        )
        launched = launched or ran / launches
        held &= outcome.counts == {"right": len(these)}
    return held and launched > 4


def prefixes(scorer: MultiItemScorer, name: str, options: argparse.Namespace) -> bool:
    """Many requests over few queries: memory, prefix hits, pages."""
    rng = random.Random(2)
    queries = [words(rng, 5, 60) for _ in range(200)]
    # as many different requests as can be compared in a few minutes, each asked several times
    made = [in_process(scorer, *rerank(rng, query, 4)) for query in queries * 5]
    asked = rng.choices(made, k=5 * options.requests)
    seen: dict[int, float] = {}
    with serving(*of(name), "--prefix-cache-bytes", str(options.prefix_cache_bytes)) as server:

        def watch(n: int) -> None:
            if n % 500 == 0:
                seen[n] = server.megabytes

        outcome = asyncio.run(ask_all(server, asked, options.clients, watch))
        hits = server.counted("prefix_hits_total")
        pages, budget = server.counted("prefix_pages"), server.counted("prefix_pages_budget")
    print(f"{dict(outcome.counts)}, {outcome.furthest:.0e} apart at most; {hits:.0f} prefix hits")
    print(f"pages: {pages:.0f} of {budget:.0f} are taken")
    print("MiB after so many:", {n: round(size) for n, size in seen.items()})
    later = [size for n, size in seen.items() if n > 1000]
    grown = max(later, default=seen[1000]) / seen[1000] - 1
    print(f"grown by at most {100 * grown:.1f} % after the first 1 000")
    held = outcome.counts == {"right": len(asked)} and hits > len(asked) / 2
    return held and 0 < pages <= budget and grown < 0.05


def stop(scorer: MultiItemScorer, name: str, options: argparse.Namespace) -> bool:
    """kill -TERM under load: every request that was accepted is answered, and the code is 0."""
    rng = random.Random(3)
    asked = itertools.cycle([in_process(scorer, *mixed(rng)) for _ in range(100)])
    outcome = Outcome()

    async def client(connection: Connection) -> None:
        for one in asked:
            began = time.perf_counter()
            try:
                status, answer = await connection.ask(one.path, json.dumps(one.body).encode())
            except ConnectionRefusedError:
                outcome.counts["nobody listens"] += 1
                return
            except (OSError, asyncio.IncompleteReadError):
                outcome.counts["lost"] += 1
                return
            outcome.take(one, status, json.loads(answer), time.perf_counter() - began)
            if status == 503:
                await asyncio.sleep(0.2)  # as a client does that is told to come back

    async def all_clients(server: Server) -> None:
        asyncio.get_running_loop().call_later(2, server.process.send_signal, signal.SIGTERM)
        made = (client(Connection(server.port)) for _ in range(options.clients))
        await asyncio.gather(*made)

    with serving(*of(name)) as server:
        asyncio.run(all_clients(server))
        code = server.process.wait(120)
    print(f"{dict(outcome.counts)}, {outcome.furthest:.0e} apart at most; it ended with {code}")
    counts = outcome.counts
    return not counts["lost"] and not counts["wrong"] and counts["right"] > 0 and code == 0


def main() -> None:
    """Run what is asked for; the exit status is 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(shipped_model_path()))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--prefix-cache-bytes", type=int, default=2**24)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--prefixes", action="store_true", help="memory and pages")
    way.add_argument("--stop", action="store_true", help="kill -TERM under load")
    way.add_argument("--one-a-launch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_a_launch:
        one_a_launch(options.model)
        return
    print(provenance.today(), provenance.commit(), provenance.cpu(), "load", provenance.load())
    print(provenance.versions("packscore", "torch", "transformers", "fastapi", "uvicorn"))
    run = prefixes if options.prefixes else stop if options.stop else load
    held = run(loaded(options.model), options.model, options)
    print("held" if held else "DID NOT HOLD")
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
