"""Every client against `packscore serve` over loopback; `run.py` makes the environment for it.

python -m clients.check            # with tests/ and benchmarks/ on PYTHONPATH
python -m clients.check --record   # and write what the clients sent to recorded/
"""

from __future__ import annotations

import argparse
import datetime
import html
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients import page, wire
from clients.calls import KEY, MODEL, Call
from clients.decision_calls import CALLS
from clients.proxy import Exchanges, between
from clients.refusals import REFUSALS
from packscore import MultiItemScorer, shipped_model_path
from tolerances import PROBABILITY_REORDERED

RECORDED = Path(__file__).parent / "recorded"


def main() -> int:
    """Run what is asked for; the exit status is 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", help="calls whose name or distribution has this, and nothing else"
    )
    parser.add_argument("--record", action="store_true", help="write what the clients sent")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the page")
    parser.add_argument("--examples", type=int, default=50, help="of schemathesis, an operation")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    scorer = MultiItemScorer.from_pretrained(
        shipped_model_path(), device="cpu", dtype="float32", prompt="qwen3-reranker"
    )
    with serving("--api-key", KEY) as port:
        failed = _clients(scorer, port, options.only, options.record)
        if options.only is None:
            root = f"http://127.0.0.1:{port}"
            failed += _refusals(root) + _commands(root) + _laws(scorer, root)
            failed += _schema(root, options.examples) + _page(root, options.pictures)
    return int(failed > 0)


@contextmanager
def serving(*more: str, device: str = "cpu") -> Iterator[int]:
    """`packscore serve` with the shipped model, ready, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "packscore", "serve", "--port", str(port), "--quiet", *more]
    command += ["--model", f"{MODEL}={shipped_model_path()}", "--device", device]
    server = subprocess.Popen([*command, "--dtype", "float32"], stdout=subprocess.DEVNULL)
    try:
        _wait(server, f"http://127.0.0.1:{port}/ready")
        yield port
    finally:
        server.terminate()
        left = server.wait(60)
    assert left == 0, f"packscore serve ended with {left}"


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(3000):
        assert server.poll() is None, "packscore serve ended before it was ready"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer in five minutes")


def _clients(scorer: MultiItemScorer, port: int, only: str | None, record: bool) -> int:
    failed = 0
    with between(port) as (root, kept):
        for name, call in CALLS.items():
            if only and only not in name and only not in call.distribution:
                continue
            kept.clear()
            try:
                apart = _apart(scorer, call, root, kept)
                same = apart <= PROBABILITY_REORDERED
                told = f"{'equal' if same else 'DIFFERS'}: {apart:.0e} apart at most"
            except Exception:  # whatever a client raises is a line here, and the next is asked
                traceback.print_exc()
                same, told = False, "FAILED"
            _say(_named(call.distribution), name, told)
            failed += not same
            if record and same:
                _record(name, call, kept[-1])
    return failed


def _apart(scorer: MultiItemScorer, call: Call, root: str, kept: Exchanges) -> float:
    """How far what the client says is from the scores of this process, at most."""
    found: Any = call.ask(root)
    sent = kept[-1]
    state = sent["body"].get("state", sent["body"].get("input"))
    expected = wire.in_process(scorer, sent["path"], sent["body"], call.state or state)
    if isinstance(found, list):  # some clients are told how many to keep, and the server is not
        assert found, "no documents came back"
        expected = expected[: len(found)]
    return wire.furthest(found, expected)


def _named(distribution: str) -> str:
    return f"{distribution} {version(distribution)}"


def _say(client: str, what: str, told: str) -> None:
    print(f"{client:46} {what:24} {told}", flush=True)


def _record(name: str, call: Call, sent: dict[str, Any]) -> None:
    today = datetime.date.today().isoformat()
    kept: dict[str, Any] = {"client": _named(call.distribution), "recorded": today}
    kept["call"] = inspect.getsource(call.ask).splitlines()
    kept |= {key: sent[key] for key in ("method", "path", "headers", "body")}
    if call.state is not None:
        kept["state"] = call.state
    RECORDED.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (RECORDED / f"{name}.json").write_text(text, encoding="utf-8")


def _refusals(root: str) -> int:
    """Errors as each client's user meets them: of the class that says so, with the message."""
    failed = 0
    for call, (distribution, expected) in REFUSALS.items():
        try:
            told = f"no error: {call(root)}"
        except Exception as error:  # which one it is to be is what is looked at
            told = f"{type(error).__name__}: {error}"
        seen = all(text in told for text in expected)
        _say(_named(distribution), call.__name__, expected[0] if seen else f"FAILED: {told[:300]}")
        failed += not seen
    return failed


def _commands(root: str) -> int:
    """The commands of /docs, as they are but for the key."""
    told = urllib.request.urlopen(f"{root}/docs", timeout=60).read().decode()
    commands = [html.unescape(found) for found in re.findall(r"<pre>(.*?)</pre>", told)]
    failed = [one for one in commands if _fails(f"{one} -sf -H 'authorization: Bearer {KEY}'")]
    _say(
        "curl", f"{len(commands)} commands of /docs", f"FAILED: {failed}" if failed else "answered"
    )
    return len(failed) or int(not commands)


def _fails(command: str) -> bool:
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode != 0


def _laws(scorer: MultiItemScorer, root: str) -> int:
    """JevBench's laws, asked over HTTP and in this process: the same come out."""
    import jevbench

    import jevbench_laws

    tables = []
    backend = jevbench.systemone(f"{root}/v1/systemone", MODEL, api_key=KEY)
    for model in (backend, jevbench.from_callable(jevbench_laws.answering(scorer))):
        report = jevbench.evaluate(model, "jevbench-mini", cache=":memory:", bootstrap=0)
        rows = jevbench_laws.table(report)
        tables.append([row[:4] for row in rows])
        tables[-1].append(("", "errors", len(report.errors), 0))
    served, here = tables
    isolation = sum(broken for group, _, _, broken in served if group.startswith("BAT"))
    same = served == here and not isolation and served[-1][2] == 0
    told = "the same as in process, BAT holds" if same else "NOT the same as in process"
    _say(_named("jevbench"), f"{len(served) - 1} laws", told)
    for there, there_not in zip(served, here, strict=True):
        if there != there_not:
            print(there, there_not)
    return int(not same)


def _schema(root: str, examples: int) -> int:
    """Requests that schemathesis makes of the OpenAPI schema: none may end with a 500."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{root}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--max-examples", str(examples), "--no-color"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--seed", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout)
    told = "no server error" if done.returncode == 0 else "FAILED"
    _say(_named("schemathesis"), "openapi.json", told)
    return int(done.returncode != 0)


def _page(root: str, pictures: Path | None) -> int:
    told, failed = "ranks and answers at desk and phone width", 0
    if shutil.which("chromium") is None:
        told = "not run: no chromium on PATH"
    else:
        try:
            page.look(root, KEY, pictures)
        except Exception:  # a script's error, or a picture's
            traceback.print_exc()
            told, failed = "FAILED", 1
    _say(_named("playwright"), "the page", told)
    return failed


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
