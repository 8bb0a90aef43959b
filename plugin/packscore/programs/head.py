"""From hidden states to label logits inside a program."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from packscore.model.family import is_classifier, output_head
from packscore.programs.mesh.axis import ONE_CHIP, ModelAxis
from packscore.programs.weights import Weights
from packscore_kernels.hardware import cdiv

# Rows that are read at a time: of a program's rows a share, and at most so many. Fewer would fetch
# the last layer's weights more often, more would compute rows that nobody reads.
ROWS_SHARE, MOST_ROWS = 16, 512
# Rows that meet the head at a time, each of which may meet all of the vocabulary.
HEAD_STEP = 128
# What is read of the first rows is an array of its own, which is all that most launches fetch.
FIRST_ROWS = 1024
# Vocabulary rows of one step of the log-sum-exp: bounds the logits in memory.
VOCAB_CHUNK = 8192


class HeadPart(NamedTuple):
    """The rows of the head that a chip has; all of them where one chip has the model."""

    weight: jax.Array  # [num_rows, hidden_size]
    num_rows: int  # of the whole head; behind those its last chip has zeros
    axis: ModelAxis  # the chips that have parts


def head_part(weights: Weights, skeleton: Any, axis: ModelAxis) -> HeadPart:
    """The rows of the vocabulary, which may be the embedding's; classes' every chip has."""
    weight: jax.Array = weights.get("head", weights["embed_tokens"])["weight"]
    num_rows = output_head(skeleton).weight.shape[0]
    return HeadPart(weight, num_rows, ONE_CHIP if is_classifier(skeleton) else axis)


@jax.named_scope("whole_head")  # by which a profile knows it
def whole_head(
    rows: jax.Array,  # [num_rows, hidden_size]
    part: HeadPart,
    soft_cap: float | None = None,
) -> jax.Array:
    """Logits of the whole vocabulary at a few rows, rounded as the model's own head rounds them.

    Returns:
      [num_rows, vocab_size] in the dtype of the rows; of one chip of several its part.
    """
    logits = jnp.dot(rows, part.weight.T, precision="highest", preferred_element_type=jnp.float32)
    return _capped(logits.astype(rows.dtype), soft_cap)


def _capped(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def rows_step(num_rows: int) -> int:
    """Rows that a program with room for so many reads at a time."""
    return max(min(num_rows // ROWS_SHARE, MOST_ROWS), 1)


def in_steps(
    read: Callable[[jax.Array, jax.Array], Any],
    rows: jax.Array,  # [num_rows, ...]
    count: jax.Array,  # i32[]
    step: int,
) -> Any:
    """What `read` gives of the first `count` rows, `step` at a time: how many turns is data.

    Args:
      read: some rows, and how many of them count, to arrays with a row for each.
      rows: what is read.
      count: of the rows; behind those there are zeros, or anything.
      step: rows of a turn. Where it is no divisor, the last turn begins earlier.
    """
    step = min(step, len(rows))

    def turn(i: jax.Array, found: Any) -> Any:
        part = read(lax.dynamic_slice_in_dim(rows, i * step, step), count - i * step)
        return jax.tree.map(
            lambda whole, own: lax.dynamic_update_slice_in_dim(whole, own, i * step, 0), found, part
        )

    one = jax.eval_shape(read, rows[:step], count)
    nothing = jax.tree.map(lambda x: jnp.zeros((len(rows), *x.shape[1:]), x.dtype), one)
    turns = lax.div(jnp.minimum(count, len(rows)) + (step - 1), step)
    return lax.fori_loop(0, turns, turn, nothing)


@jax.named_scope("read_rows")  # by which a profile knows it
def by_rows(
    read: Callable[[jax.Array, jax.Array], Any],
    rows: jax.Array,  # i32[num_rows]
    count: jax.Array,  # i32[]
) -> tuple[Any, ...]:
    """What `read` gives at the first `count` rows, see `in_steps`.

    Returns:
      What `read` gives, of the first rows and, where there may be more, of the others.
    """
    found = in_steps(read, rows, count, rows_step(len(rows)))
    cuts = [0, FIRST_ROWS, len(rows)] if len(rows) > FIRST_ROWS else [0, len(rows)]
    return tuple(
        jax.tree.map(lambda x, first=first, end=end: x[first:end], found)
        for first, end in itertools.pairwise(cuts)
    )


@jax.named_scope("label_head")  # by which a profile knows it
def label_head(
    rows: jax.Array,  # [num_rows, hidden_size]
    part: HeadPart,
    label_ids: jax.Array,  # i32[num_labels]
    over_vocabulary: jax.Array,  # i32[]: 1, or 0 where no normaliser is wanted
    soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Label logits, and of the vocabulary's, which never exist, the log-sum-exp and the largest.

    Returns:
      float32[num_rows, num_labels], float32[num_rows] and float32[num_rows]; the last two -inf
      where no normaliser is wanted.
    """
    rows = rows.astype(jnp.float32)
    weight, axis = part.weight, part.axis

    def logits(w: jax.Array) -> jax.Array:
        found = jnp.dot(rows, w.astype(jnp.float32).T, precision="highest")
        return _capped(found, soft_cap)

    is_own, at = axis.own(label_ids, len(weight))
    chosen = axis.sum(jnp.where(is_own, logits(weight[at]), 0))
    # of the last chip's rows the last may be no row of the head
    num_own = jnp.minimum(part.num_rows - axis.first(len(weight)), len(weight))
    chunk = min(VOCAB_CHUNK, weight.shape[0])

    def step(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, largest = found
        # the last chunk starts early enough to be whole; what it repeats is left out
        start = i * chunk
        at = jnp.minimum(start, weight.shape[0] - chunk)
        columns = at + jnp.arange(chunk)
        some = logits(lax.dynamic_slice_in_dim(weight, at, chunk))
        some = jnp.where((columns >= start) & (columns < num_own), some, -jnp.inf)
        total = jnp.logaddexp(total, jax.nn.logsumexp(some, axis=-1))
        return total, jnp.maximum(largest, some.max(-1))

    nothing = jnp.full(rows.shape[0], -jnp.inf)
    turns = over_vocabulary * cdiv(weight.shape[0], chunk)
    total, largest = lax.fori_loop(0, turns, step, (nothing, nothing))
    return chosen, axis.logsumexp(total), axis.largest(largest)
