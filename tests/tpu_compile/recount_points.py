"""Recount public points, once as it is and once with a reader that loses a piece. JSON lines.

python recount_points.py matmul gemm
"""

import json
import sys
import tempfile
from unittest.mock import patch

import public_points
from tpu_compiler import schedule


def without_epilogue(path, regions=schedule.regions):
    """The pieces of a schedule but that behind the products, as if no step ran it."""
    found = list(regions(path))
    last = max(i for i, region in enumerate(found) if region.has("vmatmul"))
    return iter([region for i, region in enumerate(found) if i != last + 1])


def main(*names):
    with tempfile.TemporaryDirectory(prefix="recount_points_") as dump:
        compiler = public_points.Compiler(dump)
        for name in names:
            compiled = compiler.compile(public_points.POINTS[name].made)
            row = public_points.row(name, public_points.counted(*compiled)["ms"])
            with patch.object(schedule, "regions", without_epilogue):
                broken = public_points.row(name, public_points.counted(*compiled)["ms"])
            print(json.dumps({**row, "broken_error": broken["error"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
