"""Compile a small model for four chips that share it, and say what is in the program."""

import json
import re

from mesh_chips import reduces
from model_chips import Model
from tpu_compiler.schedule import configure

LAYERS, HIDDEN = 4, 512


def main():
    configure("v6e:2x2")
    from packscore.programs.ahead import compile_ahead, slice_of
    from packscore_kernels import SegmentLayout

    # two heads of keys and values for four chips: neighbours have the same one
    config = Model("Qwen3", HIDDEN, 1024, LAYERS, 8, 2, 128, 4095, True).config
    layout, group = SegmentLayout.single(40, [5, 5]), slice_of("v6e", (2, 2))
    ahead = compile_ahead(config, layout, chip="v6e", group=group)
    text = ahead.compiled.as_text()
    in_layers, num_bytes = reduces(text, LAYERS)
    print(
        json.dumps(
            {
                "devices": len(group),
                "num_tokens": ahead.key.num_tokens,
                "all_reduces_a_layer": in_layers,
                "num_bytes": num_bytes,
                "kernels": sorted(set(re.findall(r"%(\w+?)\.?\d* = [^\n]*tpu_custom_call", text))),
                "argument_bytes": ahead.compiled.memory_analysis().argument_size_in_bytes,
                "whole_bytes": ahead.weight_bytes + ahead.pool_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
