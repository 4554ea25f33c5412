"""The tables in checkpoints: rows by address and without padding, whatever the mesh.

In memory a table's rows are spread over the devices (memory/exchange.py) and padded to their
number. What is saved has neither, so a run goes on with it on any other mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
from jax.sharding import Mesh

from engram_jax.checkpoint.manager import Checkpointer, Restored
from engram_jax.memory.exchange import natural_order, stored_order
from engram_jax.memory.table import Table, TableLayout, Tables
from engram_jax.model.program import Program, table_format


def save(program: Program, checkpointer: Checkpointer, step: int, state: Any, **about: Any) -> bool:
    """`Checkpointer.save` of a state on the program's mesh. about: its other arguments.

    state: a dataclass whose `memory` has the tables by layer id (training/state.py).

    The tables are copied in their natural order first, which takes their memory a second time.
    """
    memory = _reordered(program, natural_order, state, donate=False)
    state = dataclasses.replace(state, memory=memory)
    return checkpointer.save(step, state, true_rows=true_rows(program, memory), **about)


def restore(
    program: Program, checkpointer: Checkpointer, step: int | str | None, abstract: Any
) -> Restored:
    """`Checkpointer.restore` of a state onto the program's mesh. abstract: its shapes."""
    found = checkpointer.restore(step, abstract, true_rows=true_rows(program, abstract.memory))
    memory = _reordered(program, stored_order, found.state, donate=True)
    return dataclasses.replace(found, state=dataclasses.replace(found.state, memory=memory))


def true_rows(program: Program, memory: Tables) -> dict[str, int]:
    """Path of every array of the tables -> R, the rows that are no padding. A table that is not
    trained has rows only."""
    rows, fields = program.table_rows, dataclasses.fields(Table)
    return {
        f"memory/{k}/{field.name}": rows[k]
        for k, table in memory.items()
        for field in fields
        if getattr(table, field.name) is not None
    }


def as_stored(program: Program, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows in their natural order, by layer -> as the program's tables have them; donated."""
    return {
        layer: _mover(stored_order, program.mesh, program.layouts[layer], True)(x)
        if program.axes.devices > 1
        else x
        for layer, x in rows.items()
    }


def _reordered(program: Program, order: Callable, state: Any, *, donate: bool) -> dict[str, Table]:
    if program.axes.devices == 1:
        return state.memory
    return {
        layer: jax.tree.map(_mover(order, program.mesh, program.layouts[layer], donate), table)
        for layer, table in state.memory.items()
    }


@lru_cache
def _mover(order: Callable, mesh: Mesh, layout: TableLayout, donate: bool) -> Callable:
    """Compiled once for all saves; the result is sharded as the training step wants it."""
    return jax.jit(
        partial(order, mesh, layout),
        donate_argnums=0 if donate else (),
        out_shardings=table_format(mesh),
    )
