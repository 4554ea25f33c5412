"""One transformer block, and a stack of identical blocks run as a scan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from engram_jax.config import OUTPUTS, ModelConfig
from engram_jax.layers.feed_forward import SwiGLU
from engram_jax.layers.hyper_connections import HyperConnection
from engram_jax.layers.mla import MLA, MLACache
from engram_jax.layers.moe import MoE
from engram_jax.layers.norm import RMSNorm
from engram_jax.sharding.shard_view import GATHERED, UNSHARDED, ShardView

DENSE, MOE = "dense", "moe"

# On CPUs the scan over up to so many blocks is unrolled: XLA copies each block's parameters out of
# the stack there, and what is kept for the backward pass into one, a tenth of the demo's step. On
# TPUs unrolled blocks hold much more memory (docs/log.md: Meshes by prediction).
UNROLLED = 8


class Block(nnx.Module):
    """Attention and feed-forward, each between the pre and post mixing of its own hyper-connection.

    kind: DENSE (SwiGLU) or MOE (shared + routed experts).
    layer: 0-based layer id, a traced int32 [] when blocks are stacked; sub-layer 2 * layer + {0, 1}
      starts from residual stream (sub-layer mod M).
    """

    def __init__(self, config: ModelConfig, kind: str, layer: jax.Array, *, rngs: nnx.Rngs):
        dtypes: dict[str, Any] = {
            "dtype": jnp.dtype(config.dtype),
            "param_dtype": jnp.dtype(config.param_dtype),
        }
        gain = {"param_dtype": dtypes["param_dtype"]}
        init = {"init_std": config.init_std, **dtypes, "rngs": rngs}
        d = config.d_model
        hyper = partial(HyperConnection, d, config.hyper, kernels=config.kernels, **gain, rngs=rngs)
        self.attention_hyper = hyper(home=2 * layer)
        self.attention_norm = RMSNorm(d, config.norm_eps, **gain)
        self.attention = MLA(d, config.attention, norm_eps=config.norm_eps, **init)
        self.ffn_hyper = hyper(home=2 * layer + 1)
        self.ffn_norm = RMSNorm(d, config.norm_eps, **gain)
        self.kind = kind
        self.ffn: MoE | SwiGLU = (
            MoE(d, config.ffn, **init) if kind == MOE else SwiGLU(d, config.ffn.dense_dim, **init)
        )

    def _feed_forward(
        self, x: jax.Array, segments: jax.Array, shard: ShardView
    ) -> tuple[jax.Array, jax.Array]:
        """streams [B, T, M, d] -> (streams, load [E]; [0] for a dense block)."""
        h, mixing = self.ffn_hyper.pre(x)
        h = self.ffn_norm(h)
        if isinstance(self.ffn, MoE):
            y, load = self.ffn(h, segments, shard)
        else:
            y, load = self.ffn(h, shard), jnp.zeros((0,), jnp.float32)
        return self.ffn_hyper.merge(mixing, checkpoint_name(y, OUTPUTS)), load

    def __call__(
        self, x: jax.Array, positions: jax.Array, segments: jax.Array, shard: ShardView = UNSHARDED
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, M, d], positions and segments int32 [B, T] -> (x, load [E])."""
        h, mixing = self.attention_hyper.pre(x)
        y = self.attention(self.attention_norm(h), positions, segments, shard)
        x = self.attention_hyper.merge(mixing, checkpoint_name(y, OUTPUTS))
        return self._feed_forward(x, segments, shard)

    def cached(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: MLACache,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, MLACache]:
        """Prefill or decode: x [B, S, M, d]; positions of padding are beyond the cache's capacity.

        valid: int32 [B, S], 1 for real tokens and 0 for padding.
        """
        h, mixing = self.attention_hyper.pre(x)
        y, cache = self.attention.cached(self.attention_norm(h), positions, cache, shard)
        x = self.attention_hyper.merge(mixing, y)
        return self._feed_forward(x, valid, shard)[0], cache

    def paged(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        pages: jax.Array,
        layer: jax.Array,
        pool: jax.Array,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, jax.Array]:
        """As `cached`, with a shared pool of pages (MLA.paged)."""
        h, mixing = self.attention_hyper.pre(x)
        h = self.attention_norm(h)
        y, pool = self.attention.paged(h, positions, pages, layer, pool, shard)
        x = self.attention_hyper.merge(mixing, y)
        return self._feed_forward(x, valid, shard)[0], pool


