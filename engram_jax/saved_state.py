"""A training state in checkpoints: rows by address and without padding, whatever the mesh.

In memory a table's rows are spread over the devices (memory/exchange.py) and padded to their
number. What is saved has neither, so a run goes on with it on any other mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from engram_jax.checkpoint import Checkpointer, Restored
from engram_jax.config import HOST
from engram_jax.memory.exchange import natural_order, stored_order
from engram_jax.memory.table import Table, TableLayout
from engram_jax.train_state import Program, TrainState, abstract_state, table_format


def save(
    program: Program, checkpointer: Checkpointer, step: int, state: TrainState, **about: Any
) -> bool:
    """`Checkpointer.save` of a state as it lies on the program's mesh. about: its other arguments.

    The tables are copied in their natural order first, which takes their memory a second time.
    """
    memory = _reordered(program, natural_order, state, donate=False)
    state = dataclasses.replace(state, memory=memory)
    return checkpointer.save(step, state, true_rows=true_rows(program), **about)


def restore(program: Program, checkpointer: Checkpointer, step: int | str | None) -> Restored:
    """`Checkpointer.restore` of a state onto the program's mesh."""
    rows = true_rows(program)
    found = checkpointer.restore(step, abstract_state(program), true_rows=rows)
    memory = _reordered(program, stored_order, found.state, donate=True)
    return dataclasses.replace(found, state=dataclasses.replace(found.state, memory=memory))


def restore_weights(
    program: Program, checkpointer: Checkpointer, step: int | str | None, rows: str | None
) -> Restored:
    """The part of a state that inference uses: params, router_bias and, of each table, the rows, in
    their natural order. The other leaves of the state are shapes.

    rows: DEVICE, HOST (np.ndarray) or None = not read either.
    """
    abstract = abstract_state(program)
    if rows == HOST:
        engram = program.config.model.engram
        empty: dict[str, Any] = {
            layer: np.empty((count, engram.dim), jnp.dtype(engram.table_dtype))
            for layer, count in program.table_rows.items()
        }
        tables = abstract.memory.items()
        memory = {layer: dataclasses.replace(table, rows=empty[layer]) for layer, table in tables}
        abstract = dataclasses.replace(abstract, memory=memory)

    def read(name: str) -> bool:
        part, _, rest = name.partition("/")
        if part == "memory":
            return rows is not None and rest.endswith("/rows")
        return part in ("params", "router_bias")

    return checkpointer.restore(step, abstract, true_rows=true_rows(program), only=read)


def true_rows(program: Program) -> dict[str, int]:
    """Path of every array of a table -> R, the rows that are no padding."""
    parts = [field.name for field in dataclasses.fields(Table)]
    return {f"memory/{k}/{part}": r for k, r in program.table_rows.items() for part in parts}


def _reordered(
    program: Program, order: Callable, state: TrainState, *, donate: bool
) -> dict[str, Table]:
    if program.axes.devices == 1:
        return state.memory
    return {
        layer: jax.tree.map(_mover(order, program.mesh, program.layouts[layer], donate), table)
        for layer, table in state.memory.items()
    }


@lru_cache
def _mover(order: Callable, mesh: Mesh, layout: TableLayout, donate: bool) -> Callable:
    """Compiled once for all saves; the result lies as the training step wants it."""
    return jax.jit(
        partial(order, mesh, layout),
        donate_argnums=0 if donate else (),
        out_shardings=table_format(mesh),
    )
