"""Counts the bytes that Pallas kernels move between HBM and the chip, from their grids.

The pipeline of a TPU kernel fetches a block when its index differs from the step before, and writes
one when its index is about to change. So the traffic of a call is a property of its grid and index
maps: it is counted here by walking the grid of every `pallas_call` in a traced function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def kernel_bytes(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Bytes moved by each kernel in `function(*args)`: name -> HBM reads + writes.

    Args:
      args: arrays or `jax.ShapeDtypeStruct`s. Kernels called several times are added up.

    Raises:
      ValueError: a kernel in a while loop, whose trip count is not known.
    """
    found: dict[str, int] = {}
    for equation, times in _kernels(jax.make_jaxpr(function)(*args).jaxpr, 1):
        mapping = equation.params["grid_mapping"]
        moved = sum(_block_bytes(block, mapping.grid) for block in mapping.block_mappings)
        name = str(equation.params["name"])
        found[name] = found.get(name, 0) + moved * times
    return found


def _kernels(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """(pallas_call, how often it runs)."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            yield equation, times
        else:
            rounds = equation.params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    for kernel in _kernels(inner, times * rounds):
                        if name == "while":
                            raise ValueError("how often a while loop runs its kernels is not known")
                        yield kernel


def _block_bytes(block: Any, grid: tuple[int, ...]) -> int:
    """Bytes of one operand or result that are moved over the grid; a TPU's arrays have rows of
    whole 128 lanes."""
    array = block.array_aval
    sizes = [getattr(size, "block_size", size) for size in block.block_shape]
    if isinstance(sizes[-1], int) and len(sizes) > 1:
        sizes[-1] += -sizes[-1] % 128
    size = math.prod(s for s in sizes if isinstance(s, int)) * array.dtype.itemsize
    if not grid:
        return size
    steps = jnp.stack(
        jnp.unravel_index(jnp.arange(math.prod(grid), dtype=jnp.int32), grid), axis=-1
    )
    index_map = block.index_map_jaxpr

    def indices(step: jax.Array) -> jax.Array:
        out = jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *step)
        return jnp.stack([jnp.asarray(i, jnp.int32) for i in out])

    visited = jax.vmap(indices)(steps)
    changes = jnp.any(visited[1:] != visited[:-1], axis=-1)
    return size * (1 + int(jnp.sum(changes)))
