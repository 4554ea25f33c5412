"""Routed experts without a capacity: tokens sorted by expert, one matrix product per expert.

Every assignment of a token to an expert gets a slot; slots are sorted by expert, so a group (the
slots of one expert) is contiguous and may have any size from none to all. Three implementations:

  ragged   three `lax.ragged_dot` over all slots: accelerators
  chunked  the same over as many chunks of slots as there are assignments to this device's experts:
           accelerators with expert parallelism, where a device may get any share of the group's
           assignments, and arrays for the largest possible one would not fit
  tiled    a loop over tiles of slots of one expert: CPUs, where ragged_dot multiplies every
           token with every expert (measured 30 times slower at 16 experts)

Ragged and tiled read tokens and return them only by gathers, forward and backward: `slots` and
`order` are inverses, so the transpose of a gather is a gather: faster than a scatter.

Symbols beside config/schema.py's: N = T k assignments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from engram_jax.config import EXPERTS
from engram_jax.layers.grouped_ragged import (
    chunked_backward,
    chunked_forward,
    ragged_backward,
    ragged_forward,
)
from engram_jax.layers.grouped_routing import Routing
from engram_jax.layers.grouped_tiled import tiled_backward, tiled_forward

RAGGED, CHUNKED, TILED = "ragged", "chunked", "tiled"


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def routed_swiglu(
    x: jax.Array,
    weights: jax.Array,
    routing: Routing,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    path: str | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """y[t] = sum over j < k of weights[t, j] * SwiGLU_e(x[t]), e the j-th expert of token t.

    Args:
      x: [T, d], in the compute dtype.
      weights: [T, k], float32 or wider.
      routing: from `sort_by_expert`. Slots after the last group belong to other devices' experts
        and add nothing.
      gate, up: [E, d, f]; down: [E, f, d]; in the dtype of x.
      path: RAGGED, CHUNKED, TILED, or None = TILED where it is lowered for a CPU, elsewhere
        CHUNKED if `chunk` is given and RAGGED if not.
      chunk: slots that CHUNKED computes at a time.

    Returns:
      [T, d] in the dtype of x.
    """
    return _forward(x, weights, routing, gate, up, down, path, chunk)[0]


def _forward(*args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    *inputs, path, chunk = args
    paths: dict[str, Callable] = {
        TILED: functools.partial(_by_slots_forward, tiled_forward),
        RAGGED: functools.partial(_by_slots_forward, ragged_forward),
        CHUNKED: functools.partial(chunked_forward, chunk),
    }
    if chunk is not None:  # the other paths keep as little
        paths[TILED] = functools.partial(_forgetful_forward, tiled_forward)
        paths[RAGGED] = functools.partial(_forgetful_forward, ragged_forward)
    y, *kept = _choose(path, chunk, paths)(*inputs)
    return y, (*inputs, *(checkpoint_name(products, EXPERTS) for products in kept))


def _backward(
    path: str | None, chunk: Any, residuals: tuple[Any, ...], dy: jax.Array
) -> tuple[Any, ...]:
    paths: dict[str, Callable] = {
        TILED: functools.partial(_by_slots_backward, tiled_backward),
        RAGGED: functools.partial(_by_slots_backward, ragged_backward),
        CHUNKED: functools.partial(chunked_backward, chunk),
    }
    if chunk is not None:
        paths[TILED] = functools.partial(_forgetful_backward, tiled_forward, tiled_backward)
        paths[RAGGED] = functools.partial(_forgetful_backward, ragged_forward, ragged_backward)
    dx, dweights, *dmatrices = _choose(path, chunk, paths)(*residuals, dy)
    return dx, dweights, None, *dmatrices


routed_swiglu.defvjp(_forward, _backward)


def _choose(path: str | None, chunk: int | None, paths: dict[str, Callable]) -> Callable:
    if path is None:
        # Decided when lowering, so that compiling for a TPU on a CPU machine takes the TPU's path.
        default = paths[RAGGED if chunk is None else CHUNKED]
        return functools.partial(lax.platform_dependent, cpu=paths[TILED], default=default)
    return paths[path]


def _by_slots_forward(
    compute: Callable, x: jax.Array, weights: jax.Array, routing: Routing, *matrices: jax.Array
) -> tuple[jax.Array, ...]:
    """The weighted sum over a token's slots [T, d]; then the residuals of `compute`."""
    y, *kept = compute(x, weights, routing, *matrices)
    slots = routing.slots.T
    total = sum(w[:, None] * y[s].astype(w.dtype) for w, s in zip(weights.T, slots, strict=True))
    return total.astype(x.dtype), *kept


def _by_slots_backward(compute: Callable, *residuals: Any) -> tuple[jax.Array, ...]:
    slots = residuals[2].slots
    dx, dweights, *dmatrices = compute(*residuals)
    wide = jnp.promote_types(dx.dtype, jnp.float32)
    total = sum(dx[s].astype(wide) for s in slots.T)
    return total.astype(dx.dtype), dweights[slots], *dmatrices


def _forgetful_forward(compute: Callable, *inputs: Any) -> tuple[jax.Array, ...]:
    return _by_slots_forward(compute, *inputs)[:1]


def _forgetful_backward(
    forward: Callable, backward: Callable, *residuals: Any
) -> tuple[jax.Array, ...]:
    *inputs, dy = residuals
    _, *kept = forward(*inputs)
    return _by_slots_backward(backward, *inputs, *kept, dy)
