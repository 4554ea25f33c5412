"""The optimizer of all but the tables: Muon and AdamW, by parameter (sharding/parameters.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from engram_jax.config import OptimizerConfig
from engram_jax.sharding.parameters import ADAMW, ADAMW_NO_DECAY, MEMORY_ADAM, MUON, find
from engram_jax.sharding.rules import names
from engram_jax.training.optim.muon import orthogonalised_momentum


def build_optimizer(
    config: OptimizerConfig,
    rate: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    *,
    memory_values: bool = False,
) -> optax.GradientTransformation:
    """An optax transformation for the parameter tree; it expects gradients already clipped.

    memory_values: some parameters are a memory's values (MEMORY_ADAM). Without them the optimizer's
      state has no entry for them.
    """
    muon = optax.chain(
        orthogonalised_momentum(config.muon_momentum, config.muon_ns_steps, mesh),
        scale_to_rms(config.muon_rms),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )

    def adamw(
        decay: float, rate: Callable[[jax.Array], jax.Array] = rate
    ) -> optax.GradientTransformation:
        return optax.adamw(
            rate, b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps, weight_decay=decay
        )

    transforms = {
        MUON: muon,
        ADAMW: adamw(config.weight_decay),
        ADAMW_NO_DECAY: adamw(0.0),
    }
    if memory_values:
        multiplier = config.memory_lr_multiplier
        transforms[MEMORY_ADAM] = adamw(0.0, lambda step: rate(step) * multiplier)
    return optax.partition(transforms, labels)


def labels(params: Any) -> Any:
    """The optimizer of each parameter of a tree. Raises ValueError for an unknown name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: find(names(path), x.ndim).optimizer, params
    )


def scale_to_rms(rms: float) -> optax.GradientTransformation:
    """Times rms * sqrt(max(in, out)) (arXiv 2502.16982).

    An orthogonal matrix's entries then have the given RMS whatever its shape; with 0.2 it is
    AdamW's, and one learning rate serves both.
    """

    def scale(path: Any, update: jax.Array) -> jax.Array:
        fan_in = find(names(path), update.ndim).fan_in
        fan = max(update.shape[fan_in], update.shape[-1])
        return update * (rms * math.sqrt(fan))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def clip_factor(squared_norm: jax.Array, clip_norm: float) -> jax.Array:
    """Global-norm clipping as a factor: min(1, clip_norm / norm)."""
    return jnp.minimum(1.0, clip_norm / (jnp.sqrt(squared_norm) + 1e-12))
