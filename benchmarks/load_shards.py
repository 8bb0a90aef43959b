"""What loading a checkpoint over several chips takes of the host's memory, on simulated devices.

    python benchmarks/load_shards.py                        8B's widths with 8 layers, three meshes
    python benchmarks/load_shards.py --layers 2 --keep DIR  a smaller one, kept for the next run

A checkpoint of random weights is written in several files of safetensors; then each mesh loads it
in a process of its own, with eight devices of jax's CPU that stand in for chips. Their memory is
the host's, so what a process takes at its peak (its resident set, mapped files with it) less the
bytes of the parts themselves is what the loading, and Python with its libraries, take. Parts of
every weight are compared with the files. It says nothing of time on a TPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workloads import MODELS, config_of

MESHES = ({"model": 8}, {"model": 4}, {"data": 2, "model": 4})
FILE_BYTES = 10**9
DEVICES = 8


def write_checkpoint(folder: Path, model: str, layers: int) -> None:
    """Random bfloat16 weights of a model's widths, some files of 1 GB, and a tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from packscore import shipped_model_path

    config = config_of(model)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    config.architectures = ["Qwen3ForCausalLM"]
    with torch.device("meta"):
        names = {n: p.shape for n, p in Qwen3ForCausalLM(config).named_parameters()}
    # numbers are drawn once and repeated: drawing all of them takes longer than loading them
    drawn = (torch.randn(2**24 + 3, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    whole: dict[str, str] = {}
    waiting: dict[str, Any] = {}

    def write() -> None:
        name = f"model-{len(set(whole.values())) + 1:05}.safetensors"
        save_file(waiting, folder / name, {"format": "pt"})
        whole.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for i, (name, shape) in enumerate(names.items()):
        count = shape.numel()
        repeated = drawn.roll(7919 * i).repeat(count // len(drawn) + 1)[:count]
        waiting[name] = repeated.view(shape).clone()
        if sum(x.nbytes for x in waiting.values()) > FILE_BYTES:
            write()
    if waiting:
        write()
    index = {"metadata": {}, "weight_map": whole}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped_model_path()).save_pretrained(folder)


def peak_bytes() -> int:
    """The most that this process ever had in memory, files that it mapped with it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(folder: Path, mesh: dict[str, int]) -> dict[str, Any]:
    """Load the checkpoint on a mesh, compare parts with the files, and say what it took."""
    import jax
    import numpy as np

    from packscore import MultiItemScorer
    from packscore.calls import program_of

    before, started = peak_bytes(), time.perf_counter()
    scorer = MultiItemScorer.from_pretrained(
        folder, device="jax", mesh=mesh, label_token_ids=[1, 2], prefix_cache_bytes=0
    )
    seconds, peak = time.perf_counter() - started, peak_bytes()
    model: Any = scorer.model
    program: Any = program_of(model)
    copies = program._weights.of_copies
    shards = [shard.data for array in jax.tree.leaves(copies) for shard in array.addressable_shards]
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    # what equal parts share on the simulated devices counts once
    held = {part.unsafe_buffer_pointer(): part.nbytes for part in shards}
    for i, layer in enumerate(model.model.layers):
        want = layer.mlp.down_proj.weight.read().float().numpy()
        for copy in copies:
            own = copy["layers"]["mlp.down_proj.weight"][i]
            np.testing.assert_array_equal(np.asarray(own.astype("float32")), want)
    return {
        "mesh": mesh,
        "seconds": round(seconds, 1),
        "before": before,
        "peak": peak,
        "shards": sum(held.values()),
        "over": peak - sum(held.values()),
        "largest_tensor": largest,
        "over_in_largest_tensors": round((peak - sum(held.values())) / largest, 2),
    }


def main() -> None:
    """Write the checkpoint, and load it on each mesh."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="8B", help="whose widths")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="folder for the checkpoint, used if it is there")
    parser.add_argument("--mesh", type=json.loads, help="load on this one, in this process")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="packscore_"))
    if options.mesh:
        print(json.dumps(load(folder, options.mesh)))
        return
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(folder, options.model, options.layers)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{options.model}'s widths, {options.layers} layers, {size / 1e9:.2f} GB of weights")
        for mesh in MESHES:
            told = run(folder, mesh)
            gb = {name: f"{told[name] / 1e9:.2f}" for name in ("before", "peak", "shards", "over")}
            print(
                f"{json.dumps(mesh):26} peak {gb['peak']} GB ({gb['before']} before), parts "
                f"{gb['shards']} GB, the rest {gb['over']} GB: "
                f"{told['over_in_largest_tensors']} of the largest tensor; {told['seconds']} s",
                flush=True,
            )
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def run(folder: Path, mesh: dict[str, int]) -> dict[str, Any]:
    """`load` in a process of its own, whose peak is its alone."""
    devices = f"--xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, __file__, "--keep", str(folder), "--mesh", json.dumps(mesh)]
    environment = {**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


if __name__ == "__main__":
    main()
