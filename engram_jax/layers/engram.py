"""The Engram module: rows of the memory, gated by the hidden state, added to the residual streams.

Section 2 of the paper. For a token t, its n-gram orders n and hash heads k, every branch m of M
(the streams of mHC) and hidden width d:

    z_n,k   = hash_k of canonical ids t - n + 1 .. t,  row = E_n,k[z_n,k]          (1)
    e       = the rows of all orders and heads, concatenated                       (2)
    key_m   = W_K^m e,  value = W_V e                                              (3)
    s_m     = <RMSNorm(h_m), RMSNorm(key_m)> / sqrt(d)
    gate_m  = sigmoid(sign(s_m) sqrt(max(|s_m|, 1e-6)))             (4), per branch (6)
    u_m     = gate_m * value
    out_m   = u_m + SiLU(Conv1d(RMSNorm(u_m)))                                     (5)
    h_m    <- h_m + out_m, before attention

    (1)            addressing/hash_numpy.py: addresses; memory/table.py: lookup
    (2)            `Engram.gated_value`, its reshape
    (3), (4), (6)  kernels_pallas/engram_gate/reference.py: keys_and_value, gates, gate_of_score
    (5)            layers/short_conv.py: ShortConv; kernels_pallas/short_conv/reference.py
    h <- h + out   model/transformer.py: Transformer.__call__

The signed square root is in the official demo, not in the paper's text. Three published forms:

    form     projections     short conv     gains of the norms     eps of the gate's norms
    paper    with biases     yes            g                      machine epsilon (torch's default)
    v41      no biases       no             g (q_weight, k_weight) the model's
    qwen     no biases       yes            1 + g                  the model's

Machine epsilon is that of the dtype in which the norms are computed: float32's, 2^-23, for bfloat16
rows, too. That is what the demo's torch.nn.RMSNorm(eps=None) adds from torch 2.7 on, and what keeps
a checkpoint's meaning when model.dtype changes. (Up to torch 2.6 it was the input's own, 2^-7 for
bfloat16, which makes a key of rms 0.2 come out 9 % smaller.)

Two switches take the module apart, in any form (docs/models.md: Variants):

    gate          "one" or "learned": no context, so no keys and no norms of them (constant_gate.py)
    multi_branch  False: one branch for all streams, as in the paper's ablation. Its
                  query is the streams' mean; key, gate, value and convolution are one each, and the
                  result is added to every stream.

The paper does not say what replaces the M queries. The mean and the sum give the same normalised
query up to the norm's eps (RMSNorm divides by the size); the mean has the size of one stream, so
that eps weighs as it does with M branches, and at the first layer, where the streams are M copies
of the embedding, it is each of them. Adding the result to every stream, as M branches do, keeps the
scale of what reaches the end, where the streams are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from engram_jax.config import BF16, CONTEXT, FP8, LEARNED, PAPER, QWEN, V41, EngramConfig
from engram_jax.layers.constant_gate import constant_gate
from engram_jax.layers.norm import RMSNorm, compute_dtype
from engram_jax.layers.short_conv import ShortConv
from engram_jax.sharding.shard_view import UNSHARDED, ShardView
from kernels_pallas.dispatch import AUTO
from kernels_pallas.engram_gate.api import engram_gate

CONV_EPS = 1e-5  # the demo's conv norms


@dataclass(frozen=True)
class Form:
    """What distinguishes the published forms. machine_eps: the norms' eps is the dtype's machine
    epsilon, not the model's `norm_eps`."""

    bias: bool
    conv: bool
    gain_offset: float
    machine_eps: bool


# "over_encoding" is another module (over_encoding.py).
FORMS = {
    PAPER: Form(bias=True, conv=True, gain_offset=0.0, machine_eps=True),
    V41: Form(bias=False, conv=False, gain_offset=0.0, machine_eps=False),
    QWEN: Form(bias=False, conv=True, gain_offset=1.0, machine_eps=False),
}


