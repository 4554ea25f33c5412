"""mHC: manifold-constrained hyper-connections (arXiv 2512.24880), the network's residual streams.

n streams x in R^{n x d} run through all blocks. Around every sub-layer F, per token, with
v = RMSNorm(vec(x)) in R^{nd} and (h_pre, h_post, h_res) = v fn:

    pre  = sigmoid(a_pre h_pre + b_pre)                        R^n      what F reads of each stream
    post = 2 sigmoid(a_post h_post + b_post)                   R^n      what each stream gets of F
    res  = Sinkhorn(exp(a_res mat(h_res) + b_res))             R^{n x n}, doubly stochastic
    x   <- res x + post^T F(pre x)

Where the sources differ or leave a choice (config.HyperConnectionConfig):

  orientation  DeepSeek-V4 reads mat(.) as [source, target] and mixes with its matrix's transpose,
               the paper as [target, source] (`transpose`). Both then divide by the sums over
               targets first and end with the sums over sources: one arithmetic, two indexings.
  eps          added where DeepSeek-V4 adds it (to pre, to the result of the first division, to the
               other divisors, in the norm); the paper's equations have none (eps -> 0).
  norm         a gain over all n d entries (paper) or none (DeepSeek-V4): `norm_gain`.
  start        "identity", the default: res close to I, post = 1, pre close to one home stream, so
               training starts from a plain pre-norm residual network. "uniform" (b = 0,
               DeepSeek-V4): pre = 1/2, post = 1, res = 1/n, so the first sub-layers average away
               whatever makes streams differ. `scale_init` is 0.01 in the paper, 1 in V4.

Coefficients are computed in float32 (float64 for float64 streams), streams keep their dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from engram_jax.config import HyperConnectionConfig
from kernels_pallas.dispatch import AUTO
from kernels_pallas.mhc.api import mhc_merge, mhc_pre

# Logit of an open gate at the identity start. A sub-layer moves e^-6 = 0.25 % between any two
# streams: the 60 sub-layers of the paper's models leave 55 % of a difference between streams (logit
# 4: 1 %, 8: 92 %), and Adam, whose steps have the same size at any slope, still learns to mix.
IDENTITY_LOGIT = 6.0


def expand(x: jax.Array, streams: int) -> jax.Array:
    """x [B, T, d] -> `streams` equal streams [B, T, n, d]."""
    return jnp.repeat(x[..., None, :], streams, axis=-2)


def collapse(x: jax.Array) -> jax.Array:
    """Streams [B, T, n, d] -> their sum [B, T, d]."""
    return jnp.sum(x, axis=-2)


def initial_base(home: ArrayLike, streams: int, start: str, dtype: DTypeLike) -> jax.Array:
    """(b_pre [n], b_post [n], b_res [n * n]) of the "identity" or "uniform" start, concatenated."""
    if start == "uniform":
        return jnp.zeros((2 * streams + streams**2,), dtype)
    at_home = jnp.arange(streams) == jnp.asarray(home) % streams
    pre = jnp.where(at_home, IDENTITY_LOGIT, -IDENTITY_LOGIT)
    res = IDENTITY_LOGIT * jnp.eye(streams)
    return jnp.concatenate([pre, jnp.zeros(streams), res.reshape(-1)]).astype(dtype)


class Mixing(NamedTuple):
    """Streams x [B, T, n, d]; post [B, T, n] and res [B, T, n (target), n (source)] for them."""

    x: jax.Array
    post: jax.Array
    res: jax.Array


class HyperConnection(nnx.Module):
    """The hyper-connection of one sub-layer: `pre` before it, `merge` after it.

    Parameters: fn [n * d, 2n + n * n] (columns: pre, post, res), base [2n + n * n], scale [3]
    (a_pre, a_post, a_res), norm_gain [n * d] or None.

    Args:
      home: which stream the sub-layer reads at the identity start, counted modulo n; may be traced
        (blocks are stacked by nnx.vmap). Passing the sub-layer's index spreads them evenly.
      init_std: of fn; at scale 0.01 the coefficients start almost independent of the token.
    """

    def __init__(
        self,
        d_model: int,
        config: HyperConnectionConfig,
        home: ArrayLike,
        *,
        init_std: float = 0.02,
        param_dtype: DTypeLike,
        kernels: str = AUTO,
        rngs: nnx.Rngs,
    ):
        self.config, self.kernels = config, kernels
        n = config.streams
        shape = (n * d_model, 2 * n + n * n)
        self.fn = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * init_std)
        self.base = nnx.Param(initial_base(home, n, config.start, param_dtype))
        self.scale = nnx.Param(jnp.full((3,), config.scale_init, param_dtype))
        self.norm_gain = (
            nnx.Param(jnp.ones((n * d_model,), param_dtype)) if config.norm_gain else None
        )

    def pre(self, x: jax.Array) -> tuple[jax.Array, Mixing]:
        """The sub-layer's input, and what `merge` needs.

        Args:
          x: streams [B, T, n, d].

        Returns:
          (input [B, T, d] in the dtype of x, the streams with what they are mixed by).
        """
        config = self.config
        collapsed, post, res, x = mhc_pre(
            x,
            self.fn[...],
            self.base[...],
            self.scale[...],
            None if self.norm_gain is None else self.norm_gain[...],
            iterations=config.sinkhorn_iterations,
            eps=config.eps,
            transpose=config.transpose,
            implementation=self.kernels,
        )
        return collapsed, Mixing(x, post, res)

    def merge(self, mixing: Mixing, y: jax.Array) -> jax.Array:
        """res x + post^T y: from `pre`, and the sub-layer's output y [B, T, d] -> streams.

        Computed in the dtype of post and res, returned in x's.
        """
        return mhc_merge(mixing.x, y, mixing.post, mixing.res, implementation=self.kernels)
