"""Every variant lowers and compiles for every chip, within its memory; no TPU is needed.

The compiler itself refuses a kernel that needs more VMEM than its limit, and the limit is never
above the chip's. Each chip has a process of its own: libtpu reads its environment when it loads.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from picked_tiles import GRID, params

from compile_products import products
from compile_programs import shapes
from compile_variants import VARIANTS
from every_model import MODELS
from packscore.flows.page_pool import PAGE_SIZE
from packscore.model.sizes import ModelSizes
from packscore.programs.dense import pair_bytes
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR
from selection import pairwise
from tolerances import COUNT_OF_PUBLIC_PRODUCT
from workloads import config_of

PROGRAMS = Path(__file__).with_name("compile_programs.py")
PRODUCTS = Path(__file__).with_name("compile_products.py")
POINTS = Path(__file__).with_name("recount_points.py")
MESH = Path(__file__).with_name("compile_mesh.py")
ROWS = Path(__file__).with_name("compile_rows.py")
SCRIPT = Path(__file__).with_name("compile_variants.py")
TESTS = Path(__file__).parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"
AROUND = {"project_kv", "project_out", "project_qkv"}
ATTENTION = {"row_attention", "segment_paged_attention", "write_kv_pages"}
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed here")


def chosen_variants():
    """Indices by chip: small ones in which properties and chips meet in pairs.

    The tiles that the table or the heuristic picks are in the whole models.
    """
    cells = [
        (chip, i)
        for chip in sorted(CHIPS)
        for i, variant in enumerate(VARIANTS)
        if variant.tiles is not None
    ]
    rows = [
        (chip, v.dtype, v.head_dim, v.page_size > 0, v.groups, v.tiles)
        for chip, v in ((chip, VARIANTS[i]) for chip, i in cells)
    ]
    return {
        chip: [cells[k][1] for k in sorted(pairwise(rows)) if cells[k][0] == chip]
        for chip in sorted(CHIPS)
    }


def output_of(script, *arguments):
    """What a script prints in a process of its own, which takes nothing from a compile cache."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    paths = [
        str(BENCHMARKS),
        str(TESTS),
        str(TESTS / "kernels"),
        *filter(None, [environment.get("PYTHONPATH")]),
    ]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# The others' compilers differ from this in sizes alone, which the grid of picked tiles looks at; of
# v5e a whole model is compiled.
NEAR = ("v6e",)


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "indices"),
    [
        *(
            pytest.param(chip, chosen, id=chip, marks=[] if chip in NEAR else pytest.mark.long)
            for chip, chosen in chosen_variants().items()
        ),
        *(
            pytest.param(chip, [], id=f"{chip}-all", marks=pytest.mark.long)
            for chip in sorted(CHIPS)
        ),
    ],
)
def test_every_variant_compiles(chip, indices):
    results = [json.loads(line) for line in output_of(SCRIPT, chip, *indices).splitlines()]
    gather = results.pop()
    assert gather["name"] == "vector gather"
    # The refusal that shows the check has teeth.
    assert "Cannot do int indexing on TPU" in gather["error"]
    # three page writers, and a kernel around attention, or both
    assert len(results) == len(indices or VARIANTS) + (4 if indices else 5)
    for result in results:
        assert result["error"] is None, result


@needs_libtpu
def test_products_that_others_timed_are_counted_to_the_percent():
    results = [json.loads(line) for line in output_of(POINTS, "matmul", "gemm").splitlines()]
    assert [result["name"] for result in results] == ["matmul", "gemm"]
    for result in results:
        assert abs(result["error"]) <= COUNT_OF_PUBLIC_PRODUCT, result
        # a reader that loses what follows the products is found out
        assert result["broken_error"] > 5 * COUNT_OF_PUBLIC_PRODUCT, result


