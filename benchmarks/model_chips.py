"""Every model on every chip: which kernels, how much memory, how long. A table.

    python benchmarks/model_chips.py                           print the table
    python benchmarks/model_chips.py --count --chip v6e        count what fits one such chip first
    python benchmarks/model_chips.py --count --chip v6e --model Qwen3-8B
    python benchmarks/model_chips.py --write                   put the table into docs/tpu.md

Kernels and memory follow from the sizes of models and chips, anew at each call. Times are those of
the reference job (a query of 2 000 tokens, 500 items of 20, two labels, bfloat16, cold), predicted
as in `predict_tpu.py`, steps of grids among them: a program of some layers is compiled, which stand
for all of a model's. That takes minutes for each model and chip, so what was counted is kept with
its date and versions, in `results/model_chips.json`. Only what fits one chip has a time, and of
that no mixture: its tokens are sorted and gathered in loops whose turns no schedule tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import provenance
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR, Chip
from predict_tpu import counted_instructions, layout_of
from tpu_compiler import program
from tpu_compiler.kernel import Job
from tpu_compiler.schedule import configure, tracing_for

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "model_chips.json"
PAGE = HERE.parent / "docs" / "tpu.md"
MARKS = "<!-- table: models and chips -->", "<!-- end -->"
COLUMNS = ("v5e", "v6e", "v5p", "tpu7x")
# Whose times are counted. Two cores of a v5p share a program, which no schedule of one shows; on a
# tpu7x the SparseCore copies the weights of all layers as each launch begins, which none shows.
COUNTED = ("v5e", "v6e")
# Chips of a slice, and how much of their memory a program may plan with.
SLICES, HBM_SHARE = (1, 4, 8, 16, 32), 0.92
# That are compiled. No other loop of a program turns as often as that over all layers but the last,
# and no array but those of all layers has a first axis that they divide.
LAYERS = 13


class Model(NamedTuple):
    """A model by its sizes."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    expert: int = 0  # columns of one of 128 experts, of which a token meets 8; 0: there are none

    @property
    def config(self) -> Any:
        """Its configuration in transformers."""
        import transformers

        options: dict[str, Any] = {}
        if self.expert:
            options = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
            options["moe_intermediate_size"] = self.expert
        return getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=40_960,
            dtype="bfloat16",
            **options,
        )


