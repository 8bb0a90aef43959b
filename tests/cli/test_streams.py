"""Devices and pipes are written as they are; outputs that cannot be are refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli_helpers import MODEL, RECORDS, Cli
from cli_stand_in import plan_of, run_stand_in
from packscore.files.sources import is_stream


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("errors", ["/dev/null", "/dev/stderr", None])
def test_devices_are_written_and_stay(
    cli: Cli, options: tuple[str, ...], errors: str | None
) -> None:
    cli.write("in.jsonl", [*RECORDS, "nope"])
    given = () if errors is None else ("--errors", errors)
    before = os.stat("/dev/null")
    done = cli("score", "in.jsonl", "-o", "/dev/null", *MODEL, *options, *given)
    assert done.code == 3, done.err
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_rdev) == (before.st_ino, before.st_rdev)
    assert ('"line": 4' in done.err) == (errors != "/dev/null")
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    assert list(Path("/dev").glob("*packscore*")) == []


def test_a_device_for_errors_beside_a_file(cli: Cli) -> None:
    cli.write("in.jsonl", [*RECORDS, "nope"])
    for options in ((), ("--overwrite",)):
        given = ("-o", "out.jsonl", "--errors", "/dev/null", *MODEL, *options)
        assert cli("score", "in.jsonl", *given).code == 3
        assert len(cli.read("out.jsonl")) == len(RECORDS)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    done = cli("score", "in.jsonl", *given, "--resume")
    assert done.code == 2


def test_a_pipe_gets_what_a_file_would(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    run_stand_in(plan_of("out.jsonl"))
    os.mkfifo("pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(Path("pipe").read_bytes()))
    reader.start()
    run_stand_in(plan_of("pipe", resume=False, overwrite=True))
    reader.join(20)
    assert got == [Path("out.jsonl").read_bytes()]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_a_pipe_goes_in_and_standard_output_by_name_comes_out(cli: Cli) -> None:
    cli.write("in.jsonl", RECORDS)
    command = f"{sys.executable} -m packscore score <(gzip -c in.jsonl) -o /dev/stdout"
    command += f" {' '.join(MODEL)} -q --overwrite > out.jsonl"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(cli.read("out.jsonl")) == len(RECORDS)
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_full_disk_ends_the_run_and_says_so(cli: Cli) -> None:
    done = cli("score", cli.write("in.jsonl", RECORDS), "-o", "/dev/full", *MODEL)
    assert done.code == 1
    assert "No space left on device" in done.err


REFUSED = {
    ("-o", "/dev/null", "--resume"): "--resume needs files: what went through '/dev/null'",
    ("-o", "/dev/null", "--output-format", "csv"): "is written as jsonl, not as csv",
    ("-o", "out.jsonl.bz2"): ".bz2 is not written; name a .gz file",
    ("-o", "out.parquet.gz"): "parquet compresses its columns itself",
    ("-o", "."): "has the suffix ''",
    ("-o", ".", "--output-format", "jsonl"): "--output=. is a folder",
    ("-o", "out.csv", "--errors", "out.csv"): "must be different files",
}


@pytest.mark.parametrize("options", REFUSED)
def test_outputs_that_cannot_be_are_refused_at_once(cli: Cli, options: tuple[str, ...]) -> None:
    cli.write("in.jsonl", RECORDS)
    done = cli("score", "in.jsonl", *options, "--model", "never loaded")
    assert done.code == 2
    assert REFUSED[options] in done.err


def test_streams_are_told_from_files(cli: Cli) -> None:
    Path("file").write_text("")
    os.mkfifo("pipe")
    streams = [
        "-",
        "/dev/null",
        "/dev/stdin",
        "/dev/stdout",
        "/dev/fd/7",
        "/proc/self/fd/1",
        "pipe",
    ]
    assert [
        path for path in [*streams, "file", ".", "absent", "/dev"] if is_stream(path)
    ] == streams
