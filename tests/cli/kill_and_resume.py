"""Kill a scoring process again and again, resume it each time, and leave its files to compare.

    python kill_and_resume.py FOLDER MODEL --kills 20 --seed 0

FOLDER holds in.jsonl. One unbroken run writes unbroken.jsonl; the killed ones write killed.jsonl.
Imports are done once: every run is a forked child, which is killed with SIGKILL when its output
has grown to a random size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from packscore.cli import load as loading
from packscore.cli import run as running
from packscore.cli.app import app

PARENT_IMPORTS = (transformers, loading, running)


def start(folder: Path, args: list[str]) -> int:
    """Fork a child that runs the command; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(folder)
        app(args)
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, output: Path, size: int) -> int:
    """Kill a child as soon as its output has a size; its exit code."""
    while not (output.exists() and output.stat().st_size >= size):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    return finish(pid)


def main() -> None:
    """Run it, and print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    def command(output: str) -> list[str]:
        options = ["--model", args.model, "--device", "cpu", "--prompt", "plain", "--resume"]
        return ["score", "in.jsonl", "-o", output, *options, "--labels", "no,yes", "--quiet"]

    began = time.perf_counter()
    codes = [finish(start(args.folder, command("unbroken.jsonl")))]
    unbroken_s = time.perf_counter() - began
    size = (args.folder / "unbroken.jsonl").stat().st_size
    killed = args.folder / "killed.jsonl"
    generator = random.Random(args.seed)
    records_at_kill = []
    for place in sorted(generator.sample(range(int(0.98 * size)), args.kills)):
        codes.append(kill_at(start(args.folder, command("killed.jsonl")), killed, place))
        records_at_kill.append(killed.read_bytes().count(b"\n"))
    codes.append(finish(start(args.folder, command("killed.jsonl"))))
    seconds = {"unbroken_s": unbroken_s, "all_s": time.perf_counter() - began}
    print(json.dumps({"codes": codes, "records_at_kill": records_at_kill, **seconds}))


if __name__ == "__main__":
    main()
