"""The A/B tables by one command: dense mask against segments, packed against prefill + extend.

    python benchmarks/ab_tables.py                       both parts, into results/ab_tables.json
    python benchmarks/ab_tables.py --predict --chips v6e         one chip's programs alone
    python benchmarks/ab_tables.py --measure --rounds 3          the CPU alone
    python benchmarks/ab_tables.py --measure --device jax        in programs, into a file of its own
    python benchmarks/ab_tables.py --show                        print what is there

The request: a query of 2 000 tokens and 500 items of 20, the query's own computation included. For
v6e and v5e it is *predicted*, from the compiler's schedule of the whole Qwen3-0.6B, as
`predict_tpu.py` says. On this machine's CPU it is measured on four layers of that model
(`ab_measure.py`), where a query is never seen twice, and where wrong scores end the run. A part
that is not run keeps what the file holds. `python benchmarks/ab_pictures.py` then renews docs/ab.md
and its charts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import provenance
from workloads import REFERENCE

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ab_tables.json"
CHIPS = ("v6e", "v5e")
MASKS, FLOWS = ("dense", "segment"), ("packed", "prefill + extend")
# The launches of a flow, one after the other.
PROGRAMS = {"packed": ("packed",), "prefill + extend": ("prefill", "extend")}
REQUEST = REFERENCE._asdict()
PACKAGES = ("torch", "transformers", "jax", "torchax", "libtpu", "packscore")

# What others measured or reckoned for this request and Qwen3-0.6B on one v6e chip.
PUBLISHED = [
    {"system": "sglang-jax, packed, dense mask", "items_per_s": 52, "note": "measured"},
    {"system": "sglang-jax, packed, segment mask", "items_per_s": 105, "note": "measured"},
    {
        "system": "sglang-jax, prefill + extend",
        "items_per_s": 518,
        "note": "measured; the query's prefill is not in the time",
    },
    {
        "system": "score-from-cache v2, label-only",
        "items_per_s": 1850,
        "note": "measured",
    },
    {
        "system": "arithmetic limit",
        "items_per_s": 29_000,
        "note": "15.8 TFLOP at the published peak of 918 TFLOP/s",
    },
]
Results = dict[str, Any]


def made(argv: Sequence[str]) -> dict[str, Any]:
    """Commit, date, versions, machine and command of a part."""
    command = shlex.join(["python", "benchmarks/ab_tables.py", *argv])
    return provenance.made(command, *PACKAGES)


def predict(chip: str, mask: str, program: str) -> dict[str, Any]:
    """One program's prediction, made in a process of its own."""
    sizes = ["--prefix", REFERENCE.prefix_len, "--items", REFERENCE.num_items]
    sizes += ["--item-len", REFERENCE.item_len]
    script = [
        HERE / "predict_tpu.py",
        "--json",
        "--chip",
        chip,
        "--mask",
        mask,
        "--flow",
        program,
        *sizes,
    ]
    command = [sys.executable, *map(str, script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def predicted_rows(programs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chip's table: the launches of each flow added up, and items a second."""
    by_name = {(one["mask"], one["flow"]): one for one in programs}
    rows = []
    for mask in MASKS:
        for flow in FLOWS:
            launches = [by_name[mask, name] for name in PROGRAMS[flow]]
            row: dict[str, Any] = {"mask": mask, "flow": flow}
            if refused := [one["refused"] for one in launches if "refused" in one]:
                rows.append({**row, "refused": refused[0]})
                continue
            last = launches[-1]["total_with_steps_ms"]
            sums = {
                key: sum(one[name] for one in launches)
                for key, name in (
                    ("ms", "total_with_steps_ms"),
                    ("cycles_ms", "cycles_ms"),
                    ("hbm_ms", "hbm_ms"),
                )
            }
            parts = {
                name: sum(one["parts_ms"][name] for one in launches)
                for name in launches[0]["parts_ms"]
            }
            parts["grid steps"] = sum(one["grid_step_ms"] for one in launches)
            rows.append(
                {
                    **row,
                    **sums,
                    "items_per_s": 1e3 * REFERENCE.num_items / sums["ms"],
                    "parts_ms": parts,
                    "last_launch_ms": last,
                    "last_launch_items_per_s": 1e3 * REFERENCE.num_items / last,
                    "temporary_bytes": max(one["temporary_bytes"] for one in launches),
                }
            )
    return rows


def measure(rounds: int, names: Sequence[str], device: str | None = None) -> list[dict[str, Any]]:
    """The part of this machine: each workload checked and timed, in torch or in programs."""
    import time

    import torch

    from ab_measure import measure as timed
    from ab_measure import systems_of
    from cpu_peers import MAX_DIFFERENCE, Workload
    from workloads import make_model

    torch.set_num_threads(1)  # whose time is taken
    workloads = [
        Workload("reduced", 500, (20,) * 100, 10),
        Workload("reference", REFERENCE.prefix_len, REFERENCE.item_lens, 3),
    ]
    systems = systems_of(make_model(torch.float32), device)
    clock = time.perf_counter if device else time.process_time
    results = []
    for workload in workloads:
        if workload.name in names:
            # the whole request takes minutes a round
            turns = rounds if workload.name == "reduced" else max(rounds // 2, 1)
            rows = timed(systems, workload, turns, MAX_DIFFERENCE[torch.float32], clock)
            results.append(
                {
                    "workload": workload.name,
                    "prefix_len": workload.prefix_len,
                    "num_items": len(workload.item_lens),
                    "item_len": workload.item_lens[0],
                    "rounds": turns,
                    "rows": rows,
                }
            )
    return results


def markdown(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    """A table whose first two columns are text."""
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def tables(results: Results) -> dict[str, str]:
    """Every table of docs/ab.md, by its name."""
    found = {}
    for chip, part in results["predicted"].items():
        found[f"predicted {chip}"] = markdown(
            ("mask", "flow", "ms", "of it attention", "items/s", "last launch alone, items/s",
             "temporaries, GiB"),
            [predicted_cells(row) for row in part["rows"]],
        )  # fmt: skip
        found[f"made {chip}"] = made_line(part["made"])
    for one in results["measured"].get("results", []):
        found[f"measured {one['workload']}"] = markdown(
            ("system", "scores", "ms", "items/s", "x one by one", "least-most"),
            [measured_cells(row) for row in one["rows"]],
        )
        found["made measured"] = made_line(results["measured"]["made"])
    found["published"] = markdown(
        ("system", "what it is", "items/s"),
        [(p["system"], p["note"], f"{p['items_per_s']:,}") for p in results["published"]],
    )
    return found


def predicted_cells(row: dict[str, Any]) -> Sequence[str]:
    """One row of a predicted table."""
    if "refused" in row:
        return row["mask"], row["flow"], "does not compile", "", "", "", ""
    return (
        row["mask"],
        row["flow"],
        f"{row['ms']:.1f}",
        f"{row['parts_ms']['attention']:.1f}",
        f"{row['items_per_s']:,.0f}",
        "" if row["flow"] == "packed" else f"{row['last_launch_items_per_s']:,.0f}",
        f"{row['temporary_bytes'] / 2**30:.2f}",
    )


def measured_cells(row: dict[str, Any]) -> Sequence[str]:
    """One row of a measured table."""
    scaled = row["scaled_from_items"]
    least, most = row["times_one_by_one_min"], row["times_one_by_one_max"]
    return (
        row["system"],
        f"scaled from {scaled} items" if scaled else f"within {row['max_difference']:.0e}",
        f"{row['ms']:,.0f}",
        f"{row['items_per_s']:.2f}",
        f"{row['times_one_by_one']:.1f}",
        "" if scaled else f"{least:.1f}-{most:.1f}",
    )


def made_line(about: dict[str, Any]) -> str:
    """Where a part comes from, as one line of text."""
    machine = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`{about['command']}`, {about['date']}, commit {about['commit']}, {versions}, "
        f"{machine['cores']} cores of an {machine['cpu']}, load {machine['load_at_start'][0]} at "
        "the start"
    )


def load(path: Path = RESULTS) -> Results:
    """What is there, or the published numbers alone."""
    found: Results = json.loads(path.read_text()) if path.exists() else {}
    return {"predicted": {}, "measured": {}, **found, "request": REQUEST, "published": PUBLISHED}


def save(path: Path, name: str, part: dict[str, Any]) -> None:
    """Put a part into the file, which is read anew: two commands may fill it side by side."""
    results = load(path)
    results[name] = {**results[name], **part}
    path.write_text(json.dumps(results, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, write and print."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="the chips alone")
    parser.add_argument("--measure", action="store_true", help="the CPU alone")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument(
        "--workloads", nargs="+", choices=("reduced", "reference"), default=("reduced",)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("jax", "tpu"), help="measure programs there")
    parser.add_argument("--json", type=Path, help="default: results/ab_tables[_DEVICE].json")
    args = parser.parse_args(argv)
    if args.json is None:  # docs/ab.md shows what torch measures
        args.json = RESULTS.with_stem(f"ab_tables_{args.device}") if args.device else RESULTS
    every = not (args.predict or args.measure or args.show)
    if args.predict or every:
        for chip in args.chips:
            about = made(argv)
            programs = [
                predict(chip, mask, program)
                for mask in MASKS
                for program in ("packed", "prefill", "extend")
            ]
            part = {"made": about, "programs": programs, "rows": predicted_rows(programs)}
            save(args.json, "predicted", {chip: part})
    if args.measure or every:
        threads = None if args.device else 1
        about = {**made(argv), "threads": threads, "dtype": "float32", "num_layers": 4}
        found = measure(args.rounds, args.workloads, args.device)
        save(args.json, "measured", {"made": about, "results": found})
    results = load(args.json)
    for name, text in tables(results).items():
        print(f"\n{name}\n{text}")


if __name__ == "__main__":
    main()
