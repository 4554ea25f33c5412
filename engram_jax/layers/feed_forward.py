"""SwiGLU feed-forward (arXiv 2002.05202): the dense layers and the shared experts."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.layers.linear import flat
from engram_jax.sharding.shard_view import UNSHARDED, ShardView


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SiLU(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
    """(SiLU(x W_gate) * (x W_up)) W_down: x [..., d] -> [..., d] through an inner width `dim`."""

    def __init__(
        self,
        d_model: int,
        dim: int,
        *,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype

        def matrix(rows: int, columns: int) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (rows, columns), param_dtype)
            return nnx.Param(values * init_std)

        self.gate = matrix(d_model, dim)
        self.up = matrix(d_model, dim)
        self.down = matrix(dim, d_model)

    def __call__(self, x: jax.Array, shard: ShardView = UNSHARDED) -> jax.Array:
        x = x.astype(self.dtype)
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        rows = flat(x)
        y = gated(rows @ gate, rows @ up) @ down
        return shard.psum_tensor(y.reshape(x.shape))
