"""The short convolution of Engram (paper section 2, equation 5), residual included.

out_m = u_m + SiLU(Conv1d(RMSNorm(u_m) * gain_m)), one causal filter per channel and stream.
"""

from __future__ import annotations

import jax

from kernels_pallas import dispatch
from kernels_pallas.dispatch import AUTO, GPU, TPU
from kernels_pallas.short_conv import gpu, reference, tpu, vjp

SHORTEST_CHUNK = 8  # of a continued sequence; for fewer tokens the reference, which XLA fuses


def short_conv(
    u: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    dilation: int,
    eps: float,
    implementation: str = AUTO,
) -> jax.Array:
    """The convolution of whole sequences.

    Args:
      u: [B, T, M, d], float32 or bfloat16 (the reference: any float).
      gain: [M, d], of the RMSNorm.
      taps: [K, M, d]; taps[j] belongs to the position (K - 1 - j) * dilation back, and is open if
        that is not before the sequence and of the same segment.
      segments: int32 [B, T], document numbers, or None: one document.
      mask: bool [B, T] or None; the output is 0 where it is False (and u ought to be).
      dilation: positions between taps.
      eps: of the RMSNorm.
      implementation: of dispatch.IMPLEMENTATIONS.

    Returns:
      [B, T, M, d] in the dtype of u, rounded to it once, at the end.

    Raises:
      dispatch.UnsupportedError: "pallas", and the kernel does not support these arguments.
      ValueError: an unknown implementation.
    """
    kernel, dtypes = taps.shape[0], (u.dtype, gain.dtype, taps.dtype)
    limits = {
        TPU: tpu.limit(u.shape, kernel, dilation, dtypes),
        GPU: gpu.limit(u.shape, kernel, dtypes)
        or (gpu.UNMEASURED if implementation == AUTO else None),
    }
    choice = dispatch.choose("short_conv", implementation, limits)
    if choice.kernel is None:
        return reference.short_conv(u, gain, taps, segments, mask, dilation=dilation, eps=eps)
    return vjp.short_conv(u, gain, taps, segments, mask, dilation, eps, choice)


def short_conv_cached(
    u: jax.Array,
    tail: jax.Array,
    valid: jax.Array,
    gain: jax.Array,
    taps: jax.Array,
    mask: jax.Array | None = None,
    *,
    dilation: int,
    eps: float,
    implementation: str = AUTO,
) -> tuple[jax.Array, jax.Array]:
    """The convolution of S more tokens of each sequence, of which the first valid[b] are real.

    Args:
      u: [B, S, M, d].
      tail: [B, L, M, d], L = (K - 1) * dilation: the normalised positions before; zeros at the
        start of a sequence.
      valid: int32 [B], 0 to S.
      gain, taps, mask, dilation, eps, implementation: of `short_conv`; "auto" takes the reference
        for S < 8.

    Returns:
      (out [B, S, M, d] in the wider dtype of u and tail, the tail after the last real position, in
      its dtype).

    Raises:
      dispatch.UnsupportedError, ValueError: as `short_conv`.
    """
    dtypes = (u.dtype, tail.dtype, gain.dtype, taps.dtype)
    short = implementation == AUTO and u.shape[1] < SHORTEST_CHUNK
    limits = {
        TPU: tpu.limit(u.shape, taps.shape[0], dilation, dtypes)
        or ("the kernel needs a history (K = 1)" if tail.shape[1] == 0 else None),
        GPU: "the kernel takes no history",
    }
    choice = dispatch.choose(
        "short_conv_cached", dispatch.REFERENCE if short else implementation, limits
    )
    if choice.kernel is None:
        return reference.short_conv_cached(
            u, tail, valid, gain, taps, mask, dilation=dilation, eps=eps
        )
    return vjp.short_conv_cached(u, tail, valid, gain, taps, mask, dilation, eps, choice)
