"""Gradients of mHC before a sub-layer on TPU (Mosaic), in one pass over the streams.

From g, g_post, g_res and g_x, the gradient of the streams from what reads them later, with the
logits h and r = 1 / rms(x) that the forward pass kept:

    g_pre_j = <g, x_j>
    dz      = gradient of z = a h + b: Sinkhorn forward (factors after every step stay in VMEM)
              and back, sigmoids (coefficients.py)
    dbase_c = sum dz_c;  dscale = sums dz_c h_c;  e_c = a dz_c r
    dx_j    = pre_j g + sum_c e_c fn_jc - (sum_c e_c h_c) r x_j / (n d) + g_x_j
    dfn_jc  = sum over tokens of e_c x_j

Both products run on the MXU in bfloat16 parts as in tpu.py. Gradients of parameters are summed in
float32 over the blocks of each half of the grid: the halves may run on two cores (v5p).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.mhc import coefficients
from kernels_pallas.mhc.tpu_blocks import (
    LANES,
    MAX_COLUMNS,
    PARTS,
    ROWS,
    Blocks,
    Passes,
    Width,
    blocks_for,
    dot,
    for_each_columns,
    for_each_rows,
    from_lanes,
    into_lanes,
    parts_for_dx,
    pieces,
    scalars,
    split,
    spread,
    stacked_parts,
    to_lanes,
    to_sublanes,
    tops,
    total,
)


def vmem(tokens: int, n: int, d: int, size: int) -> int:
    """Approximate bytes of VMEM that `backward` needs (20 iterations)."""
    width = Width(n)
    moving = 2 * tokens * ((3 * n + 1) * d * size + 4 * (n + n * n + width.kept))
    across = 4 * max(8 * LANES, tokens)  # one number per token
    scratch = across * (2 * LANES + width.stacked + 40 * n)
    turned = 2 * tokens * width.stacked * (len(parts_for_dx(size)[1]) + 1) + 8 * tokens * LANES
    inner = 4 * n * tokens * MAX_COLUMNS + (16 * tokens * MAX_COLUMNS if size == 4 else 0)
    return moving + scratch + turned + inner + 2 * n * d * (width.stacked + 4 * width.part)


def backward(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    kept: jax.Array,
    g: jax.Array,
    g_post: jax.Array,
    g_res: jax.Array,
    g_x: jax.Array,
    *,
    iterations: int,
    eps: float,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of x, fn, base and scale.

    Args:
      x: [n, P, d]; fn, base, scale: as in tpu.forward; kept: from tpu.forward; g: [P, d];
      g_post: float32 [n, P]; g_res: float32 [n n, P]; g_x: [n, P, d] in x's dtype.

    Returns:
      (dx [n, P, d] in x's dtype; float32 dfn [n d, c], dbase [c], dscale [3]).
    """
    n, p, d = x.shape
    width, size = Width(n), x.dtype.itemsize
    of_fn, passes = parts_for_dx(size)
    blocks = blocks or blocks_for("pre_backward", p, n, d, size, vmem)
    bt = blocks.tokens
    count = pl.cdiv(p, bt)
    halves = min(2, count)
    steps = pl.cdiv(count, halves)

    def kernel(*refs: Any) -> None:
        names = (
            *("base", "scale", "x", "fn", "kept", "g", "g_post", "g_res", "g_x"),
            *("dx", "dfn", "sums"),
            *("lanes", "made", "stack", "factors", "columns", "e_tokens", "e_columns", "partial"),
        )
        named = dict(zip(names, refs, strict=True))
        _kernel(named, n, p, d, steps, iterations, eps, transpose, passes, blocks)

    def token_block(half: Any, step: Any) -> Any:
        return jnp.minimum(half * steps + step, count - 1)

    def rows(k: int) -> pl.BlockSpec:
        return pl.BlockSpec((k, bt), lambda h, s: (0, token_block(h, s)))

    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    streams = pl.BlockSpec((n, bt, d), lambda h, s: (0, token_block(h, s), 0))
    groups, lanes = bt // LANES, jnp.float32
    operands = base, scale, x, stacked_parts(fn, n, of_fn), kept, g, g_post, g_res, g_x
    out_shape = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((halves, n, width.part, d), jnp.float32),
        jax.ShapeDtypeStruct((halves, 2 * width.part, LANES), jnp.float32),
    ]
    e_rows = pl.cdiv(PARTS * width.part, ROWS) * ROWS
    parts = 1 if x.dtype == jnp.bfloat16 else PARTS  # of the streams: `split`
    dx, dfn, sums = pl.pallas_call(
        kernel,
        grid=(halves, steps),
        in_specs=[
            in_smem,
            in_smem,
            streams,
            pl.BlockSpec(
                (n, width.stacked, d), lambda h, s: (0, 0, 0), pipeline_mode=pl.Buffered(1)
            ),
            rows(width.kept),
            pl.BlockSpec((bt, d), lambda h, s: (token_block(h, s), 0)),
            rows(n),
            rows(n * n),
            streams,
        ],
        out_specs=[
            streams,
            pl.BlockSpec((None, n, width.part, d), lambda h, s: (h, 0, 0, 0)),
            pl.BlockSpec((None, 2 * width.part, LANES), lambda h, s: (h, 0, 0)),
        ],
        out_shape=out_shape,
        cost_estimate=cost.estimate(
            2 * p * n * d * (width.stacked * len(passes) + e_rows * parts),
            (*operands, *out_shape),
            transcendentals=p * width.count,
        ),
        scratch_shapes=[
            pltpu.VMEM((LANES, groups, LANES), lanes),
            pltpu.VMEM((LANES, groups, LANES), lanes),
            pltpu.VMEM((width.stacked, groups, LANES), lanes),
            pltpu.VMEM((iterations, 2 * n, groups, LANES), lanes),
            pltpu.VMEM((bt, LANES), lanes),
            pltpu.VMEM((e_rows, bt), jnp.bfloat16),
            pltpu.VMEM((len(passes), bt, width.stacked), jnp.bfloat16),
            pltpu.VMEM((n, bt, blocks.columns), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret,
        name="mhc_pre_backward",
    )(*operands)
    c = width.count
    dfn = jnp.moveaxis(dfn.sum(0)[:, :c], 1, 2).reshape(n * d, c)
    dbase, times_h = sums.sum((0, 2)).reshape(2, width.part)[:, :c]
    dscale = jnp.stack([times_h[:n].sum(), times_h[n : 2 * n].sum(), times_h[2 * n :].sum()])
    return dx, dfn, dbase, dscale


def _kernel(
    refs: dict[str, Any],
    n: int,
    p: int,
    d: int,
    steps: int,
    iterations: int,
    eps: float,
    transpose: bool,
    passes: Passes,
    blocks: Blocks,
) -> None:
    step = pl.program_id(1)
    left = p - (pl.program_id(0) * steps + step) * blocks.tokens
    ragged = p % blocks.tokens != 0

    @pl.when(step == 0)
    def _start() -> None:
        refs["dfn"][...] = jnp.zeros_like(refs["dfn"])
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    @pl.when(left > 0)  # else the halves differ, and this is the last block again: its dx is done
    def _block() -> None:
        for_each_rows(blocks.tokens, lambda tokens: _products(refs, tokens, n, d, blocks.columns))
        _coefficients(refs, n, d, left, iterations, eps, transpose, passes)
        for_each_columns(
            d, blocks.columns, lambda columns: _gradients(refs, columns, n, left, ragged, blocks)
        )


def _gradients(
    refs: dict[str, Any], columns: Any, n: int, left: jax.Array, ragged: bool, blocks: Blocks
) -> None:
    """dx of some columns, and their contribution to dfn."""
    part = Width(n).part
    for j in range(n):
        fn, out = refs["fn"][j, :, columns], refs["partial"].at[j]
        out[...] = dot(refs["e_columns"][0], fn)
        for k in range(1, refs["e_columns"].shape[0]):
            out[...] += dot(refs["e_columns"][k], fn)
        x = refs["x"][j, :, columns]
        if ragged:  # 0 times the values after the last token could be NaN
            x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < left, x, 0)
        for x_part in split(x):
            products = dot(refs["e_tokens"][...], x_part)
            refs["dfn"][j, :, columns] += total(
                [products[k * part : (k + 1) * part] for k in reversed(range(PARTS))]
            )
    for_each_rows(blocks.tokens, lambda tokens: _dx(refs, tokens, columns, n, blocks.columns))


def _products(refs: dict[str, Any], tokens: Any, n: int, d: int, width: int) -> None:
    """Write <g, x_j> to lane j of `columns`."""

    def add(columns: Any, sums: tuple) -> tuple:
        for lanes in pieces(columns, width):
            g = refs["g"][tokens, lanes].astype(jnp.float32)
            sums = tuple(
                s + g * refs["x"][j, tokens, lanes].astype(jnp.float32) for j, s in enumerate(sums)
            )
        return sums

    sums = for_each_columns(d, width, add, (jnp.zeros((ROWS, LANES), jnp.float32),) * n)
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    out = jnp.zeros((ROWS, LANES), jnp.float32)
    for j, s in enumerate(sums):
        out = jnp.where(lane == j, jnp.sum(s, axis=1, keepdims=True), out)
    refs["columns"][tokens] = out


def _coefficients(
    refs: dict[str, Any],
    n: int,
    d: int,
    left: jax.Array,
    iterations: int,
    eps: float,
    transpose: bool,
    passes: Passes,
) -> None:
    """From gradients of the coefficients to those of the logits.

    Writes e to `e_tokens` and `e_columns`, pre and the factor of x to `columns`, and adds to
    `sums`.
    """
    width, lanes, made = Width(n), refs["lanes"], refs["made"]
    count, (base, scale) = width.count, scalars(refs, width)
    into_lanes(refs["kept"], made)
    h, r = made[:count], made[width.kept - 1]
    z = coefficients.logits_of(h, base, scale, n)
    to_lanes(refs["columns"], lanes)
    into_lanes(refs["g_post"], lanes, first=n)
    into_lanes(refs["g_res"], lanes, first=2 * n)

    gates = coefficients.sigmoid(z[: 2 * n])
    slope = gates * (1 - gates)
    d_pre, d_post = lanes[:n] * slope[:n], 2 * lanes[n : 2 * n] * slope[n:]
    logits = coefficients.matrix_of(z[2 * n :], n, transpose)
    g_res = lanes[2 * n : count].reshape(logits.shape)
    mixing = coefficients.sinkhorn_backward(refs["factors"], logits, g_res, iterations, eps)
    dz = jnp.concatenate([d_pre, d_post, coefficients.entries_of(mixing, transpose)])

    token = lax.broadcasted_iota(jnp.int32, dz.shape, 1) * LANES
    there = token + lax.broadcasted_iota(jnp.int32, dz.shape, 2) < left
    for first, x in ((0, dz), (width.part, dz * h)):
        refs["sums"][first : first + count] += jnp.sum(jnp.where(there, x, 0), axis=1)
    of_logits = jnp.stack([scale[coefficients.group(c, n)] * dz[c] for c in range(count)])

    lanes[:n] = gates[:n] + eps
    lanes[n] = jnp.sum(of_logits * h, axis=0) * r * r * (1 / (n * d))
    to_sublanes(lanes, refs["columns"])
    _stack_parts(refs, jnp.where(there, of_logits * r[None], 0), width, passes)


def _stack_parts(refs: dict[str, Any], e: jax.Array, width: Width, passes: Passes) -> None:
    """Write e_tokens [rows, tokens]: the three parts of e; e_columns[k] [tokens, stacked]: those of
    pass k."""
    stack, parts = refs["stack"], tops(e)
    stack[...] = jnp.zeros_like(stack)

    def fill(which: tuple[int, ...]) -> None:
        for k, part in enumerate(which):
            stack[k * width.part : k * width.part + width.count] = parts[part]

    fill((0, 1, 2))
    from_lanes(stack, refs["e_tokens"].shape[0], refs["e_tokens"])
    for k, which in enumerate(passes):
        fill(which)
        to_sublanes(stack, refs["e_columns"].at[k])


def _dx(refs: dict[str, Any], tokens: Any, columns: Any, n: int, width: int) -> None:
    *pre, along = spread(refs["columns"][tokens], range(n + 1))
    for k, lanes in enumerate(pieces(columns, width)):
        g = refs["g"][tokens, lanes].astype(jnp.float32)
        for j in range(n):
            x = refs["x"][j, tokens, lanes].astype(jnp.float32)
            out = refs["partial"][j, tokens, k * LANES : (k + 1) * LANES]
            out += pre[j] * g - along * x + refs["g_x"][j, tokens, lanes].astype(jnp.float32)
            refs["dx"][j, tokens, lanes] = out.astype(refs["dx"].dtype)
