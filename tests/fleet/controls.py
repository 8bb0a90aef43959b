"""What holds the parts together, taken out of a copy of packscore: each loss has to be seen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import packscore
from fleet.commands import ARGUMENTS, kill_driver, run
from fleet.inputs import faults, pairs, rankings

ROOM = Path(packscore.__file__).parent


def without(folder: Path, file: str, mend: str, instead: str) -> str:
    """PYTHONPATH of a copy with some text replaced."""
    shutil.copytree(ROOM, folder / "broken/packscore")
    path = folder / "broken/packscore" / file
    text = path.read_text()
    assert text.count(mend) == 1, f"{file} has {mend!r} {text.count(mend)} times"
    path.write_text(text.replace(mend, instead))
    return os.pathsep.join([str(folder / "broken"), os.environ["PYTHONPATH"]])


def check_rename(folder: Path) -> str:
    """Parts that are written under their own name are half there when their writer is killed."""
    pairs(folder / "in.parquet", 200, 20)
    run("in.parquet", "-o", "one.jsonl", cwd=folder)
    slowly = (
        "        content = read.read()\n"
        "        written.write(content[: len(content) // 2])\n"
        "        written.flush()\n"
        "        __import__('time').sleep(9)\n"
        "        written.write(content[len(content) // 2 :])\n"
    )
    broken = without(
        folder, "files/folder.py", "        shutil.copyfileobj(read, written)\n", slowly
    )
    path = folder / "broken/packscore/files/folder.py"
    text = path.read_text()
    direct = text.replace("undone = target.with_name", "undone = target or target.with_name")
    assert direct != text
    path.write_text(direct)
    kill_driver(folder, 1, PYTHONPATH=broken)
    run(*ARGUMENTS, "--resume", cwd=folder)
    try:
        told = faults(rankings(folder / "out"), rankings(folder / "one.jsonl"))
    except ValueError as error:  # a record that ends in its middle
        told = [str(error)]
    assert told, "a part that is half there is not seen"
    return f"seen without the rename: {told[0][:80]}"


def check_cut(folder: Path) -> str:
    """Ranges of so many rows, wherever queries end, rank a query's rows apart."""
    pairs(folder / "in.parquet", 40, 20)
    run("in.parquet", "-o", "one.jsonl", cwd=folder)
    broken = without(folder, "files/parts.py", "        if look.rows:\n", "        if not path:\n")
    run(*ARGUMENTS, cwd=folder, PYTHONPATH=broken)
    told = faults(rankings(folder / "out"), rankings(folder / "one.jsonl"))
    assert told, "a query that is cut is not seen"
    return f"seen without whole queries: {told[0][:80]}"
