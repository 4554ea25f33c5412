"""Next-token cross-entropy with the head's matrix product inside, so that [B, T, V] never exists.

The tokens are split into chunks; only one chunk's logits exist at a time. The gradient of a mean of
token losses is known as soon as the logits are, so the forward pass computes it, too: three matrix
products per chunk in all, nothing recomputed, and the backward pass is a scaling.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [..., V] float32, targets int32 [...] -> nats [...]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 1024,
) -> jax.Array:
    """Sum of the weighted token losses, nats, float32 (float64).

    Args:
      hidden: [B, T, d] in the compute dtype.
      unembedding: [V, d], cast to the compute dtype.
      targets: int32 [B, T].
      mask: [B, T], weight of every target; not differentiated.
      chunk: tokens whose logits exist at a time.
    """
    tokens, width = targets.size, hidden.shape[-1]
    return _summed(
        _chunks(hidden.reshape(tokens, width), chunk),
        unembedding.astype(hidden.dtype),
        _chunks(targets.reshape(tokens), chunk),
        _chunks(mask.reshape(tokens), chunk),
    )


def target_nats(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, *, chunk: int = 1024
) -> jax.Array:
    """The loss of every target, nats, float32 (float64) [B, T]: what `cross_entropy` sums.

    Arguments as there. Not for training: its gradient would keep every chunk's logits.
    """
    tokens, width = targets.size, hidden.shape[-1]
    matrix = unembedding.astype(hidden.dtype)
    parts = _chunks(hidden.reshape(tokens, width), chunk), _chunks(targets.reshape(tokens), chunk)
    nats = jax.lax.map(lambda part: token_losses(_logits(part[0], matrix), part[1]), parts)
    return nats.reshape(-1)[:tokens].reshape(targets.shape)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """x [n, ...] -> [ceil(n / c), c, ...] with c = min(chunk, n), the last filled with zeros."""
    chunk = min(chunk, len(x))
    pad = -len(x) % chunk
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _summed(h: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """h [n, c, d], matrix [V, d], targets and mask [n, c] -> []."""

    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        losses = token_losses(_logits(part[0], matrix), part[1])
        return total + jnp.sum(losses * part[2]), None

    return jax.lax.scan(body, jnp.zeros((), _wide(h)), (h, targets, mask))[0]


def _logits(h: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("cd,vd->cv", h, matrix, preferred_element_type=_wide(h))


def _forward(h: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
    wide = _wide(h)
    product = partial(jnp.einsum, preferred_element_type=wide)

    def body(carry: Any, part: tuple[jax.Array, ...]) -> Any:
        total, grad_matrix = carry
        h, target, weight = part
        logits = _logits(h, matrix)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jnp.arange(matrix.shape[0]) == target[:, None]
        # d loss / d logits = softmax - one-hot, per token; rounded once for the two products.
        grad_logits = jnp.where(hit, -1, 0) + jnp.exp(logits - normaliser)
        grad_logits = (grad_logits * weight[:, None].astype(wide)).astype(h.dtype)
        losses = normaliser[:, 0] - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        grad_h = product("cv,vd->cd", grad_logits, matrix).astype(h.dtype)
        grad_matrix = grad_matrix + product("cv,cd->vd", grad_logits, h)
        return (total + jnp.sum(losses * weight), grad_matrix), grad_h

    start = (jnp.zeros((), wide), jnp.zeros(matrix.shape, wide))
    (total, grad_matrix), grad_h = jax.lax.scan(body, start, (h, targets, mask))
    return total, (grad_h, grad_matrix.astype(matrix.dtype))


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> Any:
    # Multiplied in the cotangent's float32: 1 / targets in bfloat16 would be off by up to 0.4 % in
    # every entry.
    grad_h, grad_matrix = ((x * cotangent).astype(x.dtype) for x in residuals)
    return grad_h, grad_matrix, None, None


_summed.defvjp(_forward, _backward)
