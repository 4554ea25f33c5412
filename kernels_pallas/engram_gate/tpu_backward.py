"""The gate of Engram on TPU, backward (Mosaic); keys are recomputed, not stored.

With g = d loss / d out and the forward pass's residuals of every token and branch, the value's
columns are processed first:

    value = rows W_v;  d gate_m = sum g_m value;  d value = sum over m of gate_m g_m
    ds_m  = d gate_m gate_m (1 - gate_m) / (2 sqrt|s_m|), 0 where |s_m| <= 1e-6
    a, b, c = ds r_h r_key / sqrt(d),  ds s r_key^2 / d,  ds s r_h^2 / d

then the columns of every key:

    key = rows W_m;  d key = a h gain - b key;  d h = a gain key - c h;  d gain = sum of a h key

d key and d value are written once, in the dtype of the rows; XLA computes the two products with
them (the gradients of rows and weights). To avoid writing them, the keys would have to be computed
once more for the weights' gradient, a fourth product besides these three: on every TPU generation
this pass is bound by the products, not by memory (README.md).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.engram_gate.fp8_tpu import dot
from kernels_pallas.engram_gate.reference import slope_of_gate
from kernels_pallas.engram_gate.tpu import CHUNK, LANES, MAX_COLUMNS, Blocks, fitted, longest

MAX_TOKENS = 2048


def vmem(b: Blocks, c: int, m: int, sizes: tuple[int, int]) -> int:
    """Bytes of VMEM that blocks need; sizes: bytes of a row's and of a stream's number."""
    of_rows = b.tokens * c + c * b.columns + b.tokens * b.columns
    of_streams = b.tokens * b.columns * (m + 2)
    moving = 2 * (of_rows * sizes[0] + of_streams * sizes[1])
    return moving + 5 * b.tokens * LANES * 4 + 12 * b.chunk * b.columns * 4


def blocks_for(tokens: int, c: int, m: int, d: int, sizes: tuple[int, int]) -> Blocks:
    """Tuned blocks, else the longest block of tokens that fits VMEM."""
    found = tuning.tuned("engram_gate", f"backward_C{c}_d{d}_M{m}_{sizes[0]}_{sizes[1]}")
    if found:
        return fitted(Blocks(**found), tokens)
    return longest(tokens, d, MAX_TOKENS, lambda b: vmem(b, c, m, sizes))


def too_large(c: int, d: int, m: int, sizes: tuple[int, int]) -> str | None:
    """Why not even one chunk of tokens fits VMEM, None if it does; the forward pass needs less."""
    needed = vmem(Blocks(CHUNK, math.gcd(d, MAX_COLUMNS)), c, m, sizes)
    if needed <= tuning.vmem_limit():
        return None
    limit = tuning.vmem_limit() >> 20
    return f"d_mem = {c} and d = {d} need {needed >> 20} MiB of VMEM, more than {limit}"


def backward(
    rows: jax.Array,
    weights: jax.Array,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    stats: jax.Array,
    g: jax.Array,
    g_gate: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients, except for the two products with the projection's gradient.

    Args:
      rows: [T, C]; weights: [M + 1, C, d]; streams, g: [M, T, d]; gain: [M, d]; bias: [M + 1, d];
      stats: float32 [T, 4 M] of the forward pass; g_gate: float32 [T, M].

    Returns:
      (of keys and value [M + 1, T, d] in the rows' dtype, of the streams [M, T, d], of the gain
      float32 [M, d], of the bias float32 [M + 1, d]).
    """
    m, t, d = streams.shape
    c = rows.shape[1]
    sizes = rows.dtype.itemsize, streams.dtype.itemsize
    blocks = blocks or blocks_for(t, c, m, d, sizes)
    bt, bd = blocks.tokens, blocks.columns
    if d % bd:
        raise ValueError(f"blocks of {bd} columns do not divide d = {d}")
    n, parts = d // bd, pl.cdiv(t, bt)

    def column(i: Any, j: Any) -> tuple:
        """(branch, columns), the value's first."""
        return jnp.where(j < n, m, j // n - 1), j % n

    def of_keys(i: Any, j: Any) -> tuple:
        j = jnp.maximum(j - n, 0)
        return j // n, i, j % n

    vector = pl.BlockSpec((None, 1, bd), lambda i, j: (column(i, j)[0], 0, column(i, j)[1]))
    tokens = pl.BlockSpec((None, bt, bd), of_keys)
    partial = pl.BlockSpec(
        (None, None, 1, bd), lambda i, j: (i, column(i, j)[0], 0, column(i, j)[1])
    )
    operands = {
        "rows": (rows, pl.BlockSpec((bt, c), lambda i, j: (i, 0))),
        "weights": (
            weights,
            pl.BlockSpec((None, c, bd), lambda i, j: (column(i, j)[0], 0, column(i, j)[1])),
        ),
        "streams": (streams, tokens),
        "gain": (
            gain.astype(jnp.float32)[:, None],
            pl.BlockSpec((None, 1, bd), lambda i, j: (of_keys(i, j)[0], 0, of_keys(i, j)[2])),
        ),
        "stats": (stats, pl.BlockSpec((bt, 4 * m), lambda i, j: (i, 0))),
        "g": (g, pl.BlockSpec((m, bt, bd), lambda i, j: (0, i, jnp.minimum(j, n - 1)))),
        "g_gate": (g_gate, pl.BlockSpec((bt, m), lambda i, j: (i, 0))),
    }
    if bias is not None:
        operands["bias"] = (bias.astype(jnp.float32)[:, None], vector)
    results = {
        "d_projected": (
            jax.ShapeDtypeStruct((m + 1, t, d), rows.dtype),
            pl.BlockSpec((None, bt, bd), lambda i, j: (column(i, j)[0], i, column(i, j)[1])),
        ),
        "d_streams": (jax.ShapeDtypeStruct((m, t, d), streams.dtype), tokens),
        # One partial sum per block of tokens: the blocks may run on two cores (v5p).
        "d_gain": (jax.ShapeDtypeStruct((parts, m + 1, 1, d), jnp.float32), partial),
        "d_bias": (jax.ShapeDtypeStruct((parts, m + 1, 1, d), jnp.float32), partial),
    }
    names = (*operands, *results, "sums")

    def kernel(*refs: Any) -> None:
        _backward_kernel(dict(zip(names, refs, strict=True)), m=m, t=t, d=d, n=n, blocks=blocks)

    of_weights = {"weights", "gain", "bias"}  # read once in each pass over the tokens' blocks
    d_projected, d_streams, d_gain, d_bias = pl.pallas_call(
        kernel,
        grid=(parts, n + m * n),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[spec for _, spec in results.values()],
        out_shape=[shape for shape, _ in results.values()],
        cost_estimate=cost.estimate(
            2 * t * c * (m + 1) * d,
            [
                *(array for name, (array, _) in operands.items() if name not in of_weights),
                *(shape for shape, _ in results.values()),
            ],
            *((array, parts) for name, (array, _) in operands.items() if name in of_weights),
        ),
        scratch_shapes=[pltpu.VMEM((bt, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret,
        name="engram_gate_backward",
    )(*(array for array, _ in operands.values()))
    return d_projected, d_streams, d_gain[:, :-1, 0].sum(0), d_bias[:, :, 0].sum(0)


def _backward_kernel(
    refs: dict[str, Any], *, m: int, t: int, d: int, n: int, blocks: Blocks
) -> None:
    i, j = pl.program_id(0), pl.program_id(1)
    chunk = blocks.chunk
    lane = lax.broadcasted_iota(jnp.int32, (chunk, LANES), 1)
    nothing = jnp.zeros((1, blocks.columns), jnp.float32)

    def for_each_chunk(body: Any, carry: Any = None) -> Any:
        def step(c: jax.Array, carry: Any) -> Any:
            first = pl.multiple_of(c * chunk, chunk)
            left = t - i * blocks.tokens - first
            there = lax.broadcasted_iota(jnp.int32, (chunk, 1), 0) < left
            return body(pl.ds(first, chunk), there, carry)

        return lax.fori_loop(0, blocks.tokens // chunk, step, carry)

    def projected(tokens: Any) -> jax.Array:
        out = dot(refs["rows"][tokens], refs["weights"][...])
        return out + refs["bias"][...] if "bias" in refs else out

    def total(x: jax.Array, there: jax.Array) -> jax.Array:
        """The sum over the tokens that exist: the last block's other values are undefined."""
        return jnp.sum(jnp.where(there, x, 0), axis=0, keepdims=True)

    @pl.when(j == 0)
    def _start() -> None:
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    @pl.when(j < n)
    def _value() -> None:
        def body(tokens: Any, there: jax.Array, d_bias: jax.Array) -> jax.Array:
            value = projected(tokens)
            sums, d_value = refs["sums"][tokens], jnp.zeros_like(value)
            for branch in range(m):
                g = refs["g"][branch, tokens].astype(jnp.float32)
                sums += jnp.where(lane == branch, jnp.sum(g * value, axis=1, keepdims=True), 0)
                d_value += refs["stats"][tokens, branch : branch + 1] * g
            refs["sums"][tokens] = sums
            refs["d_projected"][tokens] = d_value.astype(refs["d_projected"].dtype)
            return d_bias + total(d_value, there)

        refs["d_bias"][...] = for_each_chunk(body, nothing)
        refs["d_gain"][...] = nothing

    @pl.when(j == n)
    def _scores() -> None:
        def body(tokens: Any, there: jax.Array, carry: None) -> None:
            stats = refs["stats"][tokens]
            gate, s, r_h, r_key = (stats[:, k * m : (k + 1) * m] for k in range(4))
            d_gate = refs["sums"][tokens][:, :m] + refs["g_gate"][tokens]
            ds = d_gate * slope_of_gate(s, gate)
            refs["sums"][tokens, :m] = ds * r_h * r_key * d**-0.5
            refs["sums"][tokens, m : 2 * m] = ds * s * r_key * r_key * (1 / d)
            refs["sums"][tokens, 2 * m : 3 * m] = ds * s * r_h * r_h * (1 / d)

        for_each_chunk(body)

    @pl.when(j >= n)
    def _keys() -> None:
        gain = refs["gain"][...]
        branch = j // n - 1

        def body(tokens: Any, there: jax.Array, carry: Any) -> Any:
            d_gain, d_bias = carry
            sums = refs["sums"][tokens]
            a, b, c = (
                jnp.sum(jnp.where(lane == branch + k * m, sums, 0), axis=1, keepdims=True)
                for k in range(3)
            )
            key = projected(tokens)
            h = refs["streams"][tokens].astype(jnp.float32)
            d_key = a * h * gain - b * key
            d_h = a * gain * key - c * h
            refs["d_projected"][tokens] = d_key.astype(refs["d_projected"].dtype)
            refs["d_streams"][tokens] = d_h.astype(refs["d_streams"].dtype)
            return d_gain + total(a * h * key, there), d_bias + total(d_key, there)

        refs["d_gain"][...], refs["d_bias"][...] = for_each_chunk(body, (nothing, nothing))
