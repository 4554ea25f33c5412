"""Attention on TPU by JAX's splash attention kernel (Pallas), which never writes out the scores.

The plain form (attention.py) holds [h, T, T] scores of a sequence, 1 GiB in bfloat16 at the paper's
32 heads and 4,096 tokens, and writes and reads them several times, and again in the gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from engram_jax.config import ATTENTION
from engram_jax.sharding.sequence import tokens_in_device_order

BLOCK = 512  # queries and keys of a tile; the longest that fits the VMEM of every generation


def usable(length: int) -> bool:
    """Whether `length` tokens of a sequence, those that a device has, divide into tiles."""
    return length % BLOCK == 0


def attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    segments: jax.Array,
    key_segments: jax.Array,
    scale: float,
    *,
    device: jax.Array | int = 0,
    shards: int = 1,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within each document.

    Args:
      query: [B, T / S, h, n]: with S = 1 of the whole sequences, else of the tokens that a device
        of the sequence axis has (sharding/sequence.py). `usable(T / S)`.
      keys: [B, T, h, n]; values: [B, T, h, v], of the whole sequences in natural order.
      segments: int32 [B, T / S], document of each query; key_segments: int32 [B, T], of each key.
      scale: of the scores.
      device: which one of the S.
      shards: S.
      interpret: run the kernel's program without a TPU (slow; for tests).

    Returns:
      [B, T / S, h, v] in query's dtype.
    """
    query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
    kernel = _of_device(_kernel(keys.shape[2], query.shape[1], shards, interpret), device, shards)

    def sequence(q: jax.Array, k: jax.Array, v: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q=s, kv=t))

    out = jax.vmap(sequence)(query * scale, keys, values, segments, key_segments)
    return out.transpose(0, 2, 1, 3).astype(query.dtype)


@functools.lru_cache(maxsize=8)
def _kernel(length: int, heads: int, shards: int, interpret: bool) -> Any:
    """The kernel of all devices, which tiles it visits as NumPy arrays; kept, for finding them out
    looks at every tile of the square of scores: seconds for long sequences."""
    mask = splash.CausalMask((length, length))
    mask.q_sequence = tokens_in_device_order(length, shards)
    sizes = splash.BlockSizes(
        block_q=BLOCK,
        block_kv=BLOCK,
        block_q_dkv=BLOCK,
        block_kv_dkv=BLOCK,
        block_q_dq=BLOCK,
        block_kv_dq=BLOCK,
    )
    with jax.ensure_compile_time_eval():  # arrays, not tracers of whoever calls first
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _of_device(kernel: Any, device: jax.Array | int, shards: int) -> Any:
    """The part of the kernel that `shard_map` would give a device, its queries being cut."""

    def part(x: np.ndarray) -> jax.Array:
        if shards == 1:
            return jnp.asarray(x)
        axis = x.ndim - 2 if x.ndim > 1 else 0  # [heads, query tiles, key tiles] or [queries]
        size = x.shape[axis] // shards
        return lax.dynamic_slice_in_dim(jnp.asarray(x), device * size, size, axis)

    return jax.tree.map(part, kernel)
