"""Rows of a table: their values, their norms, and the rows like one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.analysis.row_readers import head_of
from engram_jax.memory.table import Tables
from engram_jax.model.program import Program
from engram_jax.sharding.rules import P

ROWS = 1 << 14  # rows that are read from a table at a time


def read_rows(program: Program, memory: Tables, layer: int, rows: np.ndarray) -> np.ndarray:
    """Rows of a layer's table by address, int [n] -> float32 [n, dim]."""
    dim = program.config.model.engram.dim
    parts = [np.zeros((0, dim), np.float32), *_blocks(program, memory, layer, rows)]
    return np.concatenate(parts)


def row_norms(program: Program, memory: Tables, layer: int) -> np.ndarray:
    """The Euclidean norm of every row of a layer's table that has an address: float32 [R]."""
    rows = np.arange(_layer(program, layer).rows)
    blocks = _blocks(program, memory, layer, rows)
    return np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])


def nearest_rows(
    program: Program, memory: Tables, layer: int, row: int, most: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(addresses int64 [n], cosines float32 [n]) of the rows of the same head that are most like a
    row, descending, itself left out: other heads' rows are read by other columns of the projection.
    Rows of zeros are like none."""
    addressing = _layer(program, layer)
    head = head_of(addressing, row)
    first = addressing.offsets[head]
    rows = np.arange(first, first + addressing.head_sizes[head])
    (own,) = read_rows(program, memory, layer, np.asarray([row]))
    found = []
    for block in _blocks(program, memory, layer, rows):
        lengths = np.linalg.norm(block, axis=1) * np.linalg.norm(own)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(lengths > 0, block @ own / lengths, -np.inf))
    cosines = np.concatenate(found)
    cosines[row - first] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:most]
    best = best[np.isfinite(cosines[best])]
    return rows[best], cosines[best]


def _layer(program: Program, layer: int) -> LayerAddressing:
    assert program.addressing is not None
    found = program.addressing.layers[layer]
    assert isinstance(found, LayerAddressing)
    return found


def _blocks(program: Program, memory: Tables, layer: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    """float32 [at most ROWS, dim] of rows by address, a block of them after the other."""
    table, layout = memory[str(layer)].rows, program.layouts[str(layer)]
    gather = _gather(program.mesh)
    for start in range(0, len(rows), ROWS):
        chosen = rows[start : start + ROWS]
        stored = chosen % layout.devices * layout.rows_per_device + chosen // layout.devices
        padded = np.zeros(min(ROWS, 1 << (len(rows) - 1).bit_length()), np.int32)
        padded[: len(chosen)] = stored
        yield np.asarray(gather(table, padded))[: len(chosen)]


@lru_cache
def _gather(mesh: Any) -> Any:
    def gather(table: jax.Array, rows: jax.Array) -> jax.Array:
        return table[rows].astype(jnp.float32)

    return jax.jit(gather, out_shardings=NamedSharding(mesh, P()))
