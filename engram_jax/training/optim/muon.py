"""Muon (arXiv 2502.16982) on a mesh: whole matrices are orthogonalised, each by one device.

The momentum is sharded as the parameters are. For the Newton-Schulz iterations the shards of a
stack's matrices are exchanged (all-to-all) so that every device has some of them whole, and back:
it computes 1 / n of the iterations, and nothing is replicated. optax's own iterations do the work.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from engram_jax.sharding import rules
from engram_jax.sharding.parameters import find

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic, the slope at zero made large
_MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


class MuonState(NamedTuple):
    """steps: int32 [], updates so far. mu: the momentum, in the tree of parameters."""

    steps: jax.Array
    mu: Any


def orthogonalised_momentum(beta: float, steps: int, mesh: Mesh) -> optax.GradientTransformation:
    """Nesterov momentum, then `steps` Newton-Schulz iterations of every matrix.

    What optax.contrib.scale_by_muon computes, matrix by matrix, each on one device.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = state.steps + 1
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = optax.tree.bias_correction(mu, beta, count + 1)
        now = optax.tree.bias_correction(updates, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        matrices = jax.tree_util.tree_map_with_path(partial(_orthogonal, steps, mesh), momentum)
        return matrices, MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """Matrices [K, rows, columns], each towards the nearest orthogonal one."""
    iterations = scale_by_muon(
        # A list of coefficients makes optax iterate by scan instead of unrolling: the same
        # numbers, a fifth of the code to compile.
        ns_coeffs=(NEWTON_SCHULZ,) * steps,
        ns_steps=steps,
        beta=0.0,  # no momentum: the update is the matrix itself
        nesterov=False,
        weight_dimension_numbers=_MATRIX,
    )
    return iterations.update(x, iterations.init(x))[0]


def _orthogonal(steps: int, mesh: Mesh, path: Any, x: jax.Array) -> jax.Array:
    """One stack of matrices, sharded as `rules` say."""
    axes = rules.axes_of(mesh)
    spec = rules.spec(path, x, axes)
    sharded = [_sharding_axes(axis, axes) for axis in (*spec, *(None,) * (x.ndim - len(spec)))]
    rows, columns = find(rules.names(path), x.ndim).fan_in % x.ndim, x.ndim - 1
    run = partial(_on_device, steps, rows, columns, (sharded[rows], sharded[columns]), axes)
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _sharding_axes(axis: Any, axes: rules.Axes) -> tuple[str, ...]:
    names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
    return tuple(name for name in names if getattr(axes, name) > 1)


def _on_device(
    steps: int,
    rows: int,
    columns: int,
    sharded: tuple[tuple[str, ...], tuple[str, ...]],
    axes: rules.Axes,
    x: jax.Array,
) -> jax.Array:
    """On one device: shards of all matrices -> some matrices whole, iterate, and back."""
    moved = jnp.moveaxis(x, (rows, columns), (-2, -1))
    matrices = moved.reshape(-1, *moved.shape[-2:])
    count = matrices.shape[0]
    padding = -count % (axes.size(sharded[0]) * axes.size(sharded[1]))
    matrices = jnp.pad(matrices, ((0, padding), (0, 0), (0, 0)))
    exchanges = [(names, axis) for axis, names in enumerate(sharded, 1) if names]
    for names, axis in exchanges:
        matrices = lax.all_to_all(matrices, names, split_axis=0, concat_axis=axis, tiled=True)
    matrices = newton_schulz(matrices, steps)
    for names, axis in reversed(exchanges):
        matrices = lax.all_to_all(matrices, names, split_axis=axis, concat_axis=0, tiled=True)
    return jnp.moveaxis(matrices[:count].reshape(moved.shape), (-2, -1), (rows, columns))