@needs_libtpu
@pytest.mark.parametrize("case", params((3, 128)))
def test_picked_tiles_compile(case):
    (line,) = output_of(SCRIPT, "picked", GRID.index(case)).splitlines()
    assert json.loads(line)["error"] is None, line


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "packed", "extend"),
    [
        pytest.param("v6e", 0.73e6, 0.655e6, id="v6e"),
        # the whole model compiles it by default
        pytest.param("v5e", 1.76e6, 1.6e6, id="v5e", marks=pytest.mark.long),
    ],
)
def test_the_reference_layer_stays_within_its_cycles(chip, packed, extend):
    script = BENCHMARKS / "kernel_cycles.py"
    out = json.loads(output_of(script, "--chip", chip, "--json", "--sweep"))
    assert out["cycles"] <= packed
    assert out["known_error"] == KNOWN_ERROR
    assert out["flows"]["extend"]["cycles"] <= extend
    assert out["sweep"]["items"]["line_error"] <= 0.05
    assert out["sweep"]["prefix"]["line_error"] <= 0.05


@needs_libtpu
@pytest.mark.parametrize(
    ("command", "hbm_bytes"),
    [
        # the tightest of all: half the memory, twice the code
        pytest.param("v5e 0.6B", 16e9, id="v5e-0.6B"),
        pytest.param("v6e 0.6B", 32e9, id="v6e-0.6B", marks=pytest.mark.long),
        pytest.param("v6e 4B", 32e9, id="v6e-4B", marks=pytest.mark.long),
        pytest.param("v6e 8B", 32e9, id="v6e-8B", marks=pytest.mark.long),
    ],
)
def test_whole_models_compile(command, hbm_bytes):
    """Qwen3 of its real sizes, a query of 2 000 tokens and 500 items, on one chip."""
    out = json.loads(output_of(PROGRAMS, *command.split()))
    print(command, out)
    # one program for all requests that fit it
    assert (out["num_tokens"], out["tile"]) == (16_384, 1024)
    # nothing of tokens x tokens or tokens x vocabulary, and no weight baked into the program
    for kind in ("squares", "logits", "constants"):
        assert out[kind] == [], kind
    assert out["argument_bytes"] >= out["weight_bytes"] + out["pool_bytes"]
    # K, V and what attention found pass between the kernels as they are
    assert out["copies"] == []
    assert set(out["kernels"]) == {"gated_mlp", *AROUND, *ATTENTION}
    # the pool is changed in place
    assert out["aliased_bytes"] >= out["pool_bytes"] > 0
    assert out["argument_bytes"] + out["temporary_bytes"] <= hbm_bytes
    assert out["code_bytes"] <= 20e6


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    ["v6e 14B", "v6e 32B", "v5e 8B", "v5p 8B", "v5p 32B", "tpu7x 8B", "tpu7x 14B", "tpu7x 32B"],
)
def test_layers_of_every_size_are_kernels(command):
    """Three layers of real sizes, whose weights VMEM does not hold: these pass by in chunks."""
    out = json.loads(output_of(PROGRAMS, *command.split(), 3))
    print(command, out)
    assert (out["num_tokens"], out["tile"]) == (16_384, 1024)
    assert set(out["kernels"]) == {"gated_mlp", *AROUND, *ATTENTION}
    assert out["squares"] == out["copies"] == []


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "fused"),
    [
        ("Qwen3-30B-A3B", {"gmm", *AROUND}),
        *((name, set()) for name in ("Qwen2.5-7B", "Llama-3.2-1B", "Llama-3.2-3B")),
        # 7 and 6 heads of q for each of k
        *((f"mxbai-rerank-{size}-v2", set()) for size in ("base", "large")),
    ],
)
def test_layers_of_other_models_compile(model, fused):
    """Three layers of real sizes: experts, biases, heads of 64, groups of 3, 4, 6 and 7."""
    out = json.loads(output_of(PROGRAMS, "v6e", model, 3))
    assert set(out["kernels"]) == {*fused, *ATTENTION}
    assert out["squares"] == out["logits"] == out["constants"] == []


