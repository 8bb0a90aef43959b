"""Compile small programs for a TPU and say what its compiler made of their products. JSON lines.

python compile_products.py v6e MODEL [MODEL ...]    with and without float32: shipped=float32
"""

import json
import re
import sys

from packscore_kernels.hardware import CHIPS
from tpu_compiler.schedule import configure

NAMED = re.compile(r"%([\w.-]+) = (\w+)\[")
PRODUCT = re.compile(r" (?:convolution|dot)\(%([\w.-]+), %([\w.-]+)\)")
HIGHEST = "operand_precision={highest,highest}"


def products(text):
    """(dtypes of its operands, whether it asks for the highest precision, line) of each product."""
    dtypes = dict(NAMED.findall(text))
    for line in text.splitlines():
        if found := PRODUCT.search(line):
            yield {dtypes[name] for name in found.groups()}, HIGHEST in line, line.strip()[:200]


def main(chip, *names):
    configure(CHIPS[chip].topology)
    from every_model import MODELS
    from packscore.programs.ahead import compile_ahead
    from packscore_kernels import SegmentLayout

    layout = SegmentLayout.single(100, [20] * 5)
    for name, dtype in (name.split("=") for name in names):
        ahead = compile_ahead(MODELS[name].config, layout, chip=chip, dtype=dtype)
        found = list(products(ahead.compiled.as_text()))
        wide = [(highest, line) for operands, highest, line in found if "f32" in operands]
        result = {
            "name": name,
            "products": len(found),
            "float32": len(wide),
            "short": [line for highest, line in wide if not highest],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
