"""Softmax attention within documents in plain jax.numpy, with its backward pass written out.

    P = softmax(scale Q K^T + mask),   O = P V
    dV = P^T dO,   dS = P (dO V^T - <dO, O>),   dQ = scale dS K,   dK = scale dS^T Q

where <dO, O> is one number per query. Kept for the backward pass: Q, K, V, P and O (K and V once
for each part of the queries), which on a CPU takes a tenth off a whole training step
(benchmarks/cpu_step.py) against the derivative that JAX finds. Reverse mode only: no jax.jvp.
TPUs have a kernel: layers/splash.py.

Symbols beside config/schema.py's: h heads, S queries, T keys, k and v their widths.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from engram_jax.config import ATTENTION
from engram_jax.layers.norm import compute_dtype

MASKED = -1e30  # finite: a row without any visible key still gives numbers, not NaN

# Queries in the first quarter of a sequence need no keys of the other three: in Q parts, causal
# attention computes (Q + 1) / 2Q of the square of scores (5/8 at 4) and holds less of it at a time.
# Short sequences are not worth the code: one part per 128 tokens.
QUERY_PARTS, PART = 4, 128


def causal_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array, scale: float
) -> jax.Array:
    """Every token sees the earlier ones (by index) of its own document, and itself.

    Args:
      query, keys: [B, T, h, k]; values: [B, T, h, v]; of one dtype.
      segments: int32 [B, T], document numbers.

    Returns:
      [B, T, h, v] in that dtype; softmax and sums in at least float32.
    """
    length = query.shape[1]
    count = max(1, min(QUERY_PARTS, length // PART))
    bounds = [length * i // count for i in range(count + 1)]
    parts = []
    for start, end in itertools.pairwise(bounds):
        same = segments[:, start:end, None] == segments[:, None, :end]
        causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        visible = (same & causal)[:, None]
        parts.append(_attend(query[:, start:end], keys[:, :end], values[:, :end], visible, scale))
    return parts[0] if count == 1 else jnp.concatenate(parts, axis=1)


def attention_of_chunks(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array,
    key_segments: jax.Array,
    starts: tuple[jax.Array, jax.Array],
    scale: float,
) -> jax.Array:
    """`causal_attention` of the queries that one device has of sequences cut over several
    (sharding/sequence.py: an early and a late chunk) to the keys of the whole sequences.

    Args:
      query: [B, 2 C, h, k]; segments: int32 [B, 2 C].
      keys: [B, T, h, k]; values: [B, T, h, v]; key_segments: int32 [B, T], in natural order.
      starts: where the chunks begin, int32 [] each; the first ends in the first half of T.

    Returns:
      [B, 2 C, h, v].
    """
    chunk, length = query.shape[1] // 2, keys.shape[1]
    out = []
    for part, (start, end) in enumerate(zip(starts, (length // 2, length), strict=True)):
        mine = slice(part * chunk, (part + 1) * chunk)
        same = segments[:, mine, None] == key_segments[:, None, :end]
        causal = start + jnp.arange(chunk)[:, None] >= jnp.arange(end)
        visible = (same & causal)[:, None]
        out.append(_attend(query[:, mine], keys[:, :end], values[:, :end], visible, scale))
    return jnp.concatenate(out, axis=1)


def softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Over the last axis, of the visible entries; in the dtype of the scores."""
    return jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)


def _product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dimensions, a, b, preferred_element_type=compute_dtype(a))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, scale: float
) -> jax.Array:
    """[B, S, h, k], [B, T, h, k], [B, T, h, v], bool [B, 1, S, T] -> [B, S, h, v]."""
    return _forward(query, keys, values, visible, scale)[0]


def _forward(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v = (x.swapaxes(1, 2) for x in (query, keys, values))
    weights = softmax(_product("bhsk,bhtk->bhst", q, k) * scale, visible)
    out = jnp.einsum("bhst,bhtv->bhsv", weights.astype(v.dtype), v)
    out = checkpoint_name(out, ATTENTION)
    return out.swapaxes(1, 2), (q, k, v, weights, out)


def _backward(scale: float, kept: tuple[jax.Array, ...], dout: jax.Array) -> tuple[object, ...]:
    q, k, v, weights, out = kept
    dout, wide = dout.swapaxes(1, 2), weights.dtype
    dweights = _product("bhsv,bhtv->bhst", dout, v)
    if out.dtype == wide:
        along = jnp.sum(dout * out, axis=-1, keepdims=True)
    else:  # O is rounded, and what is left of dP - <dO, O> can be far smaller than either
        along = jnp.sum(dweights * weights, axis=-1, keepdims=True)
    dscores = (weights * (dweights - along) * scale).astype(q.dtype)
    dvalues = jnp.einsum("bhst,bhsv->bhtv", weights.astype(v.dtype), dout)
    dquery = jnp.einsum("bhst,bhtk->bhsk", dscores, k)
    dkeys = jnp.einsum("bhst,bhsk->bhtk", dscores, q)
    return *(x.swapaxes(1, 2) for x in (dquery, dkeys, dvalues)), None


_attend.defvjp(_forward, _backward)
