"""OverEncoding (Over-Tokenized Transformer, arXiv 2501.16975): n-grams in the input embedding.

The comparison of the Engram paper's "infinite memory" experiment: the same hashed
tables, the same rows, but nothing decides per token what to do with them. With e_n the concatenated
rows of order n (d_mem / orders wide) and W_n one matrix per order, the network's input is

    x_0 = (E[token] + sum over n of W_n e_n) / (1 + orders)

the mean of the token's embedding and one embedding per order. The paper slices its tables so that
each piece is projected to d by a matrix of its own; here an order's heads, concatenated, share one,
so that the rows are Engram's.

The module stands in front of layer 0, where all M streams are equal to the embedding, and returns
what turns them into x_0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.config import EngramConfig
from engram_jax.sharding.shard_view import UNSHARDED, ShardView


class OverEncoding(nnx.Module):
    """rows [B, T, H, dim], streams [B, T, M, d] -> what is added to the streams [B, T, M, d].

    It has `Engram`'s interface, and neither a gate nor a convolution. order_projections: W_n,
    [orders, d_mem / orders, d].
    """

    def __init__(
        self,
        d_model: int,
        config: EngramConfig,
        *,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.orders = len(config.orders)
        self.dtype = jnp.dtype(dtype)
        shape = (self.orders, config.d_mem // self.orders, d_model)
        draw = jax.random.normal(rngs.params(), shape, param_dtype)
        self.order_projections = nnx.Param(draw * init_std)

    def __call__(
        self,
        rows: jax.Array,
        streams: jax.Array,
        segments: jax.Array | None = None,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, None]:
        """What to add to the streams, and None: there is no gate.

        Args:
          rows: [B, T, H, dim] from the memory, order by order.
          streams: [B, T, M, d], all equal to the token's embedding.
          segments, shard: not read.
          mask: bool [B, T] or None; False = a token without memory: its embedding stays as it is.

        Returns:
          (x_0 - streams in the streams' dtype, None). Sums are in at least float32.
        """
        e = rows.reshape(*rows.shape[:2], self.orders, -1).astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        weights = self.order_projections[...].astype(self.dtype)
        ngrams = jnp.einsum("btnc,ncd->btd", e, weights, preferred_element_type=wide)
        # x_0 - x = (n-grams + x) / (1 + orders) - x, without taking the difference of near numbers.
        out = (ngrams[..., None, :] - self.orders * streams.astype(wide)) / (1 + self.orders)
        if mask is not None:
            out = jnp.where(mask[..., None, None], out, 0)
        return out.astype(streams.dtype), None

    def init_tail(self, batch: int, dtype: DTypeLike) -> None:
        """No state is carried from token to token."""
        return

    def cached(
        self,
        rows: jax.Array,
        streams: jax.Array,
        tail: jax.Array | None,
        valid: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Prefill or decode: a position depends on no other."""
        return self(rows, streams, None, mask)[0], tail