CAUSAL = [name for name, (architecture, _) in MODELS.items() if architecture.endswith("CausalLM")]


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "names"),
    [
        pytest.param("v6e", ["shipped=float32"], id="v6e"),
        pytest.param("v6e", ["qwen3_moe=float32"], id="v6e-moe", marks=pytest.mark.long),
        pytest.param("v5e", ["llama=float32"], id="v5e", marks=pytest.mark.long),
        *(
            pytest.param(
                chip,
                [f"{name}={dtype}" for name in CAUSAL for dtype in ("float32", "bfloat16")],
                id=f"{chip}-all",
                marks=pytest.mark.long,
            )
            for chip in ("v5e", "v6e")
        ),
    ],
)
def test_the_compiler_keeps_the_precision_of_products(chip, names):
    """test_products.py reads what is asked for; this is what becomes of it."""
    results = [json.loads(line) for line in output_of(PRODUCTS, chip, *names).splitlines()]
    assert len(results) == len(names)
    for name, result in zip(names, results, strict=True):
        assert result["short"] == [], result
        # the head's two at the least, and in float32 whatever is no kernel
        assert result["products"] >= 2, result
        if name.endswith("=float32"):
            assert result["float32"] == result["products"], result


def test_the_reader_of_products_sees_what_must_not_be_there():
    text = """
      %a = f32[8,128]{1,0} parameter(0)
      %b.1 = bf16[128,8]{1,0} parameter(1)
      %c = f32[8,8]{1,0} convolution(%a, %b.1), dim_labels=bf_io->bf
      ROOT %d = f32[8,128]{1,0} dot(%c, %a), operand_precision={highest,highest}
    """
    found = [(dtypes, highest) for dtypes, highest, _ in products(text)]
    assert found == [({"f32", "bf16"}, False), ({"f32"}, True)]


@needs_libtpu
@pytest.mark.long
def test_ordinary_calls_on_torchax_are_the_kernel():
    """With padding and without; one kernel each, and nothing else of Pallas's."""
    assert json.loads(output_of(ROWS, "v6e")) == [1, 1]


@needs_libtpu
@pytest.mark.long
def test_a_dense_program_takes_the_bytes_that_are_counted_for_it():
    out = json.loads(output_of(PROGRAMS, "v6e", "0.6B", "--dense"))
    assert out["squares"]
    assert "segment_paged_attention" not in out["kernels"]
    assert {"project_qkv", "write_kv_pages"} <= set(out["kernels"])
    sizes = ModelSizes.of(config_of("0.6B"))
    pairs = out["num_tokens"] * (out["num_tokens"] + PAGE_SIZE)
    counted = pairs * pair_bytes(sizes, 2, "tpu")
    assert counted == pytest.approx(out["temporary_bytes"], rel=0.05)


def test_the_reader_of_programs_sees_what_must_not_be_there():
    line = "  %scores = bf16[16,12288,12288]{2,1,0:T(8,128)} fusion(%q), kind=kLoop"
    argument = "  %w = bf16[151936,1024]{1,0} parameter(0)"
    assert [sizes for sizes, _ in shapes(f"{line}\n{argument}")] == [[16, 12288, 12288]]


@needs_libtpu
def test_a_model_compiles_for_four_chips_that_share_it() -> None:
    """Each has a quarter of weights and pages, and twice a layer they sum the residual stream."""
    got = json.loads(output_of(MESH))
    assert got["devices"] == 4
    assert set(got["kernels"]) == AROUND | ATTENTION | {"gated_mlp"}
    assert got["all_reduces_a_layer"] == 2
    # of three layers and the embedding all tokens, and of the last layer and the head some rows
    all_tokens = 7 * 2 * got["num_tokens"] * 512
    assert all_tokens < got["num_bytes"] < 1.1 * all_tokens
    assert got["argument_bytes"] < 1.01 * got["whole_bytes"] / 4
