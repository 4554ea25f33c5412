"""Mixture of experts: shared and routed experts, the router, loss-free balancing.

DeepSeekMoE (arXiv 2401.06066) with DeepSeek-V3's router (arXiv 2412.19437, equations 12-16):

    s_e    = sigmoid(<x, W_e>)                              scores, float32
    chosen = the k experts of largest s_e + bias_e          the bias selects and does nothing else
    g_e    = s_e / sum of the chosen scores * scaling       weights
    y      = SwiGLU_shared(x) + sum over chosen e of g_e SwiGLU_e(x)

No token is ever dropped. Balance comes from the bias alone (auxiliary-loss-free, arXiv 2408.15664):
after a step `updated_bias` (called by training/updates.py) raises it for experts below the mean
load and lowers it above.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from engram_jax.config import FeedForwardConfig
from engram_jax.layers.feed_forward import SwiGLU
from engram_jax.layers.grouped_matmul import routed_swiglu
from engram_jax.layers.grouped_routing import sort_by_expert
from engram_jax.layers.norm import compute_dtype
from engram_jax.sharding.shard_view import UNSHARDED, ShardView


class RouterBias(nnx.Variable):
    """Balancing bias, float32 [E]: moved by `updated_bias`, never by a gradient."""


def updated_bias(bias: jax.Array, load: jax.Array, rate: ArrayLike) -> jax.Array:
    """bias + rate * sign(mean load - load), over the last axis (experts).

    Args:
      bias: float32 [..., E].
      load: [..., E], assignments of the step (any unit: only the sign of the error counts).
      rate: `bias_update_rate` of the configuration (0.001 in DeepSeek-V3).
    """
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    return bias + rate * jnp.sign(error).astype(bias.dtype)


class MoE(nnx.Module):
    """x [B, T, d] -> (y [B, T, d], load [E]); see the module's docstring."""

    def __init__(
        self,
        d_model: int,
        config: FeedForwardConfig,
        *,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        count, inner = config.routed_experts, config.expert_dim

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * init_std)

        self.router = normal(d_model, count)
        self.router_bias = RouterBias(jnp.zeros((count,), jnp.float32))
        self.gate = normal(count, d_model, inner)
        self.up = normal(count, d_model, inner)
        self.down = normal(count, inner, d_model)
        self.shared = (
            SwiGLU(
                d_model,
                config.shared_experts * inner,
                init_std=init_std,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            if config.shared_experts
            else None
        )

    def __call__(
        self, x: jax.Array, segments: jax.Array, shard: ShardView = UNSHARDED
    ) -> tuple[jax.Array, jax.Array]:
        """Every token through the shared expert and its top-k routed ones.

        Args:
          x: [B, T, d].
          segments: int32 [B, T]; 0 marks padding, which is computed like any token but not counted.
          shard: the mesh; with expert parallelism the routed experts' weights are this device's,
            from `ShardView.all_gather`.

        Returns:
          y [B, T, d] in `dtype`; load float32 [E], how many (token, choice) pairs of real tokens
          each expert got: it sums to k times the number of real tokens, and adds up over
          microbatches and devices.
        """
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(flat)
        picked = jax.nn.one_hot(chosen, self.config.routed_experts, dtype=jnp.float32)
        load = jnp.einsum("tke,t->e", picked, (segments.reshape(-1) != 0).astype(jnp.float32))

        flat = flat.astype(self.dtype)
        y = self._routed(flat, chosen, weights, shard)
        if self.shared is not None:
            y = y + self.shared(flat, shard)
        return y.reshape(x.shape), load

    def _routed(
        self, x: jax.Array, chosen: jax.Array, weights: jax.Array, shard: ShardView
    ) -> jax.Array:
        """x [T, d], chosen and weights [T, k] -> what the routed experts add, [T, d].

        Expert parallelism: every device of the expert axis all-gathers the axis's tokens, computes
        its own experts on all tokens that chose them, and the results are reduce-scattered. There
        is no capacity, so nothing is dropped, whatever the router does.
        """
        matrices = [m[...].astype(self.dtype) for m in (self.gate, self.up, self.down)]
        if shard.axes.expert == 1:
            routing = sort_by_expert(chosen, self.config.routed_experts)
            return shard.psum_tensor(routed_swiglu(x, weights, routing, *matrices))
        count = shard.local_experts
        x, chosen, weights = (lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, weights))
        mine = chosen - lax.axis_index("expert") * count
        elsewhere = (mine < 0) | (mine >= count)
        routing = sort_by_expert(jnp.where(elsewhere, count, mine), count + 1).first(count)
        y = routed_swiglu(x, weights, routing, *matrices, chunk=x.shape[0] // 2)
        y = lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return shard.psum_tensor(y)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [T, d] -> experts int32 [T, k] and their weights [T, k], in at least float32."""
        config, wide = self.config, compute_dtype(x)
        # Float32 products on every platform: a router in bfloat16 flips close choices.
        logits = jnp.matmul(
            x.astype(wide), self.router[...].astype(wide), precision=lax.Precision.HIGHEST
        )
        scores = jax.nn.sigmoid(logits)
        biased = lax.stop_gradient(scores) + self.router_bias[...]
        chosen = lax.top_k(biased, config.top_k)[1].astype(jnp.int32)
        # A masked sum, not a gather: its transpose is no scatter.
        picked = jax.nn.one_hot(chosen, config.routed_experts, dtype=wide)
        weights = jnp.einsum("tke,te->tk", picked, scores, precision=lax.Precision.HIGHEST)
        if config.normalise_top_k:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return chosen, weights * config.routed_scaling
