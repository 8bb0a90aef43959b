"""Our way of counting beside what others measured on the same chip, one TPU v6e.

    python benchmarks/public_points.py                      recounts all, minutes of one core
    python benchmarks/public_points.py --json               the same as one object
    python benchmarks/public_points.py --only matmul gemm   some, by name
    python benchmarks/public_points.py --renew              and writes results/ and docs/ab.md

Each point is a program that somebody ran and timed in public. It is compiled here for the same
chip, with the compiler that is installed, and counted as `predict_tpu.py` counts: what the two
differ by is the known error of every prediction. Its sentence, which is printed with all of them,
is `packscore_kernels.hardware.KNOWN_ERROR`; a test compares it with the results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import provenance
from packscore_kernels.hardware import CHIPS
from tpu_compiler import program
from tpu_compiler.our_kernels import steps_of
from tpu_compiler.schedule import compile_for_tpu, configure, find, regions

CHIP = CHIPS["v6e"]
RESULTS = Path(__file__).parent / "results" / "public_points.json"
PAGE = Path(__file__).parents[1] / "docs" / "ab.md"
MARKS = "<!-- public points -->\n", "<!-- end -->\n"

_PEDIA = (
    "https://github.com/yangwhale/gpu-tpu-pedia/blob/3fa9ce174583eba63032ed504a05793fe8bd520b"
    "/tpu/v7_perf/chay_gemm_benchmark_simple/"
)
_JAXBENCH = (
    "https://github.com/aryatschand/JAXBench/blob/ebc95e6b37ab9756e2666f73c0e50d6a8045cdc5"
    "/benchmark/results.csv"
)
SOURCES = {  # (what it is called, address); None where we have the number without its source
    "trace": ("gpu-tpu-pedia, profiler", _PEDIA + "results_trace_test.csv"),
    "wall": ("gpu-tpu-pedia, host's clock", _PEDIA + "results_v6e.csv"),
    "jaxbench": ("JAXBench, profiler", _JAXBENCH),
    "none": ("no source: noted without one", None),
}
# Kinds of point, and what `known_error` calls them.
KINDS = {
    "product": "bfloat16 products",
    "attention": "attention in long steps",
    "hbm": "what waits for HBM",
    "steps": "many short steps",
    "int8": "int8 products",
}

Program = tuple[Callable[..., Any], list[Any]]  # a function, and the shapes of its arguments


def shape(*sizes: int, dtype: str = "bfloat16") -> Any:
    """Of an argument."""
    import jax

    return jax.ShapeDtypeStruct(sizes, dtype)


def product(rows: int, columns: int, dtype: str = "bfloat16") -> Program:
    """[rows, 8192] by [8192, columns]; int8 adds up in int32."""
    import jax

    wide = "int32" if dtype == "int8" else dtype
    multiply = partial(jax.lax.dot, preferred_element_type=wide)
    return multiply, [shape(rows, 8192, dtype=dtype), shape(8192, columns, dtype=dtype)]


def product_and_relu() -> Program:
    """With a bias, within one instruction."""
    import jax

    def run(x: Any, weight: Any, bias: Any) -> Any:
        return jax.nn.relu(x @ weight + bias)

    return run, [shape(4096, 8192), shape(8192, 8192), shape(8192)]


def gated_mlp() -> Program:
    """Llama-3.1-70B's, of 2 x 4096 tokens."""
    import jax

    def run(x: Any, gate: Any, up: Any, down: Any) -> Any:
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    wide = shape(8192, 28_672)
    return run, [shape(2, 4096, 8192), wide, wide, shape(28_672, 8192)]


