"""Adam on only those rows of a table that were read (the paper: Adam, LR x5, weight decay 0).

The moments are per weight, as in Adam; a row that no lookup touched keeps its weights and its
moments (torch's SparseAdam does the same). Dense Adam differs: an untouched row still moves along
its decaying first moment. Bias correction counts training steps, not updates of the row.

Rows in bfloat16 are rounded stochastically: with 8 bits of significand, rounding to nearest would
lose every step below 1/256 of a weight; rounding up with the right probability makes the expected
weight exact. The random bits are a hash of the run's seed, table, address, column and step: the
same on any mesh, and after a resume.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engram_jax.config import DENSE_ADAM, ROWWISE_ADAM, OptimizerConfig
from engram_jax.memory.row_gradients import RowGradients
from engram_jax.memory.table import Table


def update(
    table: Table,
    gradients: RowGradients,
    identity: jax.Array,
    rate: jax.Array,
    step: jax.Array,
    *,
    config: OptimizerConfig,
    seed: int = 0,
) -> tuple[Table, jax.Array]:
    """One step on the touched rows. Donate `table`: then its buffers are updated in place.

    Returns the table and how many of the rows earlier steps had already trained (int32 []; counted
    here, where the second moments are read anyway: a separate read, unordered with the update,
    would cost a copy of the table).

    Args:
      table: rows, mu, nu [R, dim].
      gradients: deduplicated; entries whose address is out of range are dropped.
      identity: int32 [N], the rows' addresses in natural order, the same on any mesh.
      rate: float32 [], the tables' learning rate.
      step: int32 [], steps taken before this one.
      seed: the table's own, from 0 to 2**32 - 1; with identity and step it decides how rows in
        bfloat16 are rounded.
    """
    b1, b2 = config.adam_b1, config.adam_b2
    count = (step + 1).astype(jnp.float32)
    at, g = gradients.addresses, gradients.values

    def read(x: jax.Array) -> jax.Array:
        return x.at[at].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)

    def write(x: jax.Array, new: jax.Array) -> jax.Array:
        return x.at[at].set(
            new.astype(x.dtype), mode="drop", indices_are_sorted=True, unique_indices=True
        )

    first, second = table.moments
    mu = b1 * read(first) + (1 - b1) * g
    old_nu = read(second)
    seen = jnp.sum(jnp.any(old_nu > 0, axis=1), dtype=jnp.int32)
    nu = b2 * old_nu + (1 - b2) * g * g
    unbiased = mu / (1 - b1**count)
    delta = rate * unbiased / (jnp.sqrt(nu / (1 - b2**count)) + config.adam_eps)
    if table.rows.dtype == jnp.bfloat16:
        exact = read(table.rows).astype(jnp.float32) - delta
        rows = write(table.rows, rounded(exact, identity, step, seed))
    else:  # `add`, not `set`: reading the rows again would cost another pass over them
        change = -delta.astype(table.rows.dtype)
        rows = table.rows.at[at].add(
            change, mode="drop", indices_are_sorted=True, unique_indices=True
        )
    return Table(rows, write(first, mu), write(second, nu)), seen


def rounded(x: jax.Array, identity: jax.Array, step: jax.Array, seed: int) -> jax.Array:
    """float32 [N, dim] -> bfloat16: one of the two nearest, the mean being x.

    identity: int32 [N], of the rows. Adding 16 random bits below bfloat16's last one and truncating
    rounds up with the right probability.
    """
    column = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 1)
    # The step is mixed before the seed is added: no table repeats another's bits at a later step.
    now = _mixed(_mixed(step.astype(jnp.uint32)) ^ jnp.uint32(seed))
    row = _mixed(identity.astype(jnp.uint32) ^ now)
    noise = _mixed(row[:, None] + column * jnp.uint32(0x9E3779B9)) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _mixed(x: jax.Array) -> jax.Array:
    """uint32 -> uint32, every bit depending on all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def update_dense(
    table: Table,
    gradients: RowGradients,
    identity: jax.Array,
    rate: jax.Array,
    step: jax.Array,
    *,
    config: OptimizerConfig,
    seed: int = 0,
) -> tuple[Table, jax.Array]:
    """Textbook Adam over the whole table, for comparison: costs O(R) where `update` costs O(N)."""
    del identity, seed
    b1, b2 = config.adam_b1, config.adam_b2
    count = (step + 1).astype(jnp.float32)
    first, second = table.moments
    g = jnp.zeros_like(first).at[gradients.addresses].add(gradients.values, mode="drop")
    mu = b1 * first + (1 - b1) * g
    nu = b2 * second + (1 - b2) * g * g
    delta = mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + config.adam_eps)
    old_nu = second.at[gradients.addresses].get(mode="fill", fill_value=0)
    seen = jnp.sum(jnp.any(old_nu > 0, axis=1), dtype=jnp.int32)
    return Table(table.rows - (rate * delta).astype(table.rows.dtype), mu, nu), seen


# config.optimizer.memory_optimizer
RULES = {ROWWISE_ADAM: update, DENSE_ADAM: update_dense}
