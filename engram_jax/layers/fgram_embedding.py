"""SCONE-style f-gram embeddings: a frequent n-gram's embedding in place of its last token's.

Yu et al., arXiv 2502.01637. The longest of the K most frequent n-grams that ends at a token
(addressing/fgrams.py) has a row e, and W e replaces the token's embedding at the input of layer 0;
a token at which none ends keeps its own. The output embedding is the vocabulary's, as ever.

SCONE computes the f-grams' embeddings by a second transformer while training, and caches its
outputs for inference. Here the table is trained directly, by row-wise Adam: what is compared is the
addressing, K frequent n-grams exactly against hashed ones, at the same cost per row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.layers.linear import linear
from engram_jax.sharding.shard_view import UNSHARDED, ShardView


class FgramEmbedding(nnx.Module):
    """rows [B, T, 1, d_mem], streams [B, T, M, d] -> what is added to the streams [B, T, M, d].

    It has the interface of `Engram`, and no gate: None takes its place.
    """

    def __init__(
        self,
        d_mem: int,
        d_model: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        shape = (d_mem, d_model)
        self.fgram_proj = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * init_std)

    def __call__(
        self,
        rows: jax.Array,
        streams: jax.Array,
        segments: jax.Array,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, None]:
        """W e - h for every stream h, which is the token's embedding; 0 without an f-gram.

        rows: those without an f-gram are the table's spare row, all zeros. It is one of the rows
          that are read, and never changes: no gradient reaches it. segments, shard: not used.
        mask: bool [B, T] or None; False = a token without memory.
        """
        del segments, shard
        found = jnp.any(rows != 0, axis=(2, 3))
        if mask is not None:
            found = found & mask
        e = rows.reshape(*rows.shape[:2], -1).astype(self.dtype)
        new = linear(e, self.fgram_proj[...].astype(self.dtype)).astype(streams.dtype)
        return jnp.where(found[..., None, None], new[..., None, :] - streams, 0), None

    def init_tail(self, batch: int, dtype: DTypeLike) -> None:
        """Nothing is carried from token to token."""
        del batch, dtype

    def cached(
        self,
        rows: jax.Array,
        streams: jax.Array,
        tail: jax.Array | None,
        valid: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Prefill or decode: as `__call__`."""
        return self(rows, streams, valid, mask)[0], tail
