"""Tests of the kernels run on the CPU; the helpers beside them are imported by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
