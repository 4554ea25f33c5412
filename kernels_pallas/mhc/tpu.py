"""mHC before a sub-layer on TPU (Mosaic): the coefficients and the sub-layer's input.

One block of tokens of all streams, [n, tokens, d], is read once. While it is in VMEM:

    logits   x fn on the MXU, without loss: fn is split into three bfloat16 parts (8 bits each of
             float32's 24), which are side by side in the MXU's 128 columns, so all three cost one
             pass; float32 streams are split the same way. The sum of squares on the VPU.
    between  tokens are transposed from sublanes to lanes: [tokens, 128] -> 128 coefficients of
             [tokens / 128, 128], whole registers; sigmoids and Sinkhorn on those (coefficients.py)
    mix      coefficients are transposed to sublanes again; collapsed = sum of pre_j x_j

HBM traffic: streams are read, collapsed is written, and per token post, res and the residuals of
the backward pass: the normalised logits h and r = 1 / rms(x), tokens in lanes.
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
    Width,
    blocks_for,
    dot,
    for_each_columns,
    for_each_rows,
    from_lanes,
    pieces,
    scalars,
    split,
    spread,
    stacked_parts,
    to_lanes,
    to_sublanes,
    total,
)


def vmem(tokens: int, n: int, d: int, size: int) -> int:
    """Approximate bytes of VMEM that `forward` needs."""
    width = Width(n)
    moving = 2 * tokens * ((n + 1) * d * size + 4 * (n + n * n + width.kept))
    scratch = 4 * tokens * (2 * width.stacked + 2 * LANES)
    inner = 8 * tokens * MAX_COLUMNS * (PARTS if size == 4 else 0)
    return moving + scratch + inner + 2 * width.stacked * n * d


def forward(
    x: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    *,
    iterations: int,
    eps: float,
    transpose: bool,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The sub-layer's input, post and res, and the residuals of the backward pass.

    Args:
      x: [n, P, d]; fn: [n d, c] times the gain, base [c], scale [3], float32.

    Returns:
      (collapsed [P, d] in x's dtype; float32 post [n, P], res [n n, P] (rows: target, source),
      kept [Width.kept, P]).
    """
    n, p, d = x.shape
    width = Width(n)
    blocks = blocks or blocks_for("pre", p, n, d, x.dtype.itemsize, vmem)
    bt = blocks.tokens

    def kernel(*refs: Any) -> None:
        names = ("base", "scale", "x", "fn", "collapsed", "post", "res", "kept")
        scratch = ("product", "turned", "made", "columns")
        _kernel(
            dict(zip((*names, *scratch), refs, strict=True)), n=n, d=d, iterations=iterations,
            eps=eps, transpose=transpose, blocks=blocks,
        )  # fmt: skip

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    stacked = stacked_parts(fn, n)
    out_shape = [
        jax.ShapeDtypeStruct((p, d), x.dtype),
        *(jax.ShapeDtypeStruct((k, p), jnp.float32) for k in (n, n * n, width.kept)),
    ]
    parts = 1 if x.dtype == jnp.bfloat16 else PARTS  # of the streams: `split`
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(pl.cdiv(p, bt),),
            in_specs=[
                scalars,
                scalars,
                pl.BlockSpec((n, bt, d), lambda i: (0, i, 0)),
                pl.BlockSpec(
                    (n, width.stacked, d), lambda i: (0, 0, 0), pipeline_mode=pl.Buffered(1)
                ),
            ],
            out_specs=[
                pl.BlockSpec((bt, d), lambda i: (i, 0)),
                *(pl.BlockSpec((k, bt), lambda i: (0, i)) for k in (n, n * n, width.kept)),
            ],
            out_shape=out_shape,
            cost_estimate=cost.estimate(
                2 * p * n * d * width.stacked * parts,
                (base, scale, x, stacked, *out_shape),
                transcendentals=p * width.count,
            ),
            scratch_shapes=[
                pltpu.VMEM((bt, width.stacked), jnp.float32),
                pltpu.VMEM((width.stacked, bt // LANES, LANES), jnp.float32),
                pltpu.VMEM((LANES, bt // LANES, LANES), jnp.float32),
                pltpu.VMEM((bt, LANES), jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
            ),
            interpret=interpret,
            name="mhc_pre",
        )(base, scale, x, stacked)
    )


def _kernel(
    refs: dict[str, Any],
    *,
    n: int,
    d: int,
    iterations: int,
    eps: float,
    transpose: bool,
    blocks: Blocks,
) -> None:
    width = Width(n)
    _products(refs, n, d, blocks)
    to_lanes(refs["product"], refs["turned"])

    turned, made, count = refs["turned"], refs["made"], width.count
    r = lax.rsqrt(turned[width.stacked - 1] * (1 / (n * d)) + eps)
    high, middle, low = (turned[k * width.part : k * width.part + count] for k in range(PARTS))
    h = (low + middle + high) * r[None]
    turned[:count] = h
    turned[count : width.kept] = jnp.broadcast_to(r, (width.kept - count, *r.shape))
    from_lanes(turned, width.kept, refs["kept"])

    z = coefficients.logits_of(h, *scalars(refs, width), n)
    gates = coefficients.sigmoid(z[: 2 * n])
    made[:n] = gates[:n] + eps
    made[n : 2 * n] = 2 * gates[n:]
    matrix = coefficients.softmax(coefficients.matrix_of(z[2 * n :], n, transpose)) + eps
    u, v = coefficients.balance(matrix, iterations, eps)
    made[2 * n : count] = (u[:, None] * matrix * v[None]).reshape(n * n, *r.shape)
    from_lanes(made, n, refs["post"], first=n)
    from_lanes(made, n * n, refs["res"], first=2 * n)

    to_sublanes(made, refs["columns"])
    for_each_rows(blocks.tokens, lambda tokens: _mix(refs, tokens, n, d, blocks.columns))


def _products(refs: dict[str, Any], n: int, d: int, blocks: Blocks) -> None:
    """product [tokens, stacked]: x times the parts of fn; the last lane has the sum of squares."""
    product = refs["product"]
    # bfloat16 streams need no temporaries: a whole stream at once keeps the MXU filled.
    width = d if refs["x"].dtype == jnp.bfloat16 else blocks.columns
    product[...] = jnp.zeros_like(product)
    for j in range(n):

        def multiply(columns: Any, j: int = j) -> None:
            for part in split(refs["x"][j, :, columns]):
                product[...] += dot(part, refs["fn"][j, :, columns], transposed=True)

        for_each_columns(d, width, multiply)

    def squares(tokens: Any) -> None:
        def add(columns: Any, sums: tuple) -> tuple:
            for lanes in pieces(columns, blocks.columns):
                x = [refs["x"][j, tokens, lanes].astype(jnp.float32) for j in range(n)]
                sums = tuple(s + a * a for s, a in zip(sums, x, strict=True))
            return sums

        nothing = (jnp.zeros((ROWS, LANES), jnp.float32),) * n
        sums = total(list(for_each_columns(d, blocks.columns, add, nothing)))
        lane = lax.broadcasted_iota(jnp.int32, (ROWS, product.shape[1]), 1)
        square = jnp.sum(sums, axis=1, keepdims=True)
        product[tokens] = jnp.where(lane == product.shape[1] - 1, square, product[tokens])

    for_each_rows(blocks.tokens, squares)


def _mix(refs: dict[str, Any], tokens: Any, n: int, d: int, width: int) -> None:
    weights = spread(refs["columns"][tokens], range(n))

    def mix(columns: Any) -> None:
        for lanes in pieces(columns, width):
            out = total(
                [w * refs["x"][j, tokens, lanes].astype(jnp.float32) for j, w in enumerate(weights)]
            )
            refs["collapsed"][tokens, lanes] = out.astype(refs["collapsed"].dtype)

    for_each_columns(d, width, mix)
