"""The paper's learning rate (Appendix A): linear warm-up, then constant with steps down."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from engram_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """step (0-based, int32 []) -> learning rate, float32 [].

    Step s of the warm-up has peak * (s + 1) / warmup_steps; from the fraction decay_at[i] of
    total_steps on, the rate is peak * decay_factors[i] (0.316 at 80 %, 0.1 at 90 %).
    """
    boundaries = [round(fraction * total_steps) for fraction in config.decay_at]

    def rate(step: jax.Array) -> jax.Array:
        factor = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        decay = jnp.float32(1.0)
        for boundary, value in zip(boundaries, config.decay_factors, strict=True):
            decay = jnp.where(step >= boundary, jnp.float32(value), decay)
        return (config.peak_lr * factor * decay).astype(jnp.float32)

    return rate
