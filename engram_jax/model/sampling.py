"""Chooses the next token from logits: greedy, temperature, top-k, top-p; changes them before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from engram_jax.config.random_streams import SAMPLING, stream


def key_of_token(seed: ArrayLike, step: ArrayLike) -> jax.Array:
    """The key of a sequence's next token. seed: from 0 to 2**32 - 1; step: tokens drawn before."""
    return jax.random.fold_in(stream(seed, SAMPLING), step)


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


def sample_rows(
    logits: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    top_k: jax.Array,
    min_p: jax.Array | None = None,
) -> jax.Array:
    """`sample` with separate settings for every row: logits [B, V] -> int32 [B].

    min_p: float32 [B], before top_k: tokens below this share of the likeliest one's probability are
    not drawn; None: it is not in the program.

    A row's draw depends only on its logits, seed (uint32 [B]) and step (int32 [B], tokens drawn
    before): it is `sample`'s for that row, with `key_of_token`. Nothing is sorted or drawn while
    all rows are greedy.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = temperature >= jnp.finfo(jnp.float32).tiny

    def draw() -> jax.Array:
        scaled = logits.astype(jnp.float32)
        scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(drawn, temperature, 1)[:, None]
        scaled, order = jax.lax.top_k(scaled, scaled.shape[-1])
        rank = jnp.arange(scaled.shape[-1])
        if min_p is not None:  # the likeliest one's is 0
            scaled = jnp.where(scaled >= jnp.log(min_p)[:, None], scaled, -jnp.inf)
        limit = jnp.where(top_k > 0, top_k, scaled.shape[-1])[:, None]
        scaled = jnp.where(rank < limit, scaled, -jnp.inf)
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        inside = (before < top_p[:, None]) | (top_p[:, None] >= 1)
        scaled = jnp.where(inside, scaled, -jnp.inf)
        keys = jax.vmap(key_of_token)(seed, step)
        choice = jax.vmap(jax.random.categorical)(keys, scaled)
        chosen = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where(drawn, chosen, greedy)

    return jax.lax.cond(jnp.any(drawn), draw, lambda: greedy)


def adjust_logits(
    logits: jax.Array,
    ids: jax.Array,
    bias: jax.Array,
    factor: jax.Array,
    less: jax.Array,
    only: jax.Array,
) -> jax.Array:
    """Other logits for some tokens of every row: float32 [B, V].

    ids: int32 [B, K], different ones in a row; an unused entry is V. bias: added, -inf for a token
    that must not be drawn; then positive logits are divided by `factor` and others multiplied with
    it; then `less` is subtracted; float32 [B, K]. only: bool [B], no other token may be drawn.
    Tokens that are not listed keep their logits to the last bit.
    """
    logits = logits.astype(jnp.float32)
    found = jnp.take_along_axis(logits, jnp.minimum(ids, logits.shape[-1] - 1), axis=-1) + bias
    found = jnp.where(found > 0, found / factor, found * factor) - less
    others = jnp.where(only[:, None], -jnp.inf, logits)
    rows = jnp.arange(len(logits))[:, None]
    return others.at[rows, ids].set(found, mode="drop")


def drawable_logits(logits: jax.Array, drawable: np.ndarray | None) -> jax.Array:
    """Logits [..., V] with -inf for the ids that are not to be drawn, the others as they are.

    drawable: bool [V], a constant of the program; None = all.
    """
    return logits if drawable is None else jnp.where(drawable, logits, -jnp.inf)


def log_probabilities(
    logits: jax.Array, chosen: jax.Array, alternatives: int, drawable: np.ndarray | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities (nats) under logits [..., V]: chosen tokens int32 [...], and the likeliest.

    drawable: as in `drawable_logits`; the others are not among the likeliest. They have their share
    of the distribution nevertheless, as in the loss.

    Returns (float32 [...], float32 [..., alternatives], their ids int32), best first.
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    drawn = drawable_logits(logits, drawable)
    if alternatives == 1:  # the same as of top_k, which sorts
        ids = jnp.argmax(drawn, axis=-1, keepdims=True)
        top = jnp.take_along_axis(drawn, ids, axis=-1)
    else:
        top, ids = jax.lax.top_k(drawn, alternatives)
    own = jnp.take_along_axis(logits, chosen[..., None], axis=-1)
    return (own - total)[..., 0], top - total, ids.astype(jnp.int32)
