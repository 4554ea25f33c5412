"""What a step can measure besides its loss: norms by part of the model, moments of activations.

    grad_norm/PART, param_norm/PART    (train.log_norms) of the gradients before clipping and of the
                                       parameters before the update, PART as `group_of` says
    stream_rms/LAYER                   (train.log_activations) root mean square of the residual
    stream_kurtosis/LAYER              streams after a layer, and mean x^4 / (mean x^2)^2: 3 of a
                                       Gaussian, large where few entries are
    memory_rms/LAYER, memory_kurtosis/LAYER    of what an Engram layer adds to them

A gradient's norm is of what is trained; a table's rows have grad_norm_memory, and no norm of their
own, which would take reading every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.sharding.parameters import group_of
from engram_jax.sharding.rules import names


def norms(gradients: Any, params: Any) -> dict[str, jax.Array]:
    """grad_norm/PART and param_norm/PART, float32 []. gradients: None where there is none."""
    return {**_norms("grad_norm", gradients), **_norms("param_norm", params)}


def _norms(metric: str, tree: Any) -> dict[str, jax.Array]:
    squares: dict[str, jax.Array] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        group = group_of(names(path), x.ndim)
        found = jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        squares[group] = squares.get(group, jnp.zeros((), found.dtype)) + found
    return {f"{metric}/{group}": jnp.sqrt(found) for group, found in squares.items()}


def activations(sums: Mapping[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
    """The metrics of activations from `Output.moments`, summed over `tokens` real tokens."""
    found: dict[str, jax.Array] = {}
    for name, moments in sums.items():
        kind, first = name.split("/")
        each = moments if kind == "stack" else moments[None]
        metric = "stream" if kind == "stack" else kind
        for offset, (square, fourth) in enumerate(each / jnp.maximum(tokens, 1)):
            layer = int(first) + offset
            found[f"{metric}_rms/{layer}"] = jnp.sqrt(square)
            tiny = jnp.finfo(square.dtype).tiny
            found[f"{metric}_kurtosis/{layer}"] = fourth / jnp.maximum(square**2, tiny)
    return found
