"""Compile a whole model for a TPU that is not there, and say what is in the program. One object.

python compile_programs.py v6e 0.6B [--dense] [LAYERS]            a model of workloads.py
python compile_programs.py v6e Llama-3.2-3B [--dense] [LAYERS]    or of model_chips.py
"""

import json
import re
import sys
from math import prod

import model_chips
from packscore_kernels.hardware import CHIPS
from tpu_compiler.schedule import configure
from workloads import REFERENCE, VOCAB_SIZE, config_of

KERNEL = r"%(\w+)\.\d+ = .*? custom-call\(.*?custom_call_target=\"tpu_custom_call\""


def shapes(text):
    """Sizes of every array that a program's text names, but its arguments."""
    for line in text.splitlines():
        if " = " in line and " parameter(" not in line:
            result = line.split(" = ", 1)[1].split("(", 1)[0]
            for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", result):
                yield [int(size) for size in dims.split(",")], line


def main(chip, model, mask_impl, layers):
    configure(CHIPS[chip].topology)
    from packscore.programs.ahead import compile_ahead
    from packscore_kernels import SegmentLayout

    if model in model_chips.MODELS:
        own = model_chips.MODELS[model]
        config = own._replace(layers=layers or own.layers).config
    else:
        config = config_of(model)
        config.num_hidden_layers = layers or config.num_hidden_layers
    layout = SegmentLayout.single(REFERENCE.prefix_len, REFERENCE.item_lens)
    ahead = compile_ahead(config, layout, chip=chip, mask_impl=mask_impl)
    text, tokens = ahead.compiled.as_text(), ahead.key.num_tokens
    found = {"squares": [], "logits": [], "constants": []}
    layer = next((x for x in text.split("\n\n") if "%project_out" in x), "")
    for sizes, line in shapes(text):
        own = [size for size in sizes if size > 1]
        if own.count(tokens) > 1:
            found["squares"].append(line.strip()[:200])
        if tokens in own and VOCAB_SIZE in own:
            found["logits"].append(line.strip()[:200])
        if " constant(" in line and prod(sizes) > 4096:
            found["constants"].append(line.strip()[:200])
    # inside the layer, arrays of all tokens that change their layout
    moved = re.compile(rf"\[[\d,]*\b{tokens}\b[\d,]*\]\S* (?:copy|transpose)\(")
    found["copies"] = [line.strip()[:200] for line in layer.splitlines() if moved.search(line)]
    sizes = {
        name: getattr(ahead, name)
        for name in ("weight_bytes", "pool_bytes", "temporary_bytes", "code_bytes")
    }
    memory = ahead.compiled.memory_analysis()
    print(
        json.dumps(
            {
                **found,
                **sizes,
                "num_tokens": tokens,
                "tile": ahead.key.tile,
                "argument_bytes": memory.argument_size_in_bytes,
                "aliased_bytes": memory.alias_size_in_bytes,
                "kernels": sorted(set(re.findall(KERNEL, text))),
                "compile_cpu_seconds": ahead.compile_cpu_seconds,
            }
        )
    )


if __name__ == "__main__":
    mask_impl = "dense" if "--dense" in sys.argv else "segment"
    layers = next((int(given) for given in sys.argv[3:] if given.isdigit()), 0)
    main(sys.argv[1], sys.argv[2], mask_impl, layers)