MODELS = {
    "Qwen3-0.6B": Model("Qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "Qwen3-1.7B": Model("Qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True),
    "Qwen3-4B": Model("Qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True),
    "Qwen3-8B": Model("Qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "Qwen3-14B": Model("Qwen3", 5120, 17_408, 40, 40, 8, 128, 151_936, False),
    "Qwen3-32B": Model("Qwen3", 5120, 25_600, 64, 64, 8, 128, 151_936, False),
    "Qwen3-30B-A3B": Model("Qwen3Moe", 2048, 6144, 48, 32, 4, 128, 151_936, False, 768),
    "Qwen3-235B-A22B": Model("Qwen3Moe", 4096, 12_288, 94, 64, 4, 128, 151_936, False, 1536),
    "Qwen2.5-7B": Model("Qwen2", 3584, 18_944, 28, 28, 4, 128, 152_064, False),
    "Llama-3.2-1B": Model("Llama", 2048, 8192, 16, 32, 8, 64, 128_256, True),
    "Llama-3.2-3B": Model("Llama", 3072, 8192, 28, 24, 8, 128, 128_256, True),
    "mxbai-rerank-base-v2": Model("Qwen2", 896, 4864, 24, 14, 2, 64, 151_936, True),
    "mxbai-rerank-large-v2": Model("Qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, True),
}


class Memory(NamedTuple):
    """Bytes on a chip; those of activations are an estimate."""

    weights: int
    activations: int
    pages: int

    def of_each(self, chips: int) -> float:
        """Of one of so many chips, which share weights and pages, and heads of all activations."""
        return sum(self) / chips


def memory_of(model: Model) -> Memory:
    """What a model takes that runs the reference job."""
    from packscore.flows.page_pool import PAGE_SIZE, PREFIX_CACHE_BYTES
    from packscore.model.sizes import ModelSizes
    from packscore.programs.pages import pages_within
    from packscore.programs.sizes import computed_tokens

    sizes = ModelSizes.of(model.config)
    embedded = model.vocab * model.hidden * (1 if model.tied else 2)
    weights = 2 * (sizes.all_weights + embedded + sizes.layers * sizes.hidden * sizes.experts)
    # the residual stream before and behind a kernel and normalised, what attention reads and gives;
    # where XLA computes an MLP or experts, their rows
    columns = 3 * sizes.hidden + 2 * (sizes.q + sizes.kv)
    if sizes.experts:
        columns += sizes.experts_per_token * 2 * sizes.hidden + 3 * sizes.inner
    elif model.family != "Qwen3":
        columns += 2 * sizes.inner
    tokens = computed_tokens(layout_of(Job(), "packed").num_tokens, by_tiles=True)
    pages = pages_within(sizes, "bfloat16", PREFIX_CACHE_BYTES)
    return Memory(weights, 2 * tokens * columns, pages * sizes.page_bytes(PAGE_SIZE, 2))


def chips_for(memory: Memory, chip: Chip) -> int | None:
    """Devices of the smallest slice that holds it; None where none of `SLICES` does."""
    room = HBM_SHARE * chip.hbm_bytes / chip.devices
    return next((n for n in SLICES if memory.of_each(n) <= room), None)


def kernels_of(model: Model) -> str:
    """Which kernels its layers are, on the chip that is traced for."""
    from packscore.programs.sizes import CAPACITIES
    from packscore_kernels import LiveTokens, can_gate, can_project
    from packscore_kernels.layer.walks import out_walk, qkv_walk

    heads, room = (model.heads, model.kv_heads), max(CAPACITIES)
    fuses = model.family.startswith("Qwen3")
    if not (fuses and can_project(*heads, model.head_dim, model.hidden, 2)):
        return "traced"
    live = LiveTokens(room, CAPACITIES[room])
    into = qkv_walk(heads, model.hidden, 2, room, live)
    back = out_walk(model.heads, model.hidden, 2, room, live)
    passes = any(walk is not None and walk.passes for walk in (into, back))
    if model.expert:
        return ("chunked" if passes else "held") + ", experts grouped"
    is_gated = can_gate(model.hidden, model.mlp, 2)
    return ("chunked" if passes else "held") + ("" if is_gated else ", MLP traced")


def cells_of(chip: str) -> dict[str, dict[str, Any]]:
    """What follows from sizes alone, of every model on one chip."""
    configure(CHIPS[chip].topology)
    cells = {}
    for own, model in MODELS.items():
        memory = memory_of(model)
        with tracing_for(CHIPS[chip].topology):
            kernels = kernels_of(model)
        cells[own] = {
            "kernels": kernels,
            "memory": memory,
            "chips": chips_for(memory, CHIPS[chip]),
        }
    return cells


def count(chip: str, name: str) -> dict[str, Any]:
    """Compile and count one model for one chip."""
    model, facts = MODELS[name], CHIPS[chip]
    facts = replace(facts, hbm_bytes_per_s=facts.hbm_bytes_per_s / facts.devices)
    with tempfile.TemporaryDirectory(prefix=f"model_chips_{chip}_") as dump:
        configure(facts.topology, dump)
        import numpy as np

        from packscore.flows.page_pool import PREFIX_CACHE_BYTES, PagePool
        from packscore.model.sizes import ModelSizes
        from packscore.programs.ahead import compile_ahead
        from packscore.programs.pages import pages_within

        job = Job(num_q_heads=model.heads, num_kv_heads=model.kv_heads, head_dim=model.head_dim)
        layers, config = model.layers, model._replace(layers=LAYERS).config
        # as many pages a layer as the whole model has
        num_pages = pages_within(ModelSizes.of(model.config), job.dtype, PREFIX_CACHE_BYTES)
        ahead = compile_ahead(
            config,
            layout_of(job, "packed"),
            chip=chip,
            prefix_cache_bytes=PREFIX_CACHE_BYTES * LAYERS // layers,
            leases=[PagePool(num_pages).acquire(np.arange(job.prefix_len))],
        )
        found = counted_instructions(ahead, config, job, dump, facts, layers)
        got = program.summary(found, facts.clock_hz, facts.hbm_bytes_per_s)
    return {
        "ms": round(got["ms"] + got["grid_step_ms"], 1),
        "parts_ms": {part: round(ms, 2) for part, ms in got["parts_ms"].items()},
        "temporary_bytes": ahead.temporary_bytes,
        **provenance.made(
            f"python benchmarks/model_chips.py --count --chip {chip} --model {name}",
            *("jax", "libtpu", "transformers"),
        ),
    }


def own_process(*arguments: str) -> Any:
    """What a file prints in another process: libtpu reads its environment when it loads."""
    command = [sys.executable, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def counted_by(results: Path) -> dict[str, Any]:
    """What was counted, by the names of cells."""
    got: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    return got


def put_into(page: Path, marks: tuple[str, str], text: str) -> None:
    """Write a text between two marks of a page."""
    whole, (begin, end) = page.read_text(), marks
    before, _, rest = whole.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def table(cells: dict[str, Any], times: dict[str, Any]) -> str:
    """Rows of models, columns of chips."""

    def cell(name: str, chip: str) -> str:
        own = cells[chip][name]
        each = sum(own["memory"]) / (own["chips"] or 1) / 2**30
        parts = [own["kernels"], f"{each:.1f} GiB"]
        if own["chips"] != 1:
            parts.append(f"{own['chips'] or 'more than ' + str(SLICES[-1])} chips")
        elif found := times.get(f"{name}, {chip}"):
            parts.append(f"**{found['ms']:,.0f} ms**")
        return "; ".join(parts)

    head = ["model", *COLUMNS]
    rows = [head, ["---"] * len(head)]
    rows += [[name, *(cell(name, chip) for chip in COLUMNS)] for name in MODELS]
    dates = sorted({found["date"] for found in times.values()})
    made = f"Times of {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. " if dates else ""
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{lines}\n\n{made}{KNOWN_ERROR[0].upper()}{KNOWN_ERROR[1:]}."


def main() -> None:
    """Count, print or write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=COLUMNS)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument(
        "--count", action="store_true", help="count what fits one chip; minutes each"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--one", choices=["count", "cells"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(count(args.chip, args.model) if args.model else cells_of(args.chip)))
        return
    cells = {chip: own_process(__file__, "--one", "cells", "--chip", chip) for chip in COLUMNS}
    if args.count:
        if args.chip not in (None, *COUNTED):
            parser.error(f"--chip {args.chip} has no times; take one of {', '.join(COUNTED)}")
        for chip in [args.chip] if args.chip else COUNTED:
            has_time = [
                name
                for name, model in MODELS.items()
                if cells[chip][name]["chips"] == 1 and not model.expert
            ]
            if args.model not in (None, *has_time):
                parser.error(f"on {chip} these have times: {', '.join(has_time)}")
            for name in [args.model] if args.model else has_time:
                times = counted_by(RESULTS)
                times[f"{name}, {chip}"] = own_process(
                    *(__file__, "--one", "count", "--chip", chip, "--model", name)
                )
                RESULTS.write_text(json.dumps(times, indent=1) + "\n")
    text = table(cells, counted_by(RESULTS))
    if args.write:
        put_into(PAGE, MARKS, text)
    print(text)


if __name__ == "__main__":
    main()
