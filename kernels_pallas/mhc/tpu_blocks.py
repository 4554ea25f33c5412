"""Helpers of mHC's TPU kernels: block sizes, splitting into bfloat16 parts, and layouts.

One number per token is stored either in lanes ([coefficient, tokens / 128, 128], whole registers,
or in HBM [coefficient, tokens]) or in sublanes ([tokens, coefficient]).
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

from kernels_pallas import dispatch, tuning

LANES = 128
ROWS = 16  # tokens of an elementwise step: one register of bfloat16
PARTS = 3
MAX_STREAMS = 8
MAX_COLUMNS = 512
MAX_TOKENS = 256  # longer blocks would leave too few steps to hide the first and last transfer


@dataclass(frozen=True)
class Blocks:
    """tokens: of a grid step, a multiple of 128; columns: of an inner step, divide d."""

    tokens: int
    columns: int


@dataclass(frozen=True)
class Width:
    """Numbers of rows for the coefficients of n streams; count: 2 n + n^2, the coefficients.

    part: rows of one bfloat16 part of fn (a multiple of 8); stacked: of all three and a last row
    for the sum of squares (a multiple of 128); kept: of h and, last, r.
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
    """Why the kernels do not support such arguments, None if they do."""
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


Vmem = Callable[[int, int, int, int], int]  # (tokens, n, d, bytes of a number) -> bytes


def too_wide(vmem: Vmem, n: int, d: int, dtype: Any) -> str | None:
    """Why not even the shortest block fits VMEM, None if it does."""
    least, most = vmem(LANES, n, d, jnp.dtype(dtype).itemsize), tuning.vmem_limit()
    if least <= most:
        return None
    mib = tuning.MIB
    return f"{LANES} tokens of [{n}, {d}] need {least / mib:.0f} MiB of VMEM, of {most / mib:.0f}"


def blocks_for(op: str, tokens: int, n: int, d: int, size: int, vmem: Vmem) -> Blocks:
    """Tuned blocks, else the longest block of tokens that fits VMEM.

    Args:
      op: "pre", "pre_backward", "merge" or "merge_backward"; size: bytes of a stream's number.
    """
    found = tuning.tuned("mhc", f"{op}_n{n}_d{d}_{size}")
    if found:
        return Blocks(**found)
    block = LANES
    while block < min(MAX_TOKENS, tokens) and vmem(2 * block, n, d, size) < tuning.vmem_limit():
        block *= 2
    return Blocks(block, math.gcd(d, MAX_COLUMNS))


def split(x: jax.Array, parts: int = PARTS) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x: three hold all bits of float32, one those of bfloat16."""
    return [x] if x.dtype == jnp.bfloat16 else [a.astype(jnp.bfloat16) for a in tops(x, parts)]


def tops(x: jax.Array, parts: int = PARTS) -> list[jax.Array]:
    """float32 x as a sum of float32 arrays with at most 8 significant bits each.

    By masking bits: the compiler may remove a rounding to bfloat16 and back.
    """
    out = []
    for _ in range(parts):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        out.append(lax.bitcast_convert_type(bits, jnp.float32))
        x = x - out[-1]
    return out


# Parts of fn in dx's product, and for each of its passes the parts of e they are multiplied with.
# A dx in bfloat16 needs only the three largest products, so one pass.
Passes = tuple[tuple[int, int, int], ...]


def parts_for_dx(size: int) -> tuple[tuple[int, int, int], Passes]:
    """(parts of fn, passes) for streams of `size` bytes a number."""
    if size == 4:
        return (0, 1, 2), ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    return (0, 1, 0), ((0, 0, 1),)


def stacked_parts(fn: jax.Array, n: int, order: tuple[int, ...] = (0, 1, 2)) -> jax.Array:
    """fn float32 [n d, c] -> bfloat16 [n, stacked, d]: the parts that `order` lists, each in
    separate rows."""
    width = Width(n)
    turned = jnp.moveaxis(fn.reshape(n, -1, width.count), -1, 1)
    turned = jnp.pad(turned, ((0, 0), (0, width.part - width.count), (0, 0)))
    own = split(turned)
    parts = jnp.concatenate([own[k] for k in order], axis=1)
    return jnp.pad(parts, ((0, 0), (0, width.stacked - parts.shape[1]), (0, 0)))


def total(terms: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """a b, or a b^T, of bfloat16 arrays, summed in float32."""
    if dispatch.device()[0] == dispatch.CPU:  # interpreted: XLA on CPU lacks some of these products
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
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
    """Write coefficients first .. first + count to the rows of a block [count, tokens]."""
    for k in range(lanes.shape[1]):
        rows = lanes[first : first + count, k, :]
        out[:, k * LANES : (k + 1) * LANES] = rows.astype(out.dtype)


def into_lanes(block: Any, lanes: Any, first: int = 0) -> None:
    """The inverse of from_lanes."""
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
    """`width` columns in slices of 128 lanes."""
    return [
        pl.ds(pl.multiple_of(columns.start + k * LANES, LANES), LANES)
        for k in range(width // LANES)
    ]


def spread(columns: jax.Array, which: Any) -> list[jax.Array]:
    """Coefficients `which` of [rows, coefficient], each broadcast over all lanes."""
    return [jnp.broadcast_to(columns[:, c : c + 1], (columns.shape[0], LANES)) for c in which]
