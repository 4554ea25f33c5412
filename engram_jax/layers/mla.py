"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1) without query compression.

Keys and values of all heads are linear in one latent vector per token. Decoding caches only that
and one rotated key, which the heads share:

    q_h = [q_h^nope ; RoPE(q_h^rope)] = W_q x                                       (per head h)
    [c ; k^rope] = W_kv_a x,   c <- RMSNorm(c),   k^rope <- RoPE(k^rope)            (the latent)
    [k_h^nope ; v_h] = W_kv_b c
    y = W_o [softmax(<q_h, [k_h^nope ; k^rope]> / sqrt(nope + rope)) v_h]_h

`MLA.cached` decodes with one cache per sequence, `MLA.paged` with shared pages (serving).

Symbols beside config/schema.py's: h heads, r = kv_lora_rank, n = nope_dim, p = rope_dim, v = v_dim,
L = capacity of the cache, S = new tokens of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from engram_jax.config import QUERIES, AttentionConfig
from engram_jax.layers import splash
from engram_jax.layers.attention import MASKED, attention_of_chunks, causal_attention, softmax
from engram_jax.layers.linear import linear
from engram_jax.layers.norm import RMSNorm, compute_dtype
from engram_jax.layers.rope import (
    apply_rope,
    pairs_apart,
    rope_tables,
    rotate,
    yarn_softmax_factor,
)
from engram_jax.sharding.shard_view import UNSHARDED, ShardView

PAGED_BLOCK = 256  # tokens of a paged cache that attention takes at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MLACache:
    """The key-value cache: latent [B, L, r] (normalised) and key_rope [B, L, p] (rotated)."""

    latent: jax.Array
    key_rope: jax.Array


