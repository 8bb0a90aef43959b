"""Compile the attention of ordinary calls on torchax for a TPU that is not there. One object.

python compile_rows.py v6e
"""

import json
import re
import sys

from packscore_kernels.hardware import CHIPS
from tpu_compiler.schedule import configure

BATCH, NUM_TOKENS, SHAPES = 3, 300, {"q": (16, 128), "kv": (8, 128)}  # Qwen3-0.6B's


def main(chip):
    configure(CHIPS[chip].topology)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from packscore.programs.compiling import tracing_on
    from packscore.programs.row_attention import attend_rows

    (device, *_) = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIPS[chip].topology, chips_per_host_bounds=(1, 1, 1)
    ).devices
    sharding = jax.sharding.SingleDeviceSharding(device)

    def struct(heads, dtype=jnp.bfloat16):
        num_heads, head_dim = SHAPES[heads]
        shape = (BATCH, num_heads, NUM_TOKENS, head_dim)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    visible = jax.ShapeDtypeStruct((BATCH, NUM_TOKENS), jnp.bool_, sharding=sharding)
    kernels = []
    for mask in (None, visible):
        arguments = struct("q"), struct("kv"), struct("kv"), mask
        attend = jax.jit(lambda *x: attend_rows(*x, 128**-0.5, "pallas"))
        with tracing_on(jax.sharding.Mesh([device], ("x",)).abstract_mesh):
            text = attend.trace(*arguments).lower().compile().as_text()
        kernels.append(len(re.findall(r'custom_call_target="tpu_custom_call"', text)))
    print(json.dumps(kernels))


if __name__ == "__main__":
    main(sys.argv[1])
