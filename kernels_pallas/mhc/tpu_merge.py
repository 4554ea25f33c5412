"""mHC after a sub-layer on TPU (Mosaic): out_i = sum_j res_ij x_j + post_i y, and its gradients.

Both read a block of tokens of all arrays once. Coefficients have tokens in lanes, are transposed
once per block, and broadcast over registers once per 16 tokens; the rest is elementwise.

Backward, with g = d loss / d out:

    dx_j = sum_i res_ij g_i;  dy = sum_i post_i g_i;  dpost_i = <g_i, y>;  dres_ij = <g_i, x_j>

in two passes over the block in VMEM: coefficients fill the registers in the first, sums in the
second.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.mhc.tpu_blocks import (
    LANES,
    ROWS,
    Blocks,
    blocks_for,
    for_each_columns,
    for_each_rows,
    from_lanes,
    into_lanes,
    pieces,
    spread,
    to_lanes,
    to_sublanes,
    total,
)

SUMS = 20  # products that a pass over columns sums at once: 2 registers each, of 64


def vmem(tokens: int, n: int, d: int, size: int) -> int:
    """Approximate bytes of VMEM that `forward` needs; y may be float32 where streams are not."""
    return 2 * tokens * (d * (2 * n * size + 4) + 4 * (n + n * n)) + 8 * tokens * LANES


def vmem_backward(tokens: int, n: int, d: int, size: int) -> int:
    """Approximate bytes of VMEM that `backward` needs."""
    return 2 * tokens * (d * (3 * n * size + 8) + 8 * (n + n * n)) + 8 * tokens * LANES


def forward(
    x: jax.Array,
    y: jax.Array,
    post: jax.Array,
    res: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Streams x [n, P, d], y [P, d], post float32 [n, P], res float32 [n n, P] -> [n, P, d]."""
    n, p, d = x.shape

    blocks = blocks or blocks_for("merge", p, n, d, x.dtype.itemsize, vmem)
    bt = blocks.tokens
    streams, one, rows = _specs(n, d, bt)

    def kernel(*refs: Any) -> None:
        names = ("x", "y", "post", "res", "out", "lanes", "columns")
        _forward_kernel(dict(zip(names, refs, strict=True)), n, d, blocks)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(p, bt),),
        in_specs=[streams, one, rows(n), rows(n * n)],
        out_specs=streams,
        out_shape=jax.ShapeDtypeStruct((n, p, d), x.dtype),
        cost_estimate=cost.estimate(2 * p * d * n * (n + 1), (x, y, post, res, x)),
        scratch_shapes=_scratch(bt),
        compiler_params=_params(),
        interpret=interpret,
        name="mhc_merge",
    )(x, y, post, res)


