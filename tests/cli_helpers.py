"""What tests of the command line share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import auto, std
from typer.testing import CliRunner

from packscore import shipped_model_path
from packscore.cli.app import app

MODEL = ("--model", str(shipped_model_path()), "--device", "cpu")
# The unequal records of these tests, in the order of the file.
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "query": "delete a directory", "items": ["Delete a tree.", "Open a file."], "n": 1},
    {"query": "shuffle é 🐼", "items": ["Shuffle a list in place."], "nested": {"k": [1, None]}},
    {"id": 7, "query": "open", "items": ["", "本", "Open a file.", "No."]},
]


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """The command line in one folder."""

    folder: Path

    def __call__(self, *args: str, stdin: bytes | None = None) -> Done:
        """Run a command."""
        done = CliRunner().invoke(app, list(args), input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    def write(self, name: str, records: list[Any]) -> str:
        """A JSONL file; a record that is a string goes in as it is."""
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))
        return name

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSONL file."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def fork() -> int:
    """As `os.fork`; the child writes its progress bars under a lock of its own.

    tqdm's is shared between processes, and a child that is killed while it has it never gives it
    back: the next one, and its parent, would wait for ever.
    """
    pid = os.fork()
    if not pid:
        for bars in (std.tqdm, auto.tqdm):
            bars.set_lock(threading.RLock())
    return pid


# As much of curl as the pages use, for machines that have none, or one that knows no --json.
CURL = """#!{python}
import sys, urllib.error, urllib.request
words = iter(sys.argv[1:])
body, url = None, ""
for word in words:
    if word == "--json":
        body = next(words).encode()
    elif not word.startswith("-"):
        url = word if "://" in word else "http://" + word
request = urllib.request.Request(url, body, {{"content-type": "application/json"}})
try:
    answer = urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    answer = error
sys.stdout.write(answer.read().decode())
"""


def has_curl() -> bool:
    """Whether there is one that takes --json."""
    try:
        found = subprocess.run(
            ["curl", "--help", "all"], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    return "--json" in found.stdout


def with_command(folder: Path) -> dict[str, str]:
    """An environment for shells in which `packscore` is this interpreter's, installed or not."""
    folder.mkdir(exist_ok=True)
    scripts = {"packscore": f'#!/bin/sh\nexec {sys.executable} -m packscore "$@"\n'}
    if not has_curl():
        scripts["curl"] = CURL.format(python=sys.executable)
    for name, text in scripts.items():
        script = folder / name
        script.write_text(text)
        script.chmod(0o755)
    python = Path(sys.executable).parent
    path = os.pathsep.join([str(folder), str(python), os.environ["PATH"]])
    return {**os.environ, "MODEL": str(shipped_model_path()), "PATH": path}
