"""The short convolution on GPU, forward (Pallas' Triton backend).

There is one program for each sequence, stream and block of tokens. It passes over its tokens'
columns twice, a tile at a time: for the sums of squares of the rows that every tap reads, then for
the convolution. The shifted rows and the second pass are read from the caches: a block of u is
small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import cost, tuning

UNMEASURED = "the kernel has not been measured on a GPU; implementation 'pallas' takes it"
TILE = 128
MAX_KERNEL = 8


@dataclass(frozen=True)
class Blocks:
    """A tile (powers of two), and Triton's warps and pipeline stages."""

    tokens: int = 16
    columns: int = TILE
    warps: int = 4
    stages: int = 2


def limit(shape: tuple[int, ...], kernel: int, dtypes: tuple) -> str | None:
    """Why the kernel does not support u of `shape` [B, T, M, d], None if it does."""
    if 0 in shape:
        return "there are no tokens"
    for dtype in dtypes:
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"{dtype} is not float32 or bfloat16"
    if shape[-1] % TILE:
        return f"d = {shape[-1]} is not a multiple of {TILE}"
    return f"kernel = {kernel}: more than {MAX_KERNEL}" if kernel > MAX_KERNEL else None


def forward(
    u: jax.Array,
    filters: jax.Array,
    bits: jax.Array,
    *,
    dilation: int,
    eps: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As tpu.forward, without a tail: [M, B, T, d]."""
    m, b, t, d = u.shape
    kernel = filters.shape[1]
    if blocks is None:
        found = tuning.tuned("short_conv", f"d{d}_{u.dtype.itemsize}_forward")
        blocks = Blocks(**found) if found else Blocks()

    def program(u: Any, filters: Any, bits: Any, out: Any) -> None:
        _kernel(u, filters, bits, out, kernel=kernel, dilation=dilation, eps=eps, blocks=blocks)

    return pl.pallas_call(
        program,
        grid=(pl.cdiv(t, blocks.tokens), m, b),
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        cost_estimate=cost.estimate(
            2 * kernel * u.size, (u, filters, bits, u), transcendentals=u.size
        ),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="short_conv",
    )(u, filters.astype(jnp.float32), bits)


def _kernel(
    u: Any, filters: Any, bits: Any, out: Any, *, kernel: int, dilation: int, eps: float,
    blocks: Blocks,
) -> None:  # fmt: skip
    t, d = u.shape[2:]
    block, stream, sequence = (pl.program_id(axis) for axis in range(3))
    tokens = block * blocks.tokens + jnp.arange(blocks.tokens)
    there = tokens < t
    own = plgpu.load(bits.at[sequence, tokens], mask=there, other=0)
    tile = (blocks.tokens, blocks.columns)
    backs = [(kernel - 1 - k) * dilation for k in range(kernel)]

    def past(k: int, columns: jax.Array) -> jax.Array:
        """The rows that tap k reads, 0 where it is closed."""
        rows = jnp.maximum(tokens - backs[k], 0)
        is_open = jnp.broadcast_to(((own & (1 << k)) != 0)[:, None], tile)
        where = u.at[stream, sequence, rows[:, None], columns[None]]
        return plgpu.load(where, mask=is_open, other=0).astype(jnp.float32)

    def squares(j: jax.Array, sums: tuple) -> tuple:
        columns = j * blocks.columns + jnp.arange(blocks.columns)
        rows = (past(k, columns) for k in range(kernel))
        return tuple(s + jnp.sum(x * x, axis=1) for s, x in zip(sums, rows, strict=True))

    nothing = (jnp.zeros((blocks.tokens,), jnp.float32),) * kernel
    sums = lax.fori_loop(0, d // blocks.columns, squares, nothing)
    scales = [lax.rsqrt(s * (1 / d) + eps) for s in sums]

    def convolve(j: jax.Array, carry: None) -> None:
        columns = j * blocks.columns + jnp.arange(blocks.columns)
        h = jnp.zeros(tile, jnp.float32)
        for k, scale in enumerate(scales):
            f = plgpu.load(filters.at[stream, k, columns])
            h += past(k, columns) * scale[:, None] * f[None]
        # Tap K - 1 is the token itself, so it reads u wherever there is a token.
        result = past(kernel - 1, columns) + 2 * h * jax.nn.sigmoid(2 * h)
        live = (own & (1 << kernel)) != 0
        plgpu.store(
            out.at[stream, sequence, tokens[:, None], columns[None]],
            jnp.where(live[:, None], result, 0).astype(out.dtype),
            mask=jnp.broadcast_to(there[:, None], tile),
        )

    lax.fori_loop(0, d // blocks.columns, convolve, None)
