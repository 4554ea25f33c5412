"""The short depthwise causal convolution of the Engram module (equation 5 of the paper)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.layers.norm import RMSNorm


class ShortConv(nnx.Module):
    """y = SiLU(Conv1d(RMSNorm(u))), one filter per channel and branch, zero at the start.

    kernel taps reach back 0, dilation, ..., (kernel - 1) * dilation positions; a tap that would
    cross the start of a document reads zero, as at the start of a sequence.
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
    ):
        self.kernel, self.dilation = kernel, dilation
        self.norm = RMSNorm(
            (streams, d_model), eps, gain_offset=gain_offset, param_dtype=param_dtype
        )
        # taps[j] belongs to the position (kernel - 1 - j) * dilation back, as in torch's Conv1d.
        self.taps = nnx.Param(jnp.zeros((kernel, streams, d_model), param_dtype))

    @property
    def tail_length(self) -> int:
        """Positions of history the convolution needs."""
        return (self.kernel - 1) * self.dilation

    def convolve(self, padded: jax.Array, length: int, segments: jax.Array | None) -> jax.Array:
        """SiLU of the convolution, [B, length, M, d].

        padded: [B, tail_length + length, M, d], normalised.
        """
        out = jnp.zeros((), padded.dtype)
        for j in range(self.kernel):
            back = (self.kernel - 1 - j) * self.dilation
            start = self.tail_length - back
            x = jax.lax.slice_in_dim(padded, start, start + length, axis=1)
            if segments is not None and back:
                same = segments == _shift(segments, back)
                x = jnp.where(same[..., None, None], x, 0)
            out = out + x * self.taps[j].astype(x.dtype)
        return jax.nn.silu(out)

    def __call__(self, u: jax.Array, segments: jax.Array) -> jax.Array:
        """u [B, T, M, d], segments int32 [B, T] -> [B, T, M, d]."""
        padded = jnp.pad(self.norm(u), ((0, 0), (self.tail_length, 0), (0, 0), (0, 0)))
        return self.convolve(padded, u.shape[1], segments)

    def init_tail(self, batch: int, dtype: DTypeLike) -> jax.Array:
        """The history of a sequence that has not begun: zeros [B, tail_length, M, d]."""
        return jnp.zeros((batch, self.tail_length, *self.taps.shape[1:]), dtype)

    def cached(
        self, u: jax.Array, tail: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Continue sequences: u [B, S, M, d]; the first valid[b] positions of row b are real.

        Returns the output [B, S, M, d] and the tail after the last real position.
        """
        padded = jnp.concatenate([tail, self.norm(u).astype(tail.dtype)], axis=1)
        return self.convolve(padded, u.shape[1], None), last_valid(padded, self.tail_length, valid)


def last_valid(padded: jax.Array, keep: int, valid: jax.Array) -> jax.Array:
    """The last `keep` entries up to the valid[b]-th new one.

    padded: [B, keep + S, ...], `keep` old entries, then S new ones.
    """
    index = valid[:, None] + jnp.arange(keep)
    return jax.vmap(lambda x, i: x[i])(padded, index)


def _shift(segments: jax.Array, back: int) -> jax.Array:
    """segments[t - back], 0 before the start (no document)."""
    return jnp.pad(segments, ((0, 0), (back, 0)))[:, : segments.shape[1]]
