"""Models on slices of several chips: memory of a chip, all-reduces, predicted time. A table.

    python benchmarks/mesh_chips.py                              print the table
    python benchmarks/mesh_chips.py --count                      compile and count all of it first
    python benchmarks/mesh_chips.py --count --model Qwen3-8B --slice v6e:2x2
    python benchmarks/mesh_chips.py --write                      put the table into docs/scale.md

The whole model is compiled for the slice, with libtpu and no TPU: the program of one copy, on the
chips that share it. Memory is the compiler's own: arguments (weights, pages, the launch) and
temporaries. Time is that of the reference job (a query of 2 000 tokens, 500 items of 20, two
labels, bfloat16, cold): the schedule of one chip's part, counted as in `predict_tpu.py`, and the
all-reduces beside it, at the links' bandwidth: nothing is assumed to hide them. A mixture has no
time of its own: its tokens are sorted in loops whose turns no schedule tells. One copy takes a
minute or two; what was counted is kept with date and versions, in `results/mesh_chips.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import provenance
from model_chips import MODELS, counted_by, own_process, put_into
from packscore_kernels.hardware import CHIPS
from predict_tpu import counted_instructions, layout_of
from tpu_compiler import program
from tpu_compiler.kernel import Job
from tpu_compiler.schedule import configure

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "mesh_chips.json"
PAGE = HERE.parent / "docs" / "scale.md"
MARKS = "<!-- table: models and slices -->", "<!-- end -->"


class Case(NamedTuple):
    """A model on a slice: so many copies, each over so many chips."""

    model: str
    chip: str
    slice: tuple[int, ...]
    data: int
    chips: int

    @property
    def topology(self) -> str:
        """As libtpu names it."""
        return f"{self.chip}:{'x'.join(map(str, self.slice))}"

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.model}, {self.topology}, data {self.data} x model {self.chips}"


CASES = [
    Case("Qwen3-0.6B", "v6e", (2, 4), 8, 1),
    Case("Qwen3-8B", "v5e", (2, 2), 1, 4),
    Case("Qwen3-8B", "v5e", (2, 2), 2, 2),
    Case("Qwen3-8B", "v5e", (2, 4), 1, 8),
    Case("Qwen3-8B", "v5e", (2, 4), 4, 2),
    Case("Qwen3-8B", "v6e", (2, 2), 1, 4),
    Case("Qwen3-8B", "v6e", (2, 2), 2, 2),
    Case("Qwen3-8B", "v6e", (2, 2), 4, 1),
    Case("Qwen3-32B", "v6e", (2, 4), 1, 8),
    Case("Qwen3-32B", "v6e", (2, 4), 2, 4),
    Case("Qwen3-30B-A3B", "v6e", (2, 4), 1, 8),
    Case("Qwen3-30B-A3B", "v6e", (2, 4), 2, 4),
]
IN_VMEM = re.compile(r"S\(\d+\)")  # which is sent as what lies in HBM is
REDUCES = re.compile(r" = (.*?) all-reduce(?:-start)?\(")


def reduces(text: str, layers: int) -> tuple[int, float]:
    """(all-reduces in the loop over layers, bytes that each chip has of all it runs).

    Args:
      text: of the compiled program.
      layers: of the model.
    """
    bodies = {name: lines for name, _, lines in program.computations(text)}
    loops = {
        loop[2]: int(turns[0])
        for lines in bodies.values()
        for line in lines
        if (loop := program.WHILE.search(line))
        and (turns := program.BOUND.findall("\n".join(bodies[loop[1]])))
    }
    in_layers, num_bytes = 0, 0.0
    for name, lines in bodies.items():
        found = [match[1] for line in lines if (match := REDUCES.search(line))]
        times = loops.get(name, 1)  # what else has them are loops over few rows, and what is once
        if times == layers - 1:
            in_layers += len(found)
        num_bytes += times * sum(program.array_bytes(IN_VMEM.sub("", shape)) for shape in found)
    return in_layers, num_bytes


def count(case: Case) -> dict[str, Any]:
    """Compile the program of one copy and count it."""
    model, facts = MODELS[case.model], CHIPS[case.chip]
    with tempfile.TemporaryDirectory(prefix="mesh_chips_") as dump:
        configure(case.topology, dump)
        import numpy as np

        from packscore.flows.page_pool import PREFIX_CACHE_BYTES, PagePool
        from packscore.model.sizes import ModelSizes
        from packscore.programs.ahead import compile_ahead, slice_of
        from packscore.programs.mesh.chips import ChipGroup
        from packscore.programs.pages import pages_within

        sizes = ModelSizes.of(model.config).cut(case.chips)
        job = Job(num_q_heads=sizes.heads, num_kv_heads=sizes.kv_heads, head_dim=sizes.head_dim)
        num_pages = pages_within(sizes, job.dtype, PREFIX_CACHE_BYTES)
        devices = slice_of(case.chip, case.slice).devices
        ahead = compile_ahead(
            model.config,
            layout_of(job, "packed"),
            chip=case.chip,
            group=ChipGroup(devices[: case.chips]),
            leases=[PagePool(num_pages).acquire(np.arange(job.prefix_len))],
        )
        text = ahead.compiled.as_text()
        memory: Any = ahead.compiled.memory_analysis()
        in_layers, num_bytes = reduces(text, model.layers)
        found = {
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "code_bytes": memory.generated_code_size_in_bytes,
            "all_reduces_a_layer": in_layers,
            "exchange_ms": round(facts.all_reduce_ms(num_bytes, case.chips), 2),
        }
        if not model.expert:
            config = model.config  # of one chip's part, which is what its kernels have
            config.num_attention_heads, config.num_key_value_heads = sizes.heads, sizes.kv_heads
            config.intermediate_size = sizes.mlp
            each = [
                one
                for one in counted_instructions(ahead, config, job, dump, facts)
                if not one.name.startswith(("psum", "pmax", "all-reduce", "all-gather"))
            ]
            got = program.summary(each, facts.clock_hz, facts.hbm_bytes_per_s)
            found["schedule_ms"] = round(got["ms"] + got["grid_step_ms"], 2)
    return found | provenance.made(
        f"python benchmarks/mesh_chips.py --count --model {case.model} --slice {case.topology}",
        *("jax", "libtpu", "transformers"),
    )


def table(counted: dict[str, Any]) -> str:
    """A row for each case that was counted."""
    head = ("model", "slice", "copies x chips", "GiB of a chip", "of", "all-reduces a layer")
    head = (*head, "schedule + exchange, ms", "items/s", "of one chip's")
    rows = [head, ("---",) * len(head)]
    alone = {  # of one chip that holds it
        (case.model, case.chip): found["schedule_ms"]
        for case in CASES
        if case.chips == 1 and (found := counted.get(case.name)) and "schedule_ms" in found
    }
    for case in CASES:
        if not (found := counted.get(case.name)):
            continue
        used = (found["argument_bytes"] + found["temporary_bytes"] + found["code_bytes"]) / 2**30
        schedule, exchange = found.get("schedule_ms"), found["exchange_ms"]
        cells = ["? + " + f"{exchange:,.0f}", "", ""]
        if schedule is not None:
            rate = case.data * 500 * 1e3 / (schedule + exchange)
            one = alone.get((case.model, case.chip))
            more = f"{case.data * one / (schedule + exchange):.2f}x" if one else ""
            cells = [f"{schedule:,.0f} + {exchange:,.0f}", f"{rate:,.0f}", more]
        memory = CHIPS[case.chip].hbm_bytes / 2**30
        rows.append(
            (
                *(case.model, case.topology, f"{case.data} x {case.chips}"),
                *(f"{used:.1f}", f"{memory:.0f}", str(found["all_reduces_a_layer"]), *cells),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Count, print or write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted({case.model for case in CASES}))
    parser.add_argument("--slice", choices=sorted({case.topology for case in CASES}))
    parser.add_argument("--count", action="store_true", help="compile and count; minutes each")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(count(CASES[args.one])))
        return
    for i, case in enumerate(CASES):
        is_asked = args.model in (None, case.model) and args.slice in (None, case.topology)
        if args.count and is_asked:
            found = counted_by(RESULTS)
            found[case.name] = own_process(__file__, "--one", str(i))
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(case.name, {k: found[case.name].get(k) for k in ("all_reduces_a_layer",)})
    text = table(counted_by(RESULTS))
    if args.write:
        put_into(PAGE, MARKS, text)
    print(text)


if __name__ == "__main__":
    main()
