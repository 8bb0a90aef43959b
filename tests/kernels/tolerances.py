"""How far an implementation may be from the float64 oracle, and why."""

import numpy as np

# float32 in and out: sums of at most some thousand terms of size 1 in float32, eps 6e-8 each step.
FLOAT32 = 2e-5
# bfloat16 keeps 8 bits. Inputs are the same for both sides; what differs is one rounding of the
# scaled keys (scores of size 3, summed over head_dim: 0.01), of each weight and of the output:
# 2**-9 relative each. Values are N(0, 1), and a row that sees one key returns it whole.
BFLOAT16_MAX = 0.04
BFLOAT16_MEAN = 0.004


def assert_close(got, want, dtype: str) -> None:
    """Within the band of a dtype, entry for entry and on average."""
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.isfinite(error).all(), "an output is not finite"
    if dtype == "float32":
        assert error.max() <= FLOAT32, error.max()
    else:
        assert error.max() <= BFLOAT16_MAX, error.max()
        assert error.mean() <= BFLOAT16_MEAN, error.mean()