def backward(
    x: jax.Array,
    y: jax.Array,
    post: jax.Array,
    res: jax.Array,
    g: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients (dx [n, P, d], dy [P, d], dpost [n, P], dres [n n, P]) from g [n, P, d]."""
    n, p, d = x.shape

    blocks = blocks or blocks_for("merge_backward", p, n, d, x.dtype.itemsize, vmem_backward)
    bt = blocks.tokens
    streams, one, rows = _specs(n, d, bt)

    def kernel(*refs: Any) -> None:
        names = ("x", "y", "post", "res", "g", "dx", "dy", "dpost", "dres", "lanes", "columns")
        _backward_kernel(dict(zip(names, refs, strict=True)), n, d, blocks)

    return tuple(
        pl.pallas_call(
            kernel,
            grid=(pl.cdiv(p, bt),),
            in_specs=[streams, one, rows(n), rows(n * n), streams],
            out_specs=[streams, one, rows(n), rows(n * n)],
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y, post, res)],
            cost_estimate=cost.estimate(
                4 * p * d * n * (n + 1), (x, y, post, res, g, x, y, post, res)
            ),
            scratch_shapes=_scratch(bt),
            compiler_params=_params(),
            interpret=interpret,
            name="mhc_merge_backward",
        )(x, y, post, res, g)
    )


def _specs(n: int, d: int, bt: int) -> tuple[pl.BlockSpec, pl.BlockSpec, Any]:
    return (
        pl.BlockSpec((n, bt, d), lambda i: (0, i, 0)),
        pl.BlockSpec((bt, d), lambda i: (i, 0)),
        lambda k: pl.BlockSpec((k, bt), lambda i: (0, i)),
    )


def _scratch(bt: int) -> list[Any]:
    return [
        pltpu.VMEM((LANES, bt // LANES, LANES), jnp.float32),
        pltpu.VMEM((bt, LANES), jnp.float32),
    ]


def _params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_limit()
    )


def _turn(refs: dict[str, Any], n: int) -> None:
    """columns [tokens, 128]: res_ij in lane n i + j, then post_i."""
    into_lanes(refs["res"], refs["lanes"])
    into_lanes(refs["post"], refs["lanes"], first=n * n)
    to_sublanes(refs["lanes"], refs["columns"])


def _forward_kernel(refs: dict[str, Any], n: int, d: int, blocks: Blocks) -> None:
    _turn(refs, n)

    def rows(tokens: Any) -> None:
        spreads = spread(refs["columns"][tokens], range(n * n + n))

        def columns(columns: Any) -> None:
            for lanes in pieces(columns, blocks.columns):
                x = [refs["x"][j, tokens, lanes].astype(jnp.float32) for j in range(n)]
                y = refs["y"][tokens, lanes].astype(jnp.float32)
                for i in range(n):
                    terms = [spreads[n * i + j] * x[j] for j in range(n)]
                    out = total([*terms, spreads[n * n + i] * y])
                    refs["out"][i, tokens, lanes] = out.astype(refs["out"].dtype)

        for_each_columns(d, blocks.columns, columns)

    for_each_rows(blocks.tokens, rows)


def _backward_kernel(refs: dict[str, Any], n: int, d: int, blocks: Blocks) -> None:
    _turn(refs, n)

    def streams(tokens: Any) -> None:
        spreads = spread(refs["columns"][tokens], range(n * n + n))

        def columns(columns: Any) -> None:
            for lanes in pieces(columns, blocks.columns):
                g = [refs["g"][i, tokens, lanes].astype(jnp.float32) for i in range(n)]
                dy = total([spreads[n * n + i] * g[i] for i in range(n)])
                refs["dy"][tokens, lanes] = dy.astype(refs["dy"].dtype)
                for j in range(n):
                    dx = total([spreads[n * i + j] * g[i] for i in range(n)])
                    refs["dx"][j, tokens, lanes] = dx.astype(refs["dx"].dtype)

        for_each_columns(d, blocks.columns, columns)

    for_each_rows(blocks.tokens, streams)
    # The coefficients are no longer needed: the sums reuse their buffers.
    together = max(1, min(n, SUMS // (n + 1)))
    for first in range(0, n, together):
        targets = range(first, min(n, first + together))
        for_each_rows(blocks.tokens, lambda tokens, t=targets: _sums(refs, tokens, t, n, d, blocks))
    to_lanes(refs["columns"], refs["lanes"])
    from_lanes(refs["lanes"], n * n, refs["dres"])
    from_lanes(refs["lanes"], n, refs["dpost"], first=n * n)


def _sums(
    refs: dict[str, Any], tokens: Any, targets: range, n: int, d: int, blocks: Blocks
) -> None:
    """Write <g_i, x_j> and <g_i, y> of targets i to the lanes of their coefficients."""

    def columns(columns: Any, sums: tuple) -> tuple:
        for lanes in pieces(columns, blocks.columns):
            x = [refs["x"][j, tokens, lanes].astype(jnp.float32) for j in range(n)]
            x.append(refs["y"][tokens, lanes].astype(jnp.float32))
            g = [refs["g"][i, tokens, lanes].astype(jnp.float32) for i in targets]
            products = [a * b for a in g for b in x]
            sums = tuple(s + a for s, a in zip(sums, products, strict=True))
        return sums

    nothing = (jnp.zeros((ROWS, LANES), jnp.float32),) * (len(targets) * (n + 1))
    sums = for_each_columns(d, blocks.columns, columns, nothing)
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    out = refs["columns"][tokens]
    for k, s in enumerate(sums):
        i, j = targets[k // (n + 1)], k % (n + 1)
        place = n * i + j if j < n else n * n + i
        out = jnp.where(lane == place, jnp.sum(s, axis=1, keepdims=True), out)
    refs["columns"][tokens] = out
