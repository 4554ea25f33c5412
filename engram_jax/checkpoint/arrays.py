"""Converts a state to the arrays that a checkpoint stores, and back onto any mesh.

A table of R rows is padded (memory/table.py: TableLayout). R are stored, whatever the mesh. Orbax
writes the padded array, every process its own shards, and before the checkpoint becomes visible
Tensorstore sets the array's bounds to R, which drops the chunks beyond. Nothing of the table is
read or moved for it. Reading, Orbax fills what is not stored with zeros
(`ArrayRestoreArgs.strict`), and so does orbax_internals.read_pieces, which reads large arrays onto
a single device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as "params/embedding". Raises TypeError for a leaf that is no array."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"state {name}: a checkpoint holds arrays, not {type(leaf).__name__}")
        if name in flat:
            raise TypeError(f"state {name}: two leaves have this path")
        flat[name] = leaf
    return flat


def stored_shapes(
    arrays: Mapping[str, Any], true_rows: Mapping[str, int] | None
) -> dict[str, tuple[int, ...]]:
    """The shape of every array as a checkpoint has it: [R, ...] where `true_rows` gives an R.

    Raises ValueError if `true_rows` names no array, or more rows than the array has.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in arrays.items()}
    for name, rows in (true_rows or {}).items():
        if name not in shapes:
            raise ValueError(f"true_rows: the state has no array {name}")
        if not shapes[name] or not 0 <= rows <= shapes[name][0]:
            raise ValueError(f"true_rows: {name} has shape {list(shapes[name])}, not {rows} rows")
        shapes[name] = (rows, *shapes[name][1:])
    return shapes


def restore_args(leaf: Any, shape: tuple[int, ...]) -> ocp.RestoreArgs:
    """How Orbax is to read an array stored with `shape`.

    leaf: np.ndarray (onto the host); jax.Array, or jax.ShapeDtypeStruct with a sharding or a Format
      that prescribes a layout, too. Without one: onto the default device. Rows past the stored ones
      are zeros.
    """
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    where: Any = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.format.layout is not None:
        where = leaf.format
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array,
        sharding=where,
        global_shape=tuple(leaf.shape),
        dtype=leaf.dtype,
        strict=tuple(leaf.shape) == shape,
    )


def pad_host(found: Any, leaf: Any) -> Any:
    """`found`, with zeros for the rows that `leaf` has more: on the host Orbax adds none."""
    if isinstance(leaf, np.ndarray) and found.shape != leaf.shape:
        return np.concatenate(
            [found, np.zeros((len(leaf) - len(found), *leaf.shape[1:]), leaf.dtype)]
        )
    return found


def without_elements(leaf: Any) -> Any:
    """Zeros for an array of which nothing is stored: Orbax stores none without elements."""
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