class MLA(nnx.Module):
    """x [B, T, d] -> [B, T, d]; see the module's docstring. `cached` is the same step by step."""

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        *,
        norm_eps: float,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        width = config.nope_dim + config.rope_dim
        self.scale = width**-0.5 * yarn_softmax_factor(config.yarn)

        def matrix(rows: int, columns: int) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (rows, columns), param_dtype)
            return nnx.Param(values * init_std)

        heads, rank = config.heads, config.kv_lora_rank
        self.q_proj = matrix(d_model, heads * (config.nope_dim + config.rope_dim))
        self.kv_a_proj = matrix(d_model, rank + config.rope_dim)
        self.kv_norm = RMSNorm(rank, norm_eps, param_dtype=param_dtype)
        self.kv_b_proj = matrix(rank, heads * (config.nope_dim + config.v_dim))
        self.o_proj = matrix(heads * config.v_dim, d_model)

    def __call__(
        self, x: jax.Array, positions: jax.Array, segments: jax.Array, shard: ShardView = UNSHARDED
    ) -> jax.Array:
        """Causal attention within each document.

        Where sequences are cut over devices (sharding/sequence.py), a device has T / S tokens and
        computes what they attend to, with the latents and rotated keys of the whole sequences,
        r + p numbers per token, from which it computes all keys and values.

        Args:
          x: [B, T, d].
          positions: int32 [B, T], within the document.
          segments: int32 [B, T], a token sees the earlier tokens (by index) of its own number.
            Padding (0) sees padding; its outputs are finite and meaningless.

        Returns:
          [B, T, d] in `dtype`.
        """
        query, latent, key_rope = self._project(x, positions, many=True)
        query = checkpoint_name(query, QUERIES)
        shards, key_segments = shard.axes.sequence, segments
        if shards > 1:
            entry = shard.gather_keys(jnp.concatenate([latent, key_rope], axis=-1))
            latent, key_rope = jnp.split(entry, [self.config.kv_lora_rank], axis=-1)
            key_segments = shard.whole_sequences(segments)
        keys, values = (
            linear(latent, w.reshape(len(w), -1)).reshape(*latent.shape[:2], *w.shape[1:])
            for w in self._kv_b()
        )
        shared = jnp.broadcast_to(key_rope[:, :, None], (*keys.shape[:3], key_rope.shape[-1]))
        keys = jnp.concatenate([keys, shared], axis=-1)
        each = query, keys, values, segments
        if shard.platform == "tpu" and splash.usable(x.shape[1]):
            device = shard.sequence_index
            mixed = splash.attention(*each, key_segments, self.scale, device=device, shards=shards)
        elif shards > 1:
            starts = shard.chunk_starts(x.shape[1] // 2)
            mixed = attention_of_chunks(*each, key_segments, starts, self.scale)
        else:
            mixed = causal_attention(*each, self.scale)
        return self._output(mixed, shard)

    def init_cache(self, batch: int, capacity: int) -> MLACache:
        """An empty cache for `batch` sequences of at most `capacity` tokens."""
        shape = (batch, capacity)
        return MLACache(
            latent=jnp.zeros((*shape, self.config.kv_lora_rank), self.dtype),
            key_rope=jnp.zeros((*shape, self.config.rope_dim), self.dtype),
        )

    def cached(
        self, x: jax.Array, positions: jax.Array, cache: MLACache, shard: ShardView = UNSHARDED
    ) -> tuple[jax.Array, MLACache]:
        """Prefill or decode: attend to the cache and to the new tokens, and cache these.

        The queries are projected into the latent space (W_k absorbed into them, W_v into the
        output), so a step costs S x L x r per head and never expands the cache to keys and values.

        Args:
          x: [B, S, d].
          positions: int32 [B, S] >= 0, a token's slot in the cache; it sees the slots up to its
            own, which must have been written. Padding has a position >= L: it is not cached, and
            its output is meaningless.
          cache: from `init_cache` or from the previous step.

        Returns:
          ([B, S, d] in `dtype`, the cache with the new tokens).
        """
        query, latent, key_rope = self._project(x, positions)
        rows = jnp.arange(x.shape[0])[:, None]
        cache = MLACache(
            latent=cache.latent.at[rows, positions].set(latent, mode="drop"),
            key_rope=cache.key_rope.at[rows, positions].set(key_rope, mode="drop"),
        )
        key_weights, value_weights = self._kv_b()
        nope, rope = jnp.split(query, [self.config.nope_dim], axis=-1)
        absorbed = jnp.einsum("bshn,rhn->bshr", nope, key_weights)
        scores = self._dot("bshr,blr->bshl", absorbed, cache.latent)
        scores = scores + self._dot("bshp,blp->bshl", rope, cache.key_rope)
        visible = jnp.arange(cache.latent.shape[1]) <= positions[..., None]
        weights = softmax(scores * self.scale, visible[:, :, None]).astype(self.dtype)
        mixed = jnp.einsum("bshl,blr->bshr", weights, cache.latent)
        heads = jnp.einsum("bshr,rhv->bshv", mixed, value_weights)
        return self._output(heads, shard), cache

    def paged(
        self,
        x: jax.Array,
        positions: jax.Array,
        pages: jax.Array,
        layer: jax.Array,
        pool: jax.Array,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, jax.Array]:
        """As `cached`, with the cache in pages of a pool that all sequences and layers share.

        The softmax is taken page block by page block. Blocks after a query's own position change
        nothing in its result, not even its rounding: it does not depend on how long the batch's
        other sequences are.

        Args:
          x: [B, S, d].
          positions: int32 [B, S] >= 0, as in `cached`; padding is at n * page or beyond.
          pages: int32 [B, n], the sequences' pages in order; entries beyond a sequence's end are
            any number. A sequence has at most n * page tokens.
          layer: int32 [], which of the pool's layers this is.
          pool: [layers, pages, page, r + p], latents (normalised) beside rotated keys.

        Returns:
          ([B, S, d] in `dtype`, the pool with the new tokens).
        """
        query, latent, key_rope = self._project(x, positions)
        count, page = pool.shape[1:3]
        end = pages.shape[1] * page
        inside = jnp.minimum(positions, end - 1)
        place = jnp.take_along_axis(pages, inside // page, axis=1)
        place = jnp.where(positions < end, place, count)  # out of range: dropped
        entry = jnp.concatenate([latent, key_rope], axis=-1).astype(pool.dtype)
        pool = pool.at[layer, place, inside % page].set(entry, mode="drop")
        key_weights, value_weights = self._kv_b()
        nope, rope = jnp.split(query, [self.config.nope_dim], axis=-1)
        absorbed = jnp.einsum("bshn,rhn->bshr", nope, key_weights)
        query = jnp.concatenate([absorbed, rope], axis=-1)
        mixed = self._paged_attention(query, positions, pages, layer, pool)
        heads = jnp.einsum("bshr,rhv->bshv", mixed, value_weights)
        return self._output(heads, shard), pool

    def _paged_attention(
        self,
        query: jax.Array,
        positions: jax.Array,
        pages: jax.Array,
        layer: jax.Array,
        pool: jax.Array,
    ) -> jax.Array:
        """query [B, S, h, r + p] -> mixed latents [B, S, h, r] in `dtype`."""
        rank, page = self.config.kv_lora_rank, pool.shape[2]
        group = math.gcd(pages.shape[1], max(1, PAGED_BLOCK // page))
        width = group * page
        # The last real position of each sequence; -1 = it has none.
        longest = jnp.max(jnp.where(positions < pages.shape[1] * page, positions, -1), axis=1)
        last = jnp.maximum(jnp.max(longest), 0)
        wide = compute_dtype(query)

        def block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, mixed = carry
            these = jax.lax.dynamic_slice_in_dim(pages, j * group, group, axis=1)
            keys = pool.at[layer, these].get(mode="clip")
            keys = keys.reshape(keys.shape[0], width, -1)
            # Entries after a sequence's end belong to another one, and 0 * NaN is not 0.
            own = (j * width + jnp.arange(width) <= longest[:, None])[..., None]
            keys = jnp.where(own, keys, 0)
            visible = (j * width + jnp.arange(width) <= positions[..., None])[:, :, None]
            scores = self._dot("bshc,blc->bshl", query, keys) * self.scale
            scores = jnp.where(visible, scores, MASKED)
            top = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
            kept = jnp.exp(highest - top)
            new = self._dot("bshl,blr->bshr", weights.astype(self.dtype), keys[..., :rank])
            return (
                top,
                total * kept + jnp.sum(weights, axis=-1),
                mixed * kept[..., None] + new,
            )

        shape = query.shape[:3]
        start = (
            jnp.full(shape, MASKED, wide),
            jnp.zeros(shape, wide),
            jnp.zeros((*shape, rank), wide),
        )
        _, total, mixed = jax.lax.fori_loop(0, last // width + 1, block, start)
        return (mixed / total[..., None]).astype(self.dtype)

    def _project(
        self, x: jax.Array, positions: jax.Array, *, many: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, S, h, n + p], latents [B, S, r], rotated keys [B, S, p].

        many: the tokens have more numbers than the weights, so the pairs that are rotated are taken
        apart in the weights' columns: a TPU takes every other lane of an array by a matrix product.
        """
        config = self.config
        x = x.astype(self.dtype)
        cos, sin = rope_tables(positions, config.rope_dim, config.rope_theta, config.yarn)
        turn = rotate if many else apply_rope

        def projected(weights: nnx.Param, width: int) -> tuple[jax.Array, jax.Array]:
            """[B, S, .., width - p] and [B, S, .., p] of all heads."""
            matrix, start = weights[...].astype(self.dtype), width - config.rope_dim
            if many:
                heads = matrix.reshape(len(matrix), -1, width)
                parts = [heads[..., :start], pairs_apart(heads[..., start:])]
                matrix = jnp.concatenate(parts, axis=-1).reshape(matrix.shape)
            product = linear(x, matrix).reshape(*x.shape[:2], -1, width)
            return product[..., :start], product[..., start:]

        nope, rope = projected(self.q_proj, config.nope_dim + config.rope_dim)
        rope = turn(rope, cos[:, :, None], sin[:, :, None])
        query = jnp.concatenate([nope, rope], axis=-1)
        latent, key_rope = projected(self.kv_a_proj, config.kv_lora_rank + config.rope_dim)
        return query, self.kv_norm(latent[:, :, 0]), turn(key_rope[:, :, 0], cos, sin)

    def _kv_b(self) -> tuple[jax.Array, jax.Array]:
        """W_kv_b as the heads' key weights [r, h, n] and value weights [r, h, v]."""
        config = self.config
        weights = self.kv_b_proj[...].astype(self.dtype)
        weights = weights.reshape(config.kv_lora_rank, -1, config.nope_dim + config.v_dim)
        return weights[..., : config.nope_dim], weights[..., config.nope_dim :]

    def _dot(self, dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(dimensions, a, b, preferred_element_type=compute_dtype(a))

    def _output(self, heads: jax.Array, shard: ShardView) -> jax.Array:
        """[B, S, h, v] -> [B, S, d]."""
        merged = heads.reshape(*heads.shape[:2], -1)
        return shard.psum_tensor(linear(merged, self.o_proj[...].astype(self.dtype)))