def cross_entropy() -> Program:
    """Llama-3.1-8B's head and loss, of 8192 tokens."""
    import jax

    def run(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = hidden @ weight
        chosen = jax.nn.one_hot(labels, logits.shape[-1])
        return (-(chosen * jax.nn.log_softmax(logits, axis=-1)).sum(-1)).mean()

    return run, [shape(8192, 4096), shape(4096, 128_256), shape(8192, dtype="int32")]


def rms_norm() -> Program:
    """In float32, of 8 x 4096 tokens of 8192."""
    import jax

    def run(x: Any, scale: Any) -> Any:
        wide = x.astype("float32")
        mean = (wide**2).mean(-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale

    return run, [shape(8, 4096, 8192), shape(8192)]


def flash_attention(batch: int, heads: int, tokens: int, block: int, inner: int) -> Program:
    """JAX's own kernel, causal, head_dim 128; blocks of so many queries and keys."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    sizes = kernel.BlockSizes(block_q=block, block_k_major=block, block_k=inner, block_b=1)
    run = partial(kernel.flash_attention, causal=True, sm_scale=128**-0.5, block_sizes=sizes)
    return run, [shape(batch, heads, tokens, 128)] * 3


@dataclass(frozen=True)
class Point:
    """A public measurement.

    Args:
      kind: of `KINDS`.
      what: the program, in words.
      measured_ms: on one v6e, by others.
      source: of `SOURCES`.
      made: the program.
      minus: another one whose time both sides are without: a slope knows no launch.
    """

    kind: str
    what: str
    measured_ms: float
    source: str
    made: Callable[[], Program]
    minus: Callable[[], Program] | None = None


POINTS = {
    "matmul": Point("product", "8192 x 8192 x 8192", 1.5109, "trace", partial(product, 8192, 8192)),
    "gemm": Point(
        "product", "8192 x 8192 x 28 672", 5.3218, "jaxbench", partial(product, 8192, 28_672)
    ),
    "relu": Point(
        "product", "4096 x 8192 x 8192, bias, ReLU", 0.6292, "jaxbench", product_and_relu
    ),
    "mlp": Point(
        "product", "gated MLP, 8192 tokens, 8192 / 28 672", 16.4977, "jaxbench", gated_mlp
    ),
    "loss": Point(
        "product", "head of 128 256 and loss, 8192 tokens", 14.2096, "jaxbench", cross_entropy
    ),
    "slope": Point(
        "product",
        "8192 rows less 4096, by 8192 x 8192",
        1.6457 - 0.7980,
        "wall",
        partial(product, 8192, 8192),
        partial(product, 4096, 8192),
    ),
    "flash": Point(
        "attention",
        "JAX flash attention, 256 heads, 4096 tokens, 1024 steps",
        6.5106,
        "jaxbench",
        partial(flash_attention, 4, 64, 4096, 2048, 1024),
    ),
    "norm": Point("hbm", "RMSNorm, 32 768 tokens of 8192", 1.1385, "jaxbench", rms_norm),
    "short": Point(
        "steps",
        "JAX flash attention, 8 heads, 1024 tokens, 512 steps",
        0.2078,
        "none",
        partial(flash_attention, 1, 8, 1024, 128, 128),
    ),
    "int8": Point(
        "int8",
        "int8: 8192 rows less 4096, by 8192 x 8192",
        0.9739 - 0.5397,
        "wall",
        partial(product, 8192, 8192, "int8"),
        partial(product, 4096, 8192, "int8"),
    ),
}


def flash_cycles(path: str, query_tiles: int, steps: int) -> int:
    """Cycles of JAX's flash attention under a causal mask, with square blocks.

    Around the piece that multiplies, which runs at and below the diagonal, stand two guards, and
    outside of these what starts and what ends a tile of queries. Everything else runs every step.
    """
    found = [region for region in regions(path) if region.depth]
    (body,) = (i for i, region in enumerate(found) if region.has("vmatmul"))
    tiles = steps // query_tiles
    live = tiles * (query_tiles + 1) // 2
    times = {body - 2: tiles, body: live, body + 2: tiles}
    return sum(region.bundles * times.get(i, steps) for i, region in enumerate(found))


def counted(text: str, schedules: list[str], sizes: Sequence[Any]) -> dict[str, Any]:
    """What `program.summary` says of a compiled program of arguments of these shapes."""

    def cost_of(name: str, path: str) -> program.Cost | None:
        if not name.startswith("flash_attention"):
            return None
        steps, (batch, heads, *_) = steps_of(path), sizes[0].shape
        return program.Cost(flash_cycles(path, round((steps / batch / heads) ** 0.5), steps))

    found = program.instructions(text, schedules, cost_of)
    return program.summary(found, CHIP.clock_hz, CHIP.hbm_bytes_per_s)


class Compiler:
    """Compiles for the chip, once for the process, and knows the schedules of each program."""

    def __init__(self, dump: str) -> None:
        self._dump = dump
        configure(CHIP.topology, dump)

    def compile(self, made: Callable[[], Program]) -> tuple[str, list[str], list[Any]]:
        """(text, schedules, shapes of the arguments): what `counted` takes."""
        function, sizes = made()
        before = {*find(self._dump)}
        text = compile_for_tpu(function, sizes).as_text()
        return text, [path for path in find(self._dump) if path not in before], sizes


def rows(names: Iterable[str]) -> list[dict[str, Any]]:
    """Compile and count points."""
    found = []
    with tempfile.TemporaryDirectory(prefix="public_points_") as dump:
        compiler = Compiler(dump)
        for name in names:
            point = POINTS[name]
            got = counted(*compiler.compile(point.made))
            less = counted(*compiler.compile(point.minus))["ms"] if point.minus else 0.0
            found.append(row(name, got["ms"] - less))
    return found


def row(name: str, predicted_ms: float) -> dict[str, Any]:
    """A point beside what was counted for it; the error is how much longer it really takes."""
    point = POINTS[name]
    return {
        "name": name,
        "kind": point.kind,
        "what": point.what,
        "measured_ms": round(point.measured_ms, 4),
        "predicted_ms": predicted_ms,
        "error": point.measured_ms / predicted_ms - 1,
        "source": SOURCES[point.source][1],
    }


def known_error(found: list[dict[str, Any]]) -> str:
    """The sentence: of each kind the least and the most."""
    parts = []
    for kind, words in KINDS.items():
        errors = [one["error"] for one in found if one["kind"] == kind]
        ends = dict.fromkeys(f"{end(errors):+.0%}".rstrip("%") for end in (min, max))
        parts.append(f"{words} {' to '.join(ends)} %")
    return f"measured beside predicted, in public on {CHIP.name}: {', '.join(parts)}"


def table(found: list[dict[str, Any]]) -> str:
    """For the page."""
    lines = [
        "| what | measured, ms | predicted, ms | measured beside predicted | measured by |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        name, address = SOURCES[POINTS[one["name"]].source]
        lines.append(
            f"| {one['what']} | {one['measured_ms']:.4f} | {one['predicted_ms']:.4f} "
            f"| {one['error']:+.1%} | {f'[{name}]({address})' if address else name} |"
        )
    return "\n".join(lines) + "\n"


def page(text: str, found: list[dict[str, Any]]) -> str:
    """The page with the table between its marks made anew."""
    head, start, rest = text.partition(MARKS[0])
    _, end, rest = rest.partition(MARKS[1])
    return f"{head}{start}{table(found)}{end}{rest}"


def main() -> None:
    """Recount, print, and renew what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--only", nargs="+", choices=POINTS, metavar="NAME", default=[*POINTS])
    choice.add_argument("--renew", action="store_true", help="write the results and the page")
    args = parser.parse_args()
    about = provenance.made("python benchmarks/public_points.py --renew", "jax", "libtpu")
    found = rows(args.only)
    out = {"chip": CHIP.name, "made": about, "rows": found}
    if args.renew:
        RESULTS.write_text(json.dumps(out, indent=1) + "\n")
        PAGE.write_text(page(PAGE.read_text(), found))
    print(json.dumps(out) if args.json else table(found), end="" if not args.json else "\n")


if __name__ == "__main__":
    main()
