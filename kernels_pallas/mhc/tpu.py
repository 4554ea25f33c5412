"""mHC in front of a sub-layer on TPU (Mosaic): coefficients and what the sub-layer reads.

One block of tokens of all streams, [n, tokens, d], is read once. While it lies in VMEM:

    logits   x fn on the MXU, without a loss: fn is cut into three bfloat16 parts (8 bits each of
             float32's 24), which lie side by side in the MXU's 128 columns, so all three cost one
             pass; float32 streams are cut the same way. The sum of squares on the VPU.
    between  tokens go from sublanes to lanes: [tokens, 128] -> 128 coefficients of [tokens / 128,
             128], whole registers; sigmoids and Sinkhorn on those (coefficients.py)
    mix      coefficients go back to sublanes; collapsed = sum of pre_j x_j

In HBM: streams are read, collapsed written, and per token post, res and what the backward pass
keeps: the normalised logits h and r = 1 / rms(x), tokens in lanes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuning
from kernels_pallas.mhc import coefficients

LANES = 128
ROWS = 16  # tokens of an elementwise step: one register of bfloat16
PARTS = 3
MAX_STREAMS = 8
MAX_COLUMNS = 512
MAX_TOKENS = 256  # longer ones would leave too few steps to hide the first and last transfer in


@dataclass(frozen=True)
class Blocks:
    """tokens: of a grid step, a multiple of 128; columns: of an inner step, divide d."""

    tokens: int
    columns: int


@dataclass(frozen=True)
class Width:
    """Rows that the coefficients of n streams take: count = 2 n + n^2 of them.

    part: of one bfloat16 part of fn (a multiple of 8); stacked: of all three and a last row for
    the sum of squares (a multiple of 128); kept: of h and, last, r.
    """

    n: int

    @property
    def count(self) -> int:
        return 2 * self.n + self.n**2

    @property
    def part(self) -> int:
        return _up(self.count, 8)

    @property
    def stacked(self) -> int:
        return _up(PARTS * self.part + 1, LANES)

    @property
    def kept(self) -> int:
        return _up(self.count + 1, 8)


def _up(x: int, multiple: int) -> int:
    return pl.cdiv(x, multiple) * multiple


def limit(n: int, d: int, iterations: int, *dtypes: Any) -> str | None:
    """Why the kernels cannot take such arguments, None if they can."""
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"{dtype} is not float32 or bfloat16"
    if d % LANES:
        return f"d = {d} is not a multiple of {LANES}"
    if not 1 <= n <= MAX_STREAMS:
        return f"{n} streams are not 1 to {MAX_STREAMS}"
    if iterations < 1:
        return f"{iterations} Sinkhorn iterations are less than 1"
    return None


def blocks_for(
    op: str, tokens: int, n: int, d: int, size: int, bytes_of: Callable[[int], int]
) -> Blocks:
    """Tuned blocks, else the longest block of tokens that fits VMEM.

    Args:
      op: "pre", "pre_backward", ...; size: bytes of a stream's number; bytes_of: VMEM for a block
        of so many tokens.
    """
    found = tuning.tuned("mhc", f"{op}_n{n}_d{d}_{size}")
    if found:
        return Blocks(**found)
    block = LANES
    while block < min(MAX_TOKENS, tokens) and bytes_of(2 * block) < tuning.vmem_limit():
        block *= 2
    return Blocks(block, math.gcd(d, MAX_COLUMNS))


def split(x: jax.Array, parts: int = PARTS) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x: three hold all bits of float32, one those of bfloat16."""
    return [x] if x.dtype == jnp.bfloat16 else [a.astype(jnp.bfloat16) for a in tops(x, parts)]


def tops(x: jax.Array, parts: int = PARTS) -> list[jax.Array]:
    """float32 x as a sum of float32 arrays with at most 8 significant bits each.

    By masking bits: the compiler may leave out a rounding to bfloat16 and back.
    """
    out = []
    for _ in range(parts):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        out.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - out[-1]
    return out


