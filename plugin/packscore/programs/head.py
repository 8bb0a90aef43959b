"""From hidden states to label logits inside a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from packscore.programs.weights import Weights

# Vocabulary rows of one step of the log-sum-exp: bounds the logits in memory.
VOCAB_CHUNK = 8192


def head_weight(weights: Weights) -> jax.Array:
    """[vocab_size or num_classes, hidden_size], which may be the embedding."""
    weight: jax.Array = weights.get("head", weights["embed_tokens"])["weight"]
    return weight


@jax.named_scope("whole_head")  # by which a profile knows it
def whole_head(
    weights: Weights,
    rows: jax.Array,  # [num_rows, hidden_size]
    soft_cap: float | None = None,
) -> jax.Array:
    """Logits of the whole vocabulary at a few rows, rounded as the model's own head rounds them.

    Returns:
      [num_rows, vocab_size] in the dtype of the rows.
    """
    logits = jnp.dot(
        rows, head_weight(weights).T, precision="highest", preferred_element_type=jnp.float32
    )
    return _capped(logits.astype(rows.dtype), soft_cap)


def _capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


@jax.named_scope("label_head")  # by which a profile knows it
def label_head(
    rows: jax.Array,  # [num_items, hidden_size]
    weight: jax.Array,  # [vocab_size, hidden_size]
    label_ids: jax.Array,  # i32[num_labels]
    over_vocabulary: bool,
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Label logits and their normaliser, in float32; the logits of the vocabulary never exist."""
    rows = rows.astype(jnp.float32)

    def logits(w: jax.Array) -> jax.Array:
        found = jnp.dot(rows, w.astype(jnp.float32).T, precision="highest")
        return _capped(found, soft_cap)

    chosen = logits(weight[label_ids])
    if not over_vocabulary:
        return chosen, None
    chunk = min(VOCAB_CHUNK, weight.shape[0])
    starts = np.arange(0, weight.shape[0], chunk)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        # the last chunk starts early enough to be whole; what it repeats is left out
        at = jnp.minimum(start, weight.shape[0] - chunk)
        columns = at + jnp.arange(chunk)
        part = logits(jax.lax.dynamic_slice_in_dim(weight, at, chunk))
        part = jnp.where(columns >= start, part, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(part, axis=-1)), None

    nothing = jnp.full(rows.shape[0], -jnp.inf)
    normalizer, _ = jax.lax.scan(step, nothing, jnp.asarray(starts))
    return chosen, normalizer
