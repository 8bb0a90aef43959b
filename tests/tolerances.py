"""Every tolerance of the test suite, with where it comes from."""

# The contract on probabilities against the unpacked eager model. In float32 the difference is the
# order of summation: 1e-7 relative a step, over a few hundred keys and six layers.
PROBABILITY_MAX_FLOAT32 = 1e-5
# In bfloat16 a logit of 8 is known to 0.03; two of them move a probability by 0.25 * 0.06 at most.
PROBABILITY_MAX_BFLOAT16 = 0.02
PROBABILITY_MEAN_BFLOAT16 = 0.01
# Attention outputs of N(0, 1) inputs are about 1: float32 sums of some hundred terms, reordered.
ATTENTION_FLOAT32 = 5e-6
# One rounding to bfloat16 of each part before they are merged: 2 ** -8 of values up to about 4.
ATTENTION_BFLOAT16 = 4 * 2**-8
