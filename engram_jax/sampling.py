"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array, key: jax.Array, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> jax.Array:
    """Draw one token per row: logits [B, V] -> int32 [B].

    temperature 0 is greedy, and so is one below float32's smallest. Then, in this order: the
    `top_k` most likely tokens (0 = all), and of those the smallest set whose probability reaches
    `top_p` (1 = all; the likeliest always stays).
    """
    if temperature < float(jnp.finfo(jnp.float32).tiny):  # less than a float32 can divide by
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest becomes 0, so that a small temperature leaves it finite.
    scaled = logits.astype(jnp.float32)
    scaled = (scaled - jnp.max(scaled, axis=-1, keepdims=True)) / temperature
    scaled, order = jax.lax.top_k(scaled, top_k or scaled.shape[-1])
    if top_p < 1:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        scaled = jnp.where(before < top_p, scaled, -jnp.inf)
    choice = jax.random.categorical(key, scaled, axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