def stacked_parts(fn: jax.Array, n: int) -> jax.Array:
    """fn float32 [n d, c] -> bfloat16 [n, stacked, d]: its three parts in rows of their own."""
    width = Width(n)
    turned = jnp.moveaxis(fn.reshape(n, -1, width.count), -1, 1)
    turned = jnp.pad(turned, ((0, 0), (0, width.part - width.count), (0, 0)))
    parts = jnp.concatenate(split(turned), axis=1)
    return jnp.pad(parts, ((0, 0), (0, width.stacked - parts.shape[1]), (0, 0)))


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
    """The sub-layer's input, post and res, and what the backward pass keeps.

    Args:
      x: [n, P, d]; fn: [n d, c] with the gain in it, base [c], scale [3], float32.

    Returns:
      (collapsed [P, d] in x's dtype; float32 post [n, P], res [n n, P] (rows: target, source),
      kept [Width.kept, P]).
    """
    n, p, d = x.shape
    width, size = Width(n), x.dtype.itemsize

    def bytes_of(tokens: int) -> int:
        moving = 2 * tokens * ((n + 1) * d * size + 4 * (n + n * n + width.kept))
        scratch = 4 * tokens * (2 * width.stacked + 2 * LANES)
        inner = 8 * tokens * MAX_COLUMNS * (PARTS if size == 4 else 0)
        return moving + scratch + inner + 2 * width.stacked * n * d

    blocks = blocks or blocks_for("pre", p, n, d, size, bytes_of)
    bt = blocks.tokens

    def kernel(*refs: Any) -> None:
        names = ("base", "scale", "x", "fn", "collapsed", "post", "res", "kept")
        scratch = ("product", "turned", "made", "columns")
        _kernel(
            dict(zip((*names, *scratch), refs, strict=True)), n=n, d=d, iterations=iterations,
            eps=eps, transpose=transpose, blocks=blocks,
        )  # fmt: skip

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
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
            out_shape=[
                jax.ShapeDtypeStruct((p, d), x.dtype),
                *(jax.ShapeDtypeStruct((k, p), jnp.float32) for k in (n, n * n, width.kept)),
            ],
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
        )(base, scale, x, stacked_parts(fn, n))
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
    """product [tokens, stacked]: x times the parts of fn; in the last lane the sum of squares."""
    product = refs["product"]
    product[...] = jnp.zeros_like(product)
    for j in range(n):

        def multiply(columns: Any, j: int = j) -> None:
            for part in split(refs["x"][j, :, columns]):
                product[...] += dot(part, refs["fn"][j, :, columns], transposed=True)

        for_each_columns(d, blocks.columns, multiply)

    def squares(tokens: Any) -> None:
        def add(columns: Any, sums: jax.Array) -> jax.Array:
            for j in range(n):
                for lanes in pieces(columns, blocks.columns):
                    x = refs["x"][j, tokens, lanes].astype(jnp.float32)
                    sums += x * x
            return sums

        sums = for_each_columns(d, blocks.columns, add, jnp.zeros((ROWS, LANES), jnp.float32))
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


# What the kernels share. A number per token lies in lanes (coefficient, tokens / 128, 128) or in
# sublanes (tokens, coefficient).


def total(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a b, or a b^T, of bfloat16 arrays, summed in float32."""
    contract = ((1,), (1,)) if transposed else ((1,), (0,))
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def scalars(refs: dict[str, Any], width: Width) -> tuple[list[jax.Array], list[jax.Array]]:
    """(base, scale) as scalars."""
    return [refs["base"][c] for c in range(width.count)], [refs["scale"][k] for k in range(3)]


def to_lanes(sublanes: Any, lanes: Any) -> None:
    for k in range(lanes.shape[1]):
        lanes[:, k, :] = sublanes[k * LANES : (k + 1) * LANES, :].T


def to_sublanes(lanes: Any, sublanes: Any) -> None:
    for k in range(lanes.shape[1]):
        sublanes[k * LANES : (k + 1) * LANES, :] = lanes[:, k, :].T.astype(sublanes.dtype)


def from_lanes(lanes: Any, count: int, out: Any, first: int = 0) -> None:
    """Coefficients first .. first + count to rows of a block [count, tokens]."""
    for k in range(lanes.shape[1]):
        rows = lanes[first : first + count, k, :]
        out[:, k * LANES : (k + 1) * LANES] = rows.astype(out.dtype)


def into_lanes(block: Any, lanes: Any, first: int = 0) -> None:
    """The reverse of from_lanes."""
    for k in range(lanes.shape[1]):
        lanes[first : first + block.shape[0], k, :] = block[:, k * LANES : (k + 1) * LANES]


def for_each_rows(tokens: int, body: Callable[[Any], None]) -> None:
    def step(k: jax.Array, carry: None) -> None:
        body(pl.ds(pl.multiple_of(k * ROWS, ROWS), ROWS))

    lax.fori_loop(0, tokens // ROWS, step, None)


def for_each_columns(d: int, width: int, body: Callable[..., Any], carry: Any = None) -> Any:
    def step(k: jax.Array, carry: Any) -> Any:
        columns = pl.ds(pl.multiple_of(k * width, LANES), width)
        return body(columns) if carry is None else body(columns, carry)

    return lax.fori_loop(0, d // width, step, carry)


def pieces(columns: Any, width: int) -> list[Any]:
    """The 128-lane parts of such columns."""
    return [
        pl.ds(pl.multiple_of(columns.start + k * LANES, LANES), LANES)
        for k in range(width // LANES)
    ]


def spread(columns: jax.Array, which: Any) -> list[jax.Array]:
    """Coefficients `which` of [rows, coefficient], each over all lanes."""
    return [jnp.broadcast_to(columns[:, c : c + 1], (columns.shape[0], LANES)) for c in which]
