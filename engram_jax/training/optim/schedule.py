"""Learning rates: linear warm-up, then what `optimizer.schedule` names.

    step      constant with steps down: the paper's (Appendix A)
    cosine    half a cosine down to `min_rate` (SGDR, arXiv 1608.03983, equation 5)
    linear    a line down to `min_rate`
    wsd       constant, then a decay at the end: warmup-stable-decay (MiniCPM, arXiv 2404.06395,
              section 4; the decay 1 - sqrt is arXiv 2405.18392's, section 3)
    constant  constant

Steps count from 0. Step s of a warm-up of W steps has (s + 1) / W of the peak; a decay of L steps
that ends with the run's last step S - 1 has, of the way from the peak to `min_rate`, the share
q = (S - s) / L left before step s: its first step has the peak, and `min_rate` is what the step
after the last would have (as in transformers' schedules).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from engram_jax.config import CONSTANT, COSINE, LINEAR, STEP, WSD, OptimizerConfig


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """step (0-based, int32 [...]) -> learning rate, float32 [...].

    Of the schedule "step": from `falls(config, total_steps)[i]` on, the rate is peak *
    decay_factors[i] (0.316 at 80 %, 0.1 at 90 %).
    """
    if config.schedule not in (STEP, CONSTANT):
        return _decaying(config, total_steps)
    boundaries = falls(config, total_steps)

    def rate(step: jax.Array) -> jax.Array:
        factor = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        decay = jnp.float32(1.0)
        for boundary, value in zip(boundaries, config.decay_factors, strict=False):
            decay = jnp.where(step >= boundary, jnp.float32(value), decay)
        return (config.peak_lr * factor * decay).astype(jnp.float32)

    return rate


def falls(config: OptimizerConfig, total_steps: int) -> list[int]:
    """The steps at which the rate of the schedule "step" steps down; [] of the others."""
    if config.schedule != STEP:
        return []
    if config.decay_at_steps:
        return list(config.decay_at_steps)
    return [round(fraction * total_steps) for fraction in config.decay_at]


def decay_start(config: OptimizerConfig, total_steps: int) -> int:
    """The first step of the decay of "cosine", "linear" and "wsd"."""
    share = round(config.decay_share * total_steps)
    length = config.decay_steps or share or total_steps - config.warmup_steps
    return total_steps - length


def _decaying(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    length = total_steps - decay_start(config, total_steps)
    shape = config.decay_shape if config.schedule == WSD else config.schedule

    def rate(step: jax.Array) -> jax.Array:
        factor = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        left = jnp.clip(total_steps - step, 0, length) / length  # q, exact at both ends
        decay = config.min_rate + (1 - config.min_rate) * _remaining(shape, left)
        return (config.peak_lr * factor * decay).astype(jnp.float32)

    return rate


def _remaining(shape: str, left: jax.Array) -> jax.Array:
    """What is left of the rate above `min_rate`, from 1 to 0, where `left` of the decay is left.

    Written without differences of nearly equal numbers, which float32 would lose at the end.
    """
    if shape == LINEAR:
        return left
    if shape == COSINE:  # (1 + cos(pi (1 - q))) / 2
        return jnp.square(jnp.sin(jnp.pi / 2 * left))
    return left / (1 + jnp.sqrt(1 - left))  # 1 - sqrt(1 - q)