def moments(x: jax.Array) -> jax.Array:
    """Means of the squares and of the fourth powers of streams [B, T, M, d], float32 [B, T, 2]; no
    gradient passes."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.stack([jnp.mean(x**2, axis=(-2, -1)), jnp.mean(x**4, axis=(-2, -1))], axis=-1)


class Stack(nnx.Module):
    """`count` blocks of one kind from layer `first` on.

    Their parameters are stacked on axis 0 and run by lax.scan, so compile time does not depend on
    `count` (but for short stacks on CPUs: UNROLLED).
    """

    def __init__(self, config: ModelConfig, kind: str, first: int, count: int, *, key: jax.Array):
        """key: of the blocks of all layers; each draws from this key and its layer id."""
        self.first, self.count = first, count
        self.remat, self.kept = config.remat, config.kept

        @nnx.vmap
        def create(layer: jax.Array) -> Block:
            rngs = nnx.Rngs(params=jax.random.fold_in(key, layer))
            return Block(config, kind, layer, rngs=rngs)

        self.blocks = create(jnp.arange(first, first + count, dtype=jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        shard: ShardView = UNSHARDED,
        observe: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, M, d] -> (x, loads [count, E]); observe: (x, (loads, what it makes of the
        streams after each layer, stacked on axis 0))."""
        graphdef, state = self._split()

        def body(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            block = nnx.merge(graphdef, shard.all_gather(state, layer=True))
            x, load = block(x, positions, segments, shard)
            return x, load if observe is None else (load, observe(x))

        if self.remat == "block":
            policy = jax.checkpoint_policies.save_only_these_names(*self.kept)
            body = jax.checkpoint(body, policy=policy)
        elif self.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            body = jax.checkpoint(body, policy=policy)
        elif shard.axes.devices > 1:  # a layer's weights are gathered again, not kept
            policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            body = jax.checkpoint(body, policy=policy)
        unroll = shard.platform == "cpu" and self.count <= UNROLLED
        return jax.lax.scan(body, x, state, unroll=unroll)

    def _split(self) -> tuple[Any, Any]:
        """The blocks' graphdef and their stacked parameters, by name."""
        graphdef, state = nnx.split(self.blocks)
        return graphdef, nnx.to_pure_dict(state)

    def cached(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: MLACache,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, MLACache]:
        """As Block.cached, with caches stacked on axis 0."""
        graphdef, state = self._split()

        def body(x: jax.Array, inputs: tuple[Any, MLACache]) -> tuple[jax.Array, MLACache]:
            state, cache = inputs
            block = nnx.merge(graphdef, shard.all_gather(state, layer=True))
            return block.cached(x, positions, valid, cache, shard)

        return jax.lax.scan(body, x, (state, cache))

    def paged(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        pages: jax.Array,
        pool: jax.Array,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, jax.Array]:
        """As Block.paged. The pool is the scan's carry, not split by layer: updated in place."""
        graphdef, state = self._split()

        def body(carry: tuple[jax.Array, jax.Array], inputs: tuple[Any, jax.Array]) -> Any:
            state, layer = inputs
            block = nnx.merge(graphdef, shard.all_gather(state, layer=True))
            return block.paged(carry[0], positions, valid, pages, layer, carry[1], shard), None

        layers = jnp.arange(self.first, self.first + self.count, dtype=jnp.int32)
        return jax.lax.scan(body, (x, pool), (state, layers))[0]
