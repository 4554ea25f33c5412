"""The gate of Engram on TPU, forward (Mosaic).

The grid is (blocks of tokens, columns of the projection). All columns of key 0, key 1, ... are
processed first, then the value's, so that the weights are read once for every block of tokens,
which is as long as VMEM allows (thousands of tokens). Of a key only three sums per token are kept:

    key columns     key = rows W;  a lane of `sums` += <key, key>, <h, gain key>, <h, h>
    between         gates from the sums
    value columns   value = rows W;  out_m = gate_m value, for all M branches at once

HBM traffic: rows, streams and weights are read, gated values and 4 M numbers per token written. A
step processes its block of tokens in chunks, so temporaries stay small whatever the block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import cost, tuning
from kernels_pallas.engram_gate.fp8_tpu import Projection, projection
from kernels_pallas.engram_gate.quantise import BLOCK, E4M3, Quantised
from kernels_pallas.engram_gate.reference import gate_of_score

LANES = 128
MAX_STREAMS = LANES // 4  # four numbers per token and branch share a row of lanes
DTYPES = (jnp.float32, jnp.bfloat16)
CHUNK = 256
MAX_COLUMNS = 256
MAX_TOKENS = 4096


@dataclass(frozen=True)
class Blocks:
    """tokens: of a grid step, a multiple of chunk; columns: of the projection, divide d."""

    tokens: int
    columns: int
    chunk: int = CHUNK


def limit(
    c: int, d: int, m: int, rows: Any, streams: Any, recipe: str | None, mixed: bool
) -> str | None:
    """Why the kernel does not support these (rows, streams: their dtypes), None if it does."""
    for dtype, allowed in ((rows, (*DTYPES, E4M3)), (streams, DTYPES)):
        if dtype not in allowed:
            return f"{dtype} is not float32 or bfloat16"
    if c % LANES or d % LANES:
        return f"d_mem = {c} and d = {d} must be multiples of {LANES}"
    if m > MAX_STREAMS:
        return f"{m} streams are more than {MAX_STREAMS}"
    if mixed:
        return "FP8 rows need FP8 weights"
    if recipe == BLOCK and c > LANES * LANES:
        return f"d_mem = {c} is more than {LANES * LANES} with recipe {BLOCK!r}"
    return None


def blocks_for(p: Projection, tokens: int, streams: int, d: int, out_bytes: int) -> Blocks:
    """Tuned blocks, else the longest block of tokens that fits VMEM."""
    key = f"C{p.depth}_d{d}_M{streams}_{p.name}_{out_bytes}"
    found = tuning.tuned("engram_gate", key)
    if found:
        return fitted(Blocks(**found), tokens)

    def bytes_of(b: Blocks) -> int:
        moving = 2 * b.tokens * b.columns * out_bytes * (1 + streams)  # streams in, out blocks
        # Sums; statistics and the mask, each double-buffered.
        return p.vmem(b.tokens, b.chunk, b.columns) + moving + 5 * b.tokens * LANES * 4

    return longest(tokens, d, MAX_TOKENS, bytes_of)


def longest(tokens: int, d: int, most: int, bytes_of: Callable[[Blocks], int]) -> Blocks:
    """The longest blocks of at most `most` tokens that fit VMEM; one chunk if none does."""
    columns, chunk = math.gcd(d, MAX_COLUMNS), chunk_for(tokens, CHUNK)
    for length in range(most, chunk, -chunk):
        blocks = fitted(Blocks(length, columns, chunk), tokens)
        if bytes_of(blocks) <= tuning.vmem_limit():
            return blocks
    return fitted(Blocks(chunk, columns, chunk), tokens)


def fitted(blocks: Blocks, tokens: int) -> Blocks:
    """Blocks for the fewest passes over the weights that `blocks` allows, with the same number of
    tokens in each pass and of passes on each core."""
    chunk = chunk_for(tokens, blocks.chunk)
    cores = min(tuning.cores(), pl.cdiv(tokens, chunk))
    passes = pl.cdiv(pl.cdiv(tokens, blocks.tokens), cores) * cores
    of_pass = pl.cdiv(tokens, passes)
    return Blocks(pl.cdiv(of_pass, chunk) * chunk, blocks.columns, chunk)


def chunk_for(tokens: int, chunk: int) -> int:
    """`chunk`, or for fewer tokens the next multiple of 32, a whole tile of any dtype."""
    return min(chunk, pl.cdiv(tokens, 32) * 32)


def forward(
    rows: jax.Array | Quantised,
    weights: jax.Array | Quantised,
    streams: jax.Array,
    gain: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    eps: float,
    recipe: str | None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The gated value and the residuals of the backward pass.

    Args:
      rows: [T, C]; weights: [M + 1, C, d]: M keys, then the value; streams: [M, T, d];
      gain: [M, d]; bias: [M + 1, d] or None; mask: bool [T] or None.

    Returns:
      ([M, T, d] in the streams' dtype, float32 [T, 4 M]: for every branch gate, score s,
      1 / rms(h), 1 / rms(key)).
    """
    m, t, d = streams.shape
    p = projection(rows, weights, recipe)
    blocks = blocks or blocks_for(p, t, m, d, streams.dtype.itemsize)
    bt, bd = blocks.tokens, blocks.columns
    if d % bd:
        raise ValueError(f"blocks of {bd} columns do not divide d = {d}")
    n = d // bd  # column blocks of one branch
    key_steps = m * n

    def column(i: Any, j: Any) -> tuple:
        return j // n, 0, j % n

    def of_keys(i: Any, j: Any) -> tuple:
        """(branch, block of tokens, columns); the last key's during the value's steps."""
        j = jnp.minimum(j, key_steps - 1)
        return j // n, i, j % n

    operands, specs = p.operands(bt, bd, column)
    operands |= {"streams": streams, "gain": gain.astype(jnp.float32)[:, None]}
    specs |= {
        "streams": pl.BlockSpec((None, bt, bd), of_keys),
        "gain": pl.BlockSpec((None, 1, bd), lambda i, j: (of_keys(i, j)[0], 0, of_keys(i, j)[2])),
    }
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)[:, None]
        specs["bias"] = pl.BlockSpec((None, 1, bd), column)
    if mask is not None:
        operands["mask"] = mask.astype(jnp.float32)[:, None]
        specs["mask"] = pl.BlockSpec((bt, 1), lambda i, j: (i, 0))
    scratch = p.scratch(bt) | {"sums": pltpu.VMEM((bt, LANES), jnp.float32)}
    names = (*operands, "out", "stats", *scratch)

    def kernel(*refs: Any) -> None:
        _forward_kernel(
            dict(zip(names, refs, strict=True)), p, m=m, d=d, n=n, chunk=blocks.chunk, eps=eps
        )

    out_shape = [
        jax.ShapeDtypeStruct((m, t, d), streams.dtype),
        jax.ShapeDtypeStruct((t, 4 * m), jnp.float32),
    ]
    passes = pl.cdiv(t, bt)  # over the weights
    of_tokens = {"rows", "row_scales", "streams", "mask"}
    return pl.pallas_call(
        kernel,
        grid=(passes, key_steps + n),
        in_specs=[specs[name] for name in operands],
        out_specs=[
            pl.BlockSpec((m, bt, bd), lambda i, j: (0, i, jnp.maximum(j - key_steps, 0))),
            pl.BlockSpec((bt, 4 * m), lambda i, j: (i, 0)),
        ],
        out_shape=out_shape,
        cost_estimate=cost.estimate(
            2 * t * p.depth * (m + 1) * d,
            [*(a for name, a in operands.items() if name in of_tokens), *out_shape],
            *((a, passes) for name, a in operands.items() if name not in of_tokens),
            transcendentals=t * m,
        ),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuning.vmem_limit()
        ),
        interpret=interpret,
        name="engram_gate",
    )(*operands.values())


