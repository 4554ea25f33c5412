"""Product-key memory: rows chosen by the hidden state, the neighbour of Engram's addressing.

Lample et al., arXiv 1907.05242. With x the mean of the M residual streams, h a head, k = top_k:

    q_h      = RMSNorm(x W_q)_h,  its halves q_h,0 and q_h,1                (section 3.1)
    key      of row (i, j) is sub-key C_h,0[i] beside sub-key C_h,1[j]      (section 3.2)
    score    s_h(i, j) = <q_h,0, C_h,0[i]> + <q_h,1, C_h,1[j]>
    chosen   the k rows of the highest score, out of sub_keys^2: they are among the k x k pairs of
             the k best i and the k best j
    weights  softmax of the k scores
    y        = (sum over heads and chosen rows of weight * V[row]) W_v

What differs from the paper: RMSNorm takes the place of its batch norm, which would make a token's
query depend on the other sequences of the batch; the values are `dim` wide and mapped to d by W_v
(theirs are d wide); y is added to all residual streams before attention, where an Engram module
stands (theirs replaces a feed-forward layer).

Implicit value expansion (UltraMem, arXiv 2411.12364): with `expansion` E, the sub_keys^2 rows are
virtual, E blocks of the same sub_keys^2 / E physical rows. Block e has a linear map of its own, so
the weighted rows are summed by block and y = sum over e of (their sum) W_v,e. UltraMem shuffles the
virtual rows, lest the blocks follow the order of the keys; here `locate` spreads them by a rule.
Its other parts (Tucker-decomposed scores, no softmax, skips between layers) are left out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.config import ProductKeyConfig
from engram_jax.layers.linear import linear
from engram_jax.layers.norm import RMSNorm


class ProductKeys(nnx.Module):
    """streams [B, T, M, d] -> y [B, T, d], to be added to every stream."""

    def __init__(
        self,
        d_model: int,
        config: ProductKeyConfig,
        *,
        norm_eps: float,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        heads, width, half = config.heads, config.key_dim, config.key_dim // 2

        def normal(std: float, *shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * std)

        self.query_proj = normal(init_std, d_model, heads * width)
        self.query_norm = RMSNorm((heads, width), norm_eps, param_dtype=param_dtype)
        # The paper's code: sub-keys as a linear layer's weights, values with variance 1 / width.
        bound = 1 / math.sqrt(half)
        keys = (heads, 2, config.sub_keys, half)
        self.sub_keys = nnx.Param(
            jax.random.uniform(rngs.params(), keys, param_dtype, -bound, bound)
        )
        self.values = normal(1 / math.sqrt(config.dim), config.rows, config.dim)
        self.value_proj = normal(init_std, config.expansion, config.dim, d_model)

    def __call__(self, streams: jax.Array) -> jax.Array:
        """streams [B, T, M, d] -> y [B, T, d] in their dtype."""
        x = jnp.mean(streams, axis=-2).astype(self.dtype)
        config = self.config
        query = linear(x, self.query_proj[...].astype(self.dtype))
        query = self.query_norm(query.reshape(*x.shape[:-1], config.heads, config.key_dim))
        scores, first, second = search(query, self.sub_keys[...], config.top_k)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        block, row = locate(first, second, config.sub_keys, config.expansion)
        flat = (*x.shape[:-1], config.heads * config.top_k)
        found = self.values[...].astype(self.dtype)[row.reshape(flat)]
        by_block = jax.nn.one_hot(block.reshape(flat), config.expansion, dtype=self.dtype)
        by_block = by_block * weights.reshape(flat)[..., None]
        pooled = jnp.einsum("...ne,...nc->...ec", by_block, found)
        wide = config.expansion * config.dim
        matrix = self.value_proj[...].astype(self.dtype).reshape(wide, -1)
        return linear(pooled.reshape(*x.shape[:-1], wide), matrix).astype(streams.dtype)


def search(
    query: jax.Array, sub_keys: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `top_k` rows of the highest score, best first: (scores, first, second) [..., heads, k].

    query: [..., heads, key_dim]; its halves meet sub_keys [heads, 2, keys, key_dim / 2].
    first, second: int32, the sub-keys of a row. scores: at least float32. Exact: a row that is not
    among the k best has, in one of its halves, k sub-keys that score no less (section 3.2).
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    halves = query.reshape(*query.shape[:-1], 2, -1).astype(wide)
    scores = jnp.einsum("...hcj,hckj->...hck", halves, sub_keys.astype(wide))
    best, at = jax.lax.top_k(scores, top_k)
    sums = best[..., 0, :, None] + best[..., 1, None, :]
    found, pair = jax.lax.top_k(sums.reshape(*sums.shape[:-2], top_k * top_k), top_k)
    first = jnp.take_along_axis(at[..., 0, :], pair // top_k, axis=-1)
    second = jnp.take_along_axis(at[..., 1, :], pair % top_k, axis=-1)
    return found, first, second


def locate(
    first: jax.Array, second: jax.Array, keys: int, expansion: int
) -> tuple[jax.Array, jax.Array]:
    """(block in [0, E), physical row in [0, keys^2 / E)) of the virtual row (first, second).

    One to one. Every sub-key has keys / E rows in every block, and the E virtual rows of a physical
    one have E different first sub-keys (and second ones, where E^2 <= keys): which rows share their
    values is unrelated to which are chosen together. E = 1: row = first * keys + second.
    """
    across = keys // expansion
    block = (first + second) % expansion
    turned = (first + block * across) % keys
    return block, turned * across + (second // expansion + block) % across
