"""Every tolerance of the test suite, with where it comes from."""

from typing import Any

import numpy as np

# The contract on probabilities against the unpacked eager model. In float32 the difference is the
# order of summation: 1e-7 relative a step, over a few hundred keys and six layers.
PROBABILITY_MAX_FLOAT32 = 1e-5
# Two packed runs of one model in float32, whose sums another flow, launch or batch adds in another
# order. A logit of up to 8 is known to 2 ** -22: two logits of two runs move the log-odds by 1e-6
# and a probability by a quarter of that; the rest is what the hidden states carry.
PROBABILITY_REORDERED = 1e-6
# 1e-6 of a probability of 0.9, whose slope over the log-odds is 0.09.
LOG_ODDS_REORDERED = 1e-5
# Log-odds, and log-probabilities of labels of several tokens, against the unpacked model: 1e-5 of a
# probability of a half is 4e-5 of its log-odds; the errors of five tokens, independent, twice that.
LOG_ODDS_FLOAT32 = 1e-4
# A class's only logit of up to 8, of two layers: known to 2 ** -22, and so is what it is summed of.
CLASS_LOGIT_FLOAT32 = 1e-5
# The same where products are rounded to bfloat16: 0.03 for the hidden state and 0.03 for the logit.
CLASS_LOGIT_BFLOAT16 = 0.06
# In bfloat16 a logit of 8 is known to 0.03; two of them move a probability by 0.25 * 0.06 at most.
PROBABILITY_MAX_BFLOAT16 = 0.02
PROBABILITY_MEAN_BFLOAT16 = 0.01
# Of a label of two tokens, relative to it: 0.03 of a logit is 0.03 of a token's probability, and
# two of them, independent, are 0.03 * 2 ** 0.5.
LABEL_RELATIVE_BFLOAT16 = 0.05
# Attention outputs of N(0, 1) inputs are about 1: float32 sums of some hundred terms, reordered.
ATTENTION_FLOAT32 = 5e-6
# One rounding to bfloat16 of each part before they are merged: 2 ** -8 of values up to about 4.
ATTENTION_BFLOAT16 = 4 * 2**-8
# float32 in and out: sums of at most some thousand terms of size 1 in float32, eps 6e-8 each step.
KERNEL_FLOAT32 = 2e-5
# bfloat16 keeps 8 bits. Inputs are the same for both sides; what differs is one rounding of the
# scaled keys (scores of size 3, summed over head_dim: 0.01), of each weight and of the output:
# 2**-9 relative each. Values are N(0, 1), and a row that sees one key returns it whole.
KERNEL_BFLOAT16_MAX = 0.04
KERNEL_BFLOAT16_MEAN = 0.004
# The same rows twice, their sums in another order: some ten roundings, 6e-8 each, of outputs of 2.
KERNEL_REORDERED_FLOAT32 = 1e-6
# A score of size h is summed from 64 products, known to some 16 eps h, and so is its exponential.
KERNEL_SCORE_FLOAT32 = 1e-6
# Projections and MLP, as a share of 1 + the row's largest output. float32: sums of up to 1 024
# products in any order, 6e-8 * 1 024 ** 0.5, and as much again for what comes before and behind.
LAYER_FLOAT32 = 4e-6
# bfloat16: the rows are rounded before a product and the result behind it, by 2 ** -9 each at most;
# so are what the head's norm or the gate makes of it, and its sum with the residual.
LAYER_BFLOAT16 = 2 * 2**-8
# Sums of 384 products of N(0, 1) inputs come to 90: 6e-8 * 384 ** 0.5 of that. In bfloat16 the
# product is rounded and its sum with the residual, 2 ** -9 of the largest output each.
PROJECT_OUT_FLOAT32 = 1e-4
PROJECT_OUT_BFLOAT16 = 2**-8
# Relative to a launch's cost. Calibration tells what a launch costs by itself from the smallest and
# the largest it times, so up to 32 / 4096 of it goes to the tokens: at 20 000 of them 0.04 of it.
COST_CALIBRATED = 0.05
# Six numbers stand for all programs of two models that the TPU compiler was asked about.
COST_FITTED = 0.1
# Of a product of 8192 rows beside the profiler's time of it: the share that we ask of counts, twice
# what the two that are recounted are off by.
COUNT_OF_PUBLIC_PRODUCT = 0.01


def assert_close(got: Any, want: np.ndarray, dtype: str) -> None:
    """Within the band of a dtype, entry for entry and on average."""
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.isfinite(error).all(), "an output is not finite"
    if dtype == "float32":
        assert error.max() <= KERNEL_FLOAT32, error.max()
    else:
        assert error.max() <= KERNEL_BFLOAT16_MAX, error.max()
        assert error.mean() <= KERNEL_BFLOAT16_MEAN, error.mean()


def assert_rows_close(got: Any, want: np.ndarray, dtype: str) -> None:
    """Every row of a projection or MLP within the band of a dtype, as a share of its size."""
    share = LAYER_FLOAT32 if dtype == "float32" else LAYER_BFLOAT16
    error = np.abs(np.asarray(got, np.float64) - want) / (1 + np.abs(want).max(-1, keepdims=True))
    assert error.max() <= share, error.max()
