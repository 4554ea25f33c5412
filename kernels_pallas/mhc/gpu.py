"""mHC on GPU, forward (Pallas' Triton backend).

A program handles a block of tokens. Before a sub-layer it passes over their streams twice, the
second time from the L2 cache: for the logits (fn in three bfloat16 parts, which hold all of its
bits) and the sum of squares, then for the sub-layer's input. Between the passes Sinkhorn runs on
one number per token and matrix entry (coefficients.py). After the sub-layer there is one
elementwise pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import cost, tuning
from kernels_pallas.mhc import coefficients
from kernels_pallas.mhc.tpu_blocks import PARTS, Width, split, total

UNMEASURED = "the kernel has not been measured on a GPU; implementation 'pallas' takes it"


@dataclass(frozen=True)
class Blocks:
    """tokens and columns of a tile (powers of two, at least 16), and Triton's warps and stages."""

    tokens: int = 32
    columns: int = 128
    warps: int = 4
    stages: int = 3


def pre(
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [P, n, d], fn [n d, c] times the gain -> collapsed [P, d], post [P, n], res [P, n n].

    fn, base, scale, post and res in float32, collapsed in x's dtype.
    """
    p, n, d = x.shape
    blocks = blocks or _tuned("pre", n, d)
    count = Width(n).count
    lanes = max(16, pl.next_power_of_2(count))
    parts = jnp.stack(
        split(jnp.pad(fn.reshape(n, d, count), ((0, 0),) * 2 + ((0, lanes - count),)))
    )

    def kernel(*refs: Any) -> None:
        names = ("x", "fn", "base", "scale", "collapsed", "post", "res")
        _pre_kernel(
            dict(zip(names, refs, strict=True)), p, n, d, iterations, eps, transpose, blocks, lanes
        )

    own = 1 if x.dtype == jnp.bfloat16 else PARTS  # of the streams: `split`
    flops = 2 * p * n * d * lanes * PARTS * own
    return tuple(
        _call(kernel, p, blocks, interpret, "mhc_pre", flops, p * count)(
            [
                jax.ShapeDtypeStruct((p, d), x.dtype),
                jax.ShapeDtypeStruct((p, n), jnp.float32),
                jax.ShapeDtypeStruct((p, n * n), jnp.float32),
            ],
            x,
            parts,
            base,
            scale,
        )
    )


def merge(
    x: jax.Array,
    y: jax.Array,
    post: jax.Array,
    res: jax.Array,
    *,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [P, n, d], y [P, d], post float32 [P, n], res float32 [P, n n] -> [P, n, d] as x."""
    p, n, d = x.shape
    blocks = blocks or _tuned("merge", n, d)

    def kernel(*refs: Any) -> None:
        names = ("x", "y", "post", "res", "out")
        _merge_kernel(dict(zip(names, refs, strict=True)), p, n, d, blocks)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    flops = 2 * p * d * n * (n + 1)
    return _call(kernel, p, blocks, interpret, "mhc_merge", flops)(out, x, y, post, res)


def _tuned(op: str, n: int, d: int) -> Blocks:
    found = tuning.tuned("mhc", f"{op}_n{n}_d{d}")
    return Blocks(**found) if found else Blocks()


def _call(
    kernel: Callable[..., None],
    p: int,
    blocks: Blocks,
    interpret: bool,
    name: str,
    flops: int,
    transcendentals: int = 0,
) -> Callable[..., Any]:
    def call(out_shape: Any, *operands: jax.Array) -> Any:
        return pl.pallas_call(
            kernel,
            grid=(pl.cdiv(p, blocks.tokens),),
            out_shape=out_shape,
            cost_estimate=cost.estimate(
                flops,
                (*operands, *jax.tree.leaves(out_shape)),
                transcendentals=transcendentals,
            ),
            compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            interpret=interpret,
            name=name,
        )(*operands)

    return call


class _Tokens:
    """Loads and stores for the tokens of a program."""

    def __init__(self, p: int, d: int, blocks: Blocks):
        self.index = pl.program_id(0) * blocks.tokens + jnp.arange(blocks.tokens)
        self.there = self.index < p
        self.d, self.width = d, blocks.columns

    def load(self, ref: Any, *at: Any) -> jax.Array:
        return plgpu.load(ref.at[(self.index, *at)], mask=self.there, other=0.0)

    def store(self, ref: Any, value: jax.Array, *at: Any) -> None:
        plgpu.store(ref.at[(self.index, *at)], value, mask=self.there)

    def _tile(self, ref: Any, columns: jax.Array, at: tuple) -> tuple[Any, jax.Array]:
        mask = jnp.broadcast_to(self.there[:, None], (self.index.size, self.width))
        return ref.at[(self.index[:, None], *at, columns[None])], mask

    def load_tile(self, ref: Any, columns: jax.Array, *at: Any) -> jax.Array:
        place, mask = self._tile(ref, columns, at)
        return plgpu.load(place, mask=mask, other=0.0)

    def store_tile(self, ref: Any, value: jax.Array, columns: jax.Array, *at: Any) -> None:
        place, mask = self._tile(ref, columns, at)
        plgpu.store(place, value.astype(ref.dtype), mask=mask)

    def for_each_columns(self, body: Callable[..., Any], carry: Any = None) -> Any:
        def step(k: jax.Array, carry: Any) -> Any:
            return body(k * self.width + jnp.arange(self.width), carry)

        return lax.fori_loop(0, self.d // self.width, step, carry)


def _pre_kernel(
    refs: dict[str, Any],
    p: int,
    n: int,
    d: int,
    iterations: int,
    eps: float,
    transpose: bool,
    blocks: Blocks,
    lanes: int,
) -> None:
    tokens = _Tokens(p, d, blocks)
    lane = jnp.arange(lanes)

    def multiply(columns: jax.Array, carry: tuple) -> tuple:
        product, squares = carry
        for j in range(n):
            x = tokens.load_tile(refs["x"], columns, j)
            wide = x.astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1)
            for part in range(PARTS):
                fn = plgpu.load(refs["fn"].at[part, j, columns[:, None], lane[None]])
                for own in split(x):
                    product += jnp.dot(own, fn, preferred_element_type=jnp.float32)
        return product, squares

    nothing = (
        jnp.zeros((blocks.tokens, lanes), jnp.float32),
        jnp.zeros((blocks.tokens,), jnp.float32),
    )
    product, squares = tokens.for_each_columns(multiply, nothing)
    r = lax.rsqrt(squares * (1 / (n * d)) + eps)
    count = Width(n).count
    h = [jnp.sum(jnp.where((lane == c)[None], product, 0.0), axis=1) * r for c in range(count)]
    base = [refs["base"][c] for c in range(count)]
    scale = [refs["scale"][k] for k in range(3)]
    z = [scale[coefficients.group(c, n)] * x + base[c] for c, x in enumerate(h)]
    weights = [coefficients.sigmoid(z[j]) + eps for j in range(n)]
    for j in range(n):
        tokens.store(refs["post"], 2 * coefficients.sigmoid(z[n + j]), j)
    order = (lambda i, j: j * n + i) if transpose else (lambda i, j: i * n + j)
    res = _sinkhorn([[z[2 * n + order(i, j)] for j in range(n)] for i in range(n)], iterations, eps)
    for i in range(n):
        for j in range(n):
            tokens.store(refs["res"], res[i][j], n * i + j)

    def mix(columns: jax.Array, carry: None) -> None:
        x = [tokens.load_tile(refs["x"], columns, j).astype(jnp.float32) for j in range(n)]
        out = total([w[:, None] * a for w, a in zip(weights, x, strict=True)])
        tokens.store_tile(refs["collapsed"], out, columns)

    tokens.for_each_columns(mix)


def _sinkhorn(logits: list[list[jax.Array]], iterations: int, eps: float) -> list[list[jax.Array]]:
    """As in coefficients.py, with an array for every entry: Triton has no arrays of 3 or 5."""
    every = range(len(logits))
    kernel = [list(row) for row in logits]
    for j in every:
        top = functools.reduce(jnp.maximum, [logits[i][j] for i in every])
        powers = [jnp.exp(logits[i][j] - top) for i in every]
        inverse = 1 / total(powers)
        for i in every:
            kernel[i][j] = powers[i] * inverse + eps

    def step(_: jax.Array, factors: tuple) -> tuple:
        u, v = factors
        v = tuple(v[j] / (v[j] * total([kernel[i][j] * u[i] for i in every]) + eps) for j in every)
        u = tuple(u[i] / (u[i] * total([kernel[i][j] * v[j] for j in every]) + eps) for i in every)
        return u, v

    u = tuple(1 / (total(row) + eps) for row in kernel)
    v = tuple(jnp.ones_like(x) for x in u)
    u, v = lax.fori_loop(0, iterations - 1, step, (u, v))
    return [[u[i] * kernel[i][j] * v[j] for j in every] for i in every]


def _merge_kernel(refs: dict[str, Any], p: int, n: int, d: int, blocks: Blocks) -> None:
    tokens = _Tokens(p, d, blocks)
    post = [tokens.load(refs["post"], i)[:, None] for i in range(n)]
    res = [tokens.load(refs["res"], k)[:, None] for k in range(n * n)]

    def mix(columns: jax.Array, carry: None) -> None:
        x = [tokens.load_tile(refs["x"], columns, j).astype(jnp.float32) for j in range(n)]
        y = tokens.load_tile(refs["y"], columns).astype(jnp.float32)
        for i in range(n):
            terms = [res[n * i + j] * x[j] for j in range(n)]
            tokens.store_tile(refs["out"], total([*terms, post[i] * y]), columns, i)

    tokens.for_each_columns(mix)