class Engram(nnx.Module):
    """rows [B, T, H, dim], streams [B, T, M, d] -> what is added to the streams [B, T, M, d]."""

    def __init__(
        self,
        d_model: int,
        streams: int,
        config: EngramConfig,
        *,
        norm_eps: float,
        init_std: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        kernels: str = AUTO,
        rngs: nnx.Rngs,
    ):
        form = FORMS[config.form]
        self.kernels = kernels
        self.projection_dtype = jnp.dtype(jnp.bfloat16 if config.precision == BF16 else dtype)
        self.recipe = config.fp8_recipe if config.precision == FP8 else None
        self.norm_eps = None if form.machine_eps else norm_eps
        branches = streams if config.multi_branch else 1
        keys = branches if config.gate == CONTEXT else 0
        self.one_branch = not config.multi_branch
        # Keys of the M branches, then the value: one matrix product, as the paper fuses it.
        shape = (config.d_mem, keys + 1, d_model)
        self.projection = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * init_std)
        self.bias = nnx.Param(jnp.zeros(shape[1:], param_dtype)) if form.bias else None
        # Only the gains of these norms are used (the gate fuses the norms with the dot product).
        norm = partial(RMSNorm, gain_offset=form.gain_offset, param_dtype=param_dtype)
        self.query_norm = norm((branches, d_model), norm_eps) if keys else None
        self.key_norm = norm((branches, d_model), norm_eps) if keys else None
        learned = config.gate == LEARNED
        self.gate_logit = nnx.Param(jnp.zeros((branches,), param_dtype)) if learned else None
        self.conv = (
            ShortConv(
                branches,
                d_model,
                config.conv_kernel,
                config.max_ngram,
                eps=CONV_EPS if form.machine_eps else norm_eps,
                gain_offset=form.gain_offset,
                param_dtype=param_dtype,
                kernels=kernels,
            )
            if form.conv and config.conv_kernel
            else None
        )

    def gated_value(
        self, rows: jax.Array, streams: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Equations 2, 3, 4, 6: u [B, T, M, d] in the streams' dtype, and the gates [B, T, M], None
        without; of one branch [B, T, 1, d] and [B, T, 1]."""
        e = rows.reshape(*rows.shape[:2], -1).astype(self.projection_dtype)
        if self.one_branch:
            wide = streams.astype(compute_dtype(streams))
            streams = jnp.mean(wide, axis=-2, keepdims=True).astype(streams.dtype)
        if self.query_norm is None or self.key_norm is None:
            return constant_gate(
                e,
                self.projection[...],
                None if self.bias is None else self.bias[...],
                None if self.gate_logit is None else self.gate_logit[...],
                mask,
                branches=streams.shape[-2],
                dtype=streams.dtype,
                recipe=self.recipe,
            )
        eps = self.norm_eps
        if eps is None:
            eps = float(jnp.finfo(compute_dtype(e)).eps)
        return engram_gate(
            e,
            self.projection[...],
            streams,
            self.query_norm.scale() * self.key_norm.scale(),
            None if self.bias is None else self.bias[...],
            mask,
            eps=eps,
            recipe=self.recipe,
            implementation=self.kernels,
        )

    def __call__(
        self,
        rows: jax.Array,
        streams: jax.Array,
        segments: jax.Array,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What to add to the streams, and the gates.

        Args:
          rows: [B, T, H, dim] from the memory, any float dtype.
          streams: [B, T, M, d].
          segments: int32 [B, T], document numbers; the convolution does not cross them.
          mask: bool [B, T] or None; False = a token without memory, such as an image token: its
            gate and output are 0, and it adds nothing to the convolution of later tokens.
          shard: the mesh, over which sequences may be cut.

        Returns:
          (out [B, T, M, d] in the streams' dtype, gate [B, T, M] float32; [B, T, 1] of one branch,
          None without a gate).
        """
        u, gate = self.gated_value(rows, streams, mask)
        out = u if self.conv is None else self.conv(u, segments, mask, shard)
        return self._to_streams(out, streams), gate

    def _to_streams(self, out: jax.Array, streams: jax.Array) -> jax.Array:
        """The branches' results, or the only one's for every stream: [B, T, M, d]."""
        return jnp.broadcast_to(out, streams.shape) if self.one_branch else out

    def init_tail(self, batch: int, dtype: DTypeLike) -> jax.Array | None:
        """The convolution's state before the first token, None for a form without one."""
        return None if self.conv is None else self.conv.init_tail(batch, dtype)

    def cached(
        self,
        rows: jax.Array,
        streams: jax.Array,
        tail: jax.Array | None,
        valid: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Prefill or decode: as `__call__` for S new positions of which valid[b] are real."""
        u, _ = self.gated_value(rows, streams, mask)
        if self.conv is None or tail is None:
            return self._to_streams(u, streams), tail
        out, tail = self.conv.cached(u, tail, valid, mask)
        return self._to_streams(out, streams), tail
