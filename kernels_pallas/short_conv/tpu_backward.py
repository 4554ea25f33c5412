"""The short convolution on TPU, backward (Mosaic): from u and the gradient g of the output.

With x = u r the rows divided by their root mean square, f = taps * gain / 2 and h the convolution
of x with f, so that out = u + h (1 + tanh h), which is recomputed:

    dh     = g (1 + t) (1 + h (1 - t)),  t = tanh h
    df_k   = sum over tokens i of dh[i] x[i - back_k]
    dx[i]  = sum over k of f_k dh[i + back_k]
    du     = g + r (dx - x mean(dx x))

each term only where the tap is open. The grid is the forward pass's with the blocks in reverse
order: dh of the following tokens is still in VMEM, as are their bits; the preceding rows are a
short second block of u. So u and g are read and du is written once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.short_conv import openings
from kernels_pallas.short_conv.tpu import (
    LANES,
    SUBLANES,
    Blocks,
    blocks_for,
    down_the_rows,
    for_each_column,
    history_rows,
    reciprocal_rms,
    when_open,
)


def backward(
    u: jax.Array,
    filters: jax.Array,
    bits: jax.Array,
    g: jax.Array,
    *,
    dilation: int,
    eps: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of u and, in float32, of the filters.

    Args:
      u: [M, B, T, d]; filters: [M, K, d], half the taps times the gain; bits: int32 [B, T]: as in
        tpu.forward.
      g: [M, B, T, d], the gradient of the output.

    Returns:
      ([M, B, T, d] in the dtype of u, [M, K, d]).
    """
    m, b, t, d = u.shape
    kernel = filters.shape[1]
    size = max(u.dtype.itemsize, g.dtype.itemsize)
    before = history_rows(kernel, dilation)
    blocks = blocks or blocks_for(t, before, d, size, backward=True)
    n = pl.cdiv(t, blocks.tokens)
    bits = openings.padded(bits, blocks.tokens)
    full = openings.all_open(bits, blocks.chunk, kernel)
    # A chunk needs the bits of the next one, too: those of the tokens that reach into it.
    full &= jnp.pad(full, ((0, 0), (0, 1)))[:, 1:]
    tokens = pl.BlockSpec((None, None, blocks.tokens, d), lambda b, m, i: (m, b, n - 1 - i, 0))

    def earlier(b: Any, m: Any, i: Any) -> tuple:
        return m, b, jnp.maximum((n - 1 - i) * (blocks.tokens // before) - 1, 0), 0

    operands = {
        "full": (full.reshape(-1), pl.BlockSpec(memory_space=pltpu.SMEM)),
        "bits": (
            bits[:, None],
            pl.BlockSpec((None, 1, blocks.tokens), lambda b, m, i: (b, 0, n - 1 - i)),
        ),
        "u": (u, tokens),
        "earlier": (u, pl.BlockSpec((None, None, before, d), earlier)),
        "g": (g, tokens),
        "filters": (
            filters.astype(jnp.float32),
            pl.BlockSpec((None, kernel, d), lambda b, m, i: (m, 0, 0)),
        ),
    }
    columns, rows = d // LANES, blocks.tokens + before
    scratch = {
        "x": pltpu.VMEM((columns, rows, LANES), jnp.float32),  # rows before, then the block's
        "dh": pltpu.VMEM((columns, rows, LANES), jnp.float32),  # the block's, then rows after
        "dx": pltpu.VMEM((columns, blocks.chunk, LANES), jnp.float32),
        "df": pltpu.VMEM((columns, kernel * SUBLANES, LANES), jnp.float32),
        "r": pltpu.VMEM((blocks.tokens, LANES), jnp.float32),
        "open": pltpu.VMEM((rows, LANES), jnp.int32),
    }
    names = (*operands, "du", "d_filters", *scratch)

    def program(*refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        _backward(refs, before=before, dilation=dilation, eps=eps, chunk=blocks.chunk)

    out_shape = [
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((b, m, kernel, d), jnp.float32),
    ]
    again = {"bits": m, "filters": b}  # for every stream, for every sequence
    rows_before = jax.ShapeDtypeStruct((m, b, n * before, d), u.dtype)  # of "earlier": of u
    arrays = {name: array for name, (array, _) in operands.items()} | {"earlier": rows_before}
    du, d_filters = pl.pallas_call(
        program,
        grid=(b, m, n),
        in_specs=[spec for _, spec in operands.values()],
        out_specs=[
            tokens,
            pl.BlockSpec((None, None, kernel, d), lambda b, m, i: (b, m, 0, 0)),
        ],
        out_shape=out_shape,
        cost_estimate=cost.estimate(
            6 * kernel * u.size,  # the convolution again, its transpose, the filters
            out_shape,
            *((array, again.get(name, 1)) for name, array in arrays.items()),
            transcendentals=u.size,
        ),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem_limit(),
        ),
        interpret=interpret,
        name="short_conv_backward",
    )(*(array for array, _ in operands.values()))
    return du, jnp.sum(d_filters, axis=0)


def _backward(refs: dict[str, Any], *, before: int, dilation: int, eps: float, chunk: int) -> None:
    b, i, n = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    block, d = refs["u"].shape
    kernel = refs["filters"].shape[0]
    backs = [(kernel - 1 - k) * dilation for k in range(kernel)]
    x, dh, dx, df, open_ = (refs[name] for name in ("x", "dh", "dx", "df", "open"))
    chunks = block // chunk

    @pl.when(i == 0)
    def _begin() -> None:
        open_[block:] = jnp.zeros((before, LANES), jnp.int32)
        df[...] = jnp.zeros_like(df)

    @pl.when(i > 0)
    def _continue() -> None:
        open_[block:] = open_[:before]

        def keep(j: jax.Array, lanes: Any) -> None:
            dh[j, block:] = dh[j, :before]

        for_each_column(d, keep)

    open_[:block] = down_the_rows(refs["bits"][...])

    def normalise(u: Any, rows: Any, start: Any) -> jax.Array:
        r = reciprocal_rms(u, rows, eps)

        def column(j: jax.Array, lanes: Any) -> None:
            x[j, pl.ds(start, rows.size)] = u[rows, lanes].astype(jnp.float32) * r

        for_each_column(d, column)
        return r

    normalise(refs["earlier"], pl.ds(0, before), 0)

    def normalise_chunk(c: jax.Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        refs["r"][rows] = normalise(refs["u"], rows, before + rows.start)

    lax.fori_loop(0, chunks, normalise_chunk, None)

    def step(c: jax.Array, carry: None) -> None:
        first = pl.multiple_of((chunks - 1 - c) * chunk, chunk)
        rows = pl.ds(first, chunk)

        def compute(bits: jax.Array | None) -> None:
            def convolve(j: jax.Array, lanes: Any) -> None:
                past = [
                    when_open(bits, k, x[j, pl.ds(before + first - back, chunk)])
                    for k, back in enumerate(backs)
                ]
                h = sum(p * refs["filters"][k : k + 1, lanes] for k, p in enumerate(past))
                t = jnp.tanh(h)
                g = refs["g"][rows, lanes].astype(jnp.float32)
                # 0 for masked tokens, and for those past the end, whose g is undefined.
                own = when_open(bits, kernel, g * (1 + t) * (1 + h * (1 - t)))
                dh[j, rows] = own
                for k, p in enumerate(past):
                    parts = (own * p).reshape(chunk // SUBLANES, SUBLANES, LANES)
                    df[j, k * SUBLANES : (k + 1) * SUBLANES] += jnp.sum(parts, axis=0)

            for_each_column(d, convolve)

            def transposed(j: jax.Array, lanes: Any, total: jax.Array) -> jax.Array:
                def reached(k: int, back: int) -> jax.Array:
                    later = pl.ds(first + back, chunk)
                    there = None if bits is None else open_[later]
                    return when_open(there, k, dh[j, later]) * refs["filters"][k : k + 1, lanes]

                out = dx[j] = sum(reached(k, back) for k, back in enumerate(backs))
                return total + out * x[j, pl.ds(before + first, chunk)]

            total = for_each_column(d, transposed, jnp.zeros((chunk, LANES), jnp.float32))
            mean = jnp.sum(total, axis=1, keepdims=True) * (1 / d)
            r = refs["r"][rows]

            def write(j: jax.Array, lanes: Any) -> None:
                along = x[j, pl.ds(before + first, chunk)] * mean
                g = when_open(bits, kernel, refs["g"][rows, lanes].astype(jnp.float32))
                du = g + r * (dx[j] - along)
                refs["du"][rows, lanes] = du.astype(refs["du"].dtype)

            for_each_column(d, write)

        full = refs["full"][(b * n + n - 1 - i) * chunks + chunks - 1 - c] > 0
        pl.when(full)(lambda: compute(None))
        pl.when(jnp.logical_not(full))(lambda: compute(open_[rows]))

    lax.fori_loop(0, chunks, step, None)

    @pl.when(i == n - 1)
    def _finish() -> None:
        def total(j: jax.Array, lanes: Any) -> None:
            for k in range(kernel):
                part = df[j, k * SUBLANES : (k + 1) * SUBLANES]
                refs["d_filters"][k : k + 1, lanes] = jnp.sum(part, axis=0, keepdims=True)

        for_each_column(d, total)
