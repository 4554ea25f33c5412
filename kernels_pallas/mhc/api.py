"""mHC, manifold-constrained hyper-connections (arXiv 2512.24880, section 4), around a sub-layer F.

Equations 3 and 7 to 9 of the paper, as in engram_jax/layers/hyper_connections.py, with an eps where
the released DeepSeek-V4 adds it (to pre, and in sinkhorn.py); the paper has none.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.dispatch import AUTO, GPU, TPU
from kernels_pallas.mhc import gpu, reference, tpu_backward, tpu_blocks, tpu_merge, vjp


def mhc_pre(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    norm_gain: jax.Array | None = None,
    *,
    iterations: int,
    eps: float,
    transpose: bool,
    implementation: str = AUTO,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The sub-layer's input, and what `mhc_merge` takes. Differentiable in every array.

    Args:
      x: streams [..., n, d], float32, bfloat16 or (reference only) float64.
      fn: [n d, 2 n + n n], columns pre, post, res; used in float32 (float64 for float64 streams),
        as are the other parameters.
      base: [2 n + n n].
      scale: [3], a of pre, post and res.
      norm_gain: of the norm, [n d] or None.
      iterations: of Sinkhorn, at least 1.
      eps: of the norm, of pre and of the divisions.
      transpose: mat(h_res) is [source, target] (DeepSeek-V4), else [target, source] (the paper).
      implementation: of dispatch.IMPLEMENTATIONS.

    Returns:
      (input [..., d] in x's dtype, post [..., n], res [..., n (target), n (source)], x), post and
      res in float32 (float64). `mhc_merge` is best given this x: the TPU's kernel then adds its
      gradient where it writes that of the argument, instead of another pass over both.

    Raises:
      dispatch.UnsupportedError: "pallas", and the kernel does not support these arguments.
      ValueError: an unknown implementation.
    """
    *lead, n, d = x.shape
    limits = _limits(implementation, tpu_backward.vmem, x, iterations, x.dtype)
    choice = dispatch.choose("mhc_pre", implementation, limits)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    fn, base, scale = (a.astype(wide) for a in (fn, base, scale))
    if norm_gain is not None:
        fn = fn * norm_gain.astype(wide)[:, None]
    if choice.kernel is None:
        return reference.pre(
            x, fn, base, scale, iterations=iterations, eps=eps, transpose=transpose
        )
    options = vjp.Options(iterations, eps, transpose)
    collapsed, post, res, streams = vjp.pre(
        x.reshape(math.prod(lead), n, d), fn, base, scale, options, choice
    )
    return (
        collapsed.reshape(*lead, d),
        post.reshape(*lead, n),
        res.reshape(*lead, n, n),
        streams.reshape(x.shape),
    )


def mhc_merge(
    x: jax.Array,
    y: jax.Array,
    post: jax.Array,
    res: jax.Array,
    *,
    implementation: str = AUTO,
) -> jax.Array:
    """The streams after the sub-layer: res x + post^T y. Differentiable in every array.

    Args:
      x: streams [..., n, d].
      y: the sub-layer's output [..., d].
      post, res: [..., n] and [..., n (target), n (source)] from `mhc_pre` of the same x; computed
        in their dtype. The kernels support only float32.
      implementation: of dispatch.IMPLEMENTATIONS.

    Returns:
      [..., n, d] in x's dtype.

    Raises:
      dispatch.UnsupportedError: "pallas", and the kernel does not support these arguments.
      ValueError: an unknown implementation.
    """
    *lead, n, d = x.shape
    limits = _limits(implementation, tpu_merge.vmem_backward, x, 1, x.dtype, y.dtype)
    if any(a.dtype != jnp.float32 for a in (post, res)):
        reason = f"post is {post.dtype} and res {res.dtype}, not float32"
        limits = {TPU: limits[TPU] or reason, GPU: limits[GPU] or reason}
    choice = dispatch.choose("mhc_merge", implementation, limits)
    if choice.kernel is None:
        return reference.merge(x, y, post, res)
    p = math.prod(lead)
    out = vjp.merge(
        x.reshape(p, n, d), y.reshape(p, d), post.reshape(p, n), res.reshape(p, n, n), choice
    )
    return out.reshape(x.shape)


def _limits(
    implementation: str, vmem: tpu_blocks.Vmem, x: jax.Array, iterations: int, *dtypes: jnp.dtype
) -> dict[str, str | None]:
    n, d = x.shape[-2:]
    limit = tpu_blocks.limit(n, d, iterations, *dtypes)
    if limit is None and x.size == 0:
        limit = "there are no tokens"
    return {
        TPU: limit or tpu_blocks.too_wide(vmem, n, d, x.dtype),
        GPU: limit or (gpu.UNMEASURED if implementation == AUTO else None),
    }
