"""The short depthwise causal convolution of the Engram module (equation 5 of the paper).

The arithmetic: kernels_pallas/short_conv/reference.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.layers.norm import RMSNorm
from engram_jax.sharding.shard_view import UNSHARDED, ShardView
from kernels_pallas.dispatch import AUTO
from kernels_pallas.short_conv.api import short_conv, short_conv_cached

ALIGNED = 16  # tokens that chunks are extended by a multiple of: rows of a tile on TPUs


class ShortConv(nnx.Module):
    """u + SiLU(Conv1d(RMSNorm(u))), one filter per channel and branch, zero at the start.

    The `kernel` taps reach back 0, dilation, ..., (kernel - 1) * dilation positions; a tap that
    would cross the start of a document reads zero, as at the start of a sequence.
    """

    def __init__(
        self,
        streams: int,
        d_model: int,
        kernel: int,
        dilation: int,
        *,
        eps: float,
        gain_offset: float = 0.0,
        param_dtype: DTypeLike = jnp.float32,
        kernels: str = AUTO,
    ):
        self.dilation, self.kernels = dilation, kernels
        self.norm = RMSNorm(
            (streams, d_model), eps, gain_offset=gain_offset, param_dtype=param_dtype
        )
        # taps[j] belongs to the position (kernel - 1 - j) * dilation back, as in torch's Conv1d.
        self.taps = nnx.Param(jnp.zeros((kernel, streams, d_model), param_dtype))

    def __call__(
        self,
        u: jax.Array,
        segments: jax.Array,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
    ) -> jax.Array:
        """u [B, T, M, d], segments int32 [B, T] -> [B, T, M, d], 0 where `mask` [B, T] is False.

        Where sequences are cut over devices, a device convolves its chunks as sequences of their
        own, after the tokens before them that the taps reach, whose outputs it drops.
        """
        reach = (self.taps.shape[0] - 1) * self.dilation
        if shard.axes.sequence == 1 or reach == 0:
            return self._convolved(u, segments, mask)
        chunk = u.shape[1] // 2
        count = min(chunk, -(-reach // ALIGNED) * ALIGNED)

        def extended(x: jax.Array) -> jax.Array:
            """[B, 2 C, ...] -> [2 B, count + C, ...]."""
            parts = x.reshape(x.shape[0], 2, chunk, *x.shape[2:])
            both = jnp.concatenate([shard.tokens_before(x, count), parts], axis=2)
            return both.reshape(-1, *both.shape[2:])

        masked = None if mask is None else extended(mask)
        out = self._convolved(extended(u), extended(segments), masked)
        return out[:, count:].reshape(u.shape)

    def _convolved(self, u: jax.Array, segments: jax.Array, mask: jax.Array | None) -> jax.Array:
        return short_conv(
            u,
            self.norm.scale(),
            self.taps[...],
            segments,
            mask,
            dilation=self.dilation,
            eps=self.norm.eps,
            implementation=self.kernels,
        )

    def init_tail(self, batch: int, dtype: DTypeLike) -> jax.Array:
        """The history of a sequence that has not begun: normalised positions, [B, L, M, d]."""
        kernel, *width = self.taps.shape
        return jnp.zeros((batch, (kernel - 1) * self.dilation, *width), dtype)

    def cached(
        self, u: jax.Array, tail: jax.Array, valid: jax.Array, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Continue sequences: u [B, S, M, d]; the first valid[b] positions of row b are real.

        Returns the output [B, S, M, d] and the tail after the last real position.
        """
        return short_conv_cached(
            u,
            tail,
            valid,
            self.norm.scale(),
            self.taps[...],
            mask,
            dilation=self.dilation,
            eps=self.norm.eps,
            implementation=self.kernels,
        )
