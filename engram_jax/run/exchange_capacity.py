"""Plans the capacity of a run's row exchange from the distinct rows of its first batch.

What exceeds it takes further rounds (memory/exchange.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from engram_jax.data.placement import place_batch
from engram_jax.data.run_data import RunData
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P
from engram_jax.training.step import Batch, batch_addresses

T = TypeVar("T", bound=Program)


def with_planned_exchange(program: T, data: RunData, log: Callable[[str], None]) -> T:
    """The program with `mesh.distinct` measured, unless it is configured or nothing is exchanged.

    It is measured on the run's first batch, whichever step the run resumes at, so that a resumed
    run has the same capacity.
    """
    config = program.config
    if program.axes.devices == 1 or config.mesh.distinct or not config.model.engram.layers:
        return program
    with closing(data.train_iterator(program.mesh)) as batches:
        batch = next(batches)
    placed = place_batch(program.mesh, batch, config.data.batch_size)
    count = jax.jit(partial(most_distinct, program), out_shardings=NamedSharding(program.mesh, P()))
    share = int(count(placed)) / program.lookups
    distinct = math.ceil(100 * share) / 100
    mesh = dataclasses.replace(config.mesh, distinct=distinct)
    planned = dataclasses.replace(program, config=dataclasses.replace(config, mesh=mesh))
    log(
        f"exchange of rows: {share:.1%} of the first batch's lookups on a device are distinct;"
        f" planned for {distinct:.0%} x {config.mesh.headroom:g}:"
        f" {planned.row_capacity():,} rows between two devices"
    )
    return planned


def most_distinct(program: Program, batch: Batch) -> jax.Array:
    """int32 []: the most distinct rows that a device looks up in one table."""
    plans = [
        program.exchanges()[layer].plan(ids).distinct.count
        for layer, ids in batch_addresses(program, batch).items()
    ]
    return jnp.max(jnp.stack([jnp.max(count) for count in plans]))