def _forward_kernel(
    refs: dict[str, Any], p: Projection, *, m: int, d: int, n: int, chunk: int, eps: float
) -> None:
    j = pl.program_id(1)
    refs["first_column"] = j % n * (d // n)  # here: the interpreter lacks program_id in a branch
    chunks = refs["out"].shape[1] // chunk

    def for_each_chunk(body: Any) -> None:
        def step(c: jax.Array, carry: None) -> None:
            body(pl.ds(pl.multiple_of(c * chunk, chunk), chunk))

        lax.fori_loop(0, chunks, step, None)

    def product(weights: Any, tokens: Any) -> jax.Array:
        out = p.product(refs, weights, tokens)
        return out + refs["bias"][...] if "bias" in refs else out

    @pl.when(j == 0)
    def _start() -> None:
        refs["sums"][...] = jnp.zeros_like(refs["sums"])
        for_each_chunk(functools.partial(p.prologue, refs))

    @pl.when(j < m * n)
    def _keys() -> None:
        weights, gain = p.weights(refs), refs["gain"][...]
        lane = lax.broadcasted_iota(jnp.int32, (chunk, LANES), 1)

        def body(tokens: Any) -> None:
            key = product(weights, tokens)
            h = refs["streams"][tokens].astype(jnp.float32)
            sums = refs["sums"][tokens]
            for k, x in enumerate((key * key, h * gain * key, h * h)):
                sums += jnp.where(lane == j // n + k * m, jnp.sum(x, axis=1, keepdims=True), 0)
            refs["sums"][tokens] = sums

        for_each_chunk(body)

    @pl.when(j == m * n)
    def _gates() -> None:
        def body(tokens: Any) -> None:
            sums = refs["sums"][tokens]
            stats = _statistics(sums, m, d, eps)
            if "mask" in refs:
                lane = lax.broadcasted_iota(jnp.int32, stats.shape, 1)
                stats = jnp.where((lane >= m) | (refs["mask"][tokens] > 0), stats, 0)
            refs["sums"][tokens] = stats
            refs["stats"][tokens] = stats[:, : 4 * m]

        for_each_chunk(body)

    @pl.when(j >= m * n)
    def _value() -> None:
        weights = p.weights(refs)

        def body(tokens: Any) -> None:
            value = product(weights, tokens)
            stats = refs["sums"][tokens]
            for branch in range(m):
                out = stats[:, branch : branch + 1] * value
                refs["out"][branch, tokens] = out.astype(refs["out"].dtype)

        for_each_chunk(body)


def _statistics(sums: jax.Array, m: int, d: int, eps: float) -> jax.Array:
    """Sums [chunk, 128] in lanes k m + branch -> gate, s, 1 / rms(h), 1 / rms(key) likewise."""
    lane = lax.broadcasted_iota(jnp.int32, sums.shape, 1)

    def moved(x: jax.Array, lanes: int) -> jax.Array:
        return pltpu.roll(x, lanes % LANES, 1) if lanes % LANES else x

    r_key = lax.rsqrt(sums * (1 / d) + eps)
    r_h = lax.rsqrt(moved(sums, -2 * m) * (1 / d) + eps)
    s = moved(sums, -m) * r_key * r_h * d**-0.5
    out = gate_of_score(s)
    for k, x in enumerate((s, r_h, r_key), start=1):
        out = jnp.where(lane < k * m, out, moved(x, k * m))
    return out
