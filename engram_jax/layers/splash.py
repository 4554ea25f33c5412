"""Attention on TPU by JAX's splash attention kernel (Pallas), which never writes out the scores.

The plain form (attention.py) holds [h, T, T] scores of a sequence, 1 GiB in bfloat16 at the paper's
32 heads and 4,096 tokens, and writes and reads them several times, and again in the gradient.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

BLOCK = 512  # queries and keys of a tile; the longest that fits the VMEM of every generation


def usable(length: int) -> bool:
    """Whether sequences of `length` tokens divide into tiles."""
    return length % BLOCK == 0


def attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within each document.

    Args:
      query, keys: [B, T, h, n]; values: [B, T, h, v]. `usable(T)`.
      segments: int32 [B, T], document of each token.
      scale: of the scores.
      interpret: run the kernel's program without a TPU (slow; for tests).

    Returns:
      [B, T, h, v] in query's dtype.
    """
    query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
    heads, length = query.shape[1:3]
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    sizes = splash.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)

    def sequence(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=s, kv=s))

    out = jax.vmap(sequence)(query * scale, keys, values, segments)
    return out.transpose(0, 2, 1, 3).astype(query.dtype)
