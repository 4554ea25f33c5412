"""The short depthwise causal convolution of the Engram module (equation 5 of the paper).

The arithmetic: kernels_pallas/short_conv/reference.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.layers.norm import RMSNorm
from kernels_pallas.dispatch import AUTO
from kernels_pallas.short_conv.api import short_conv, short_conv_cached


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
        self, u: jax.Array, segments: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """u [B, T, M, d], segments int32 [B, T] -> [B, T, M, d], 0 where `mask` [B, T] is False."""
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
