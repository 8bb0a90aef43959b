"""Draw the pictures of the documentation into docs/pictures, the same bytes each time.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from packscore import plot
from packscore_kernels import Group, SegmentLayout

FOLDER = Path(__file__).parent / "pictures"


def pictures() -> dict[str, Figure]:
    """Every picture by its file name."""
    return {
        "layout.svg": plot.layout((8, [5, 3, 6, 4])),
        "two_queries.svg": plot.layout(two_queries()),
        "tiles.svg": plot.tiles((2_000, [20] * 500)),
        "tiles_mixed.svg": plot.tiles((1_200, [1_900, 640, *[60] * 40, *[12] * 60])),
    }


def two_queries() -> SegmentLayout:
    """Two queries with items of their own in one launch, and padding."""
    first, second = np.array([2, 3], np.int32), np.array([4, 1, 2], np.int32)
    return SegmentLayout((Group(4, first), Group(3, second)), num_tokens=22)


def main(folder: Path = FOLDER) -> None:
    """Save them."""
    folder.mkdir(exist_ok=True)
    # ids and dates inside an SVG differ from run to run otherwise
    matplotlib.rcParams["svg.hashsalt"] = "packscore"
    for name, figure in pictures().items():
        figure.savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    main()
