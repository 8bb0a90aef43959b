"""Tests of the kernels run on the CPU; the helpers beside them are imported by name."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
