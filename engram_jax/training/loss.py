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


def cross_entropy_and_z(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """(`cross_entropy` + z_loss x the weighted sum of log^2 Z; `cross_entropy`), Z being the sum of
    the exponentiated logits of a token (PaLM, arXiv 2204.02311, section 5). Arguments as there.

    The second is for the log: it passes no gradient on.
    """
    tokens, width = targets.size, hidden.shape[-1]
    return _summed_with_z(
        z_loss,
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
    total, _, gradients = _with_gradients(0.0, h, matrix, targets, mask)
    return total, gradients


def _with_gradients(
    z_loss: float, h: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array
) -> Any:
    """(sum of the losses, sum of the squares of log Z or None, gradients of their weighted sum)."""
    wide = _wide(h)
    product = partial(jnp.einsum, preferred_element_type=wide)

    def body(carry: Any, part: tuple[jax.Array, ...]) -> Any:
        total, squares, grad_matrix = carry
        h, target, weight = part
        logits = _logits(h, matrix)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jnp.arange(matrix.shape[0]) == target[:, None]
        # d loss / d logits = softmax - one-hot, per token; rounded once for the two products.
        minus_one = jnp.where(hit, -1, 0)
        softmax = jnp.exp(logits - normaliser)
        grad_logits = minus_one + softmax
        if z_loss:  # d log^2 Z / d logits = 2 log Z softmax
            grad_logits = grad_logits + 2 * z_loss * normaliser * softmax
            squares = squares + jnp.sum(normaliser[:, 0] ** 2 * weight)
        grad_logits = (grad_logits * weight[:, None].astype(wide)).astype(h.dtype)
        losses = normaliser[:, 0] - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        grad_h = product("cv,vd->cd", grad_logits, matrix).astype(h.dtype)
        grad_matrix = grad_matrix + product("cv,cd->vd", grad_logits, h)
        return (total + jnp.sum(losses * weight), squares, grad_matrix), grad_h

    none = jnp.zeros((), wide) if z_loss else None
    start = (jnp.zeros((), wide), none, jnp.zeros(matrix.shape, wide))
    (total, squares, grad_matrix), grad_h = jax.lax.scan(body, start, (h, targets, mask))
    return total, squares, (grad_h, grad_matrix.astype(matrix.dtype))


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> Any:
    # Multiplied in the cotangent's float32: 1 / targets in bfloat16 would be off by up to 0.4 % in
    # every entry.
    grad_h, grad_matrix = ((x * cotangent).astype(x.dtype) for x in residuals)
    return grad_h, grad_matrix, None, None


_summed.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_with_z(
    z_loss: float, h: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward_with_z(z_loss, h, matrix, targets, mask)[0]


def _forward_with_z(
    z_loss: float, h: jax.Array, matrix: jax.Array, targets: jax.Array, mask: jax.Array
) -> Any:
    total, squares, gradients = _with_gradients(z_loss, h, matrix, targets, mask)
    return (total + z_loss * squares, total), gradients


def _backward_with_z(
    z_loss: float, residuals: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> Any:
    return _backward(residuals, cotangents[0])


_summed_with_z.defvjp(_forward_with_z, _backward_with_z)
