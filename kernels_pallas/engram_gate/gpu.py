"""The gate of Engram on GPU, forward (Pallas' Triton backend).

There is one program for each block of tokens. For a branch it multiplies the block's rows with all
columns of W_m, a tile at a time, and keeps three sums per token; then it computes the value's
columns, multiplies them by the gates and writes them for all branches. Concurrent programs go
through the weights in the same order, so that these are read from the L2 cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import cost, tuning
from kernels_pallas.engram_gate import quantise
from kernels_pallas.engram_gate.quantise import BLOCK, E4M3, MX, Quantised
from kernels_pallas.engram_gate.reference import gate_of_score

UNMEASURED = "the kernel has not been measured on a GPU; implementation 'pallas' takes it"
TILE = 128


@dataclass(frozen=True)
class Blocks:
    """A tile of the product (powers of two), and Triton's warps and pipeline stages."""

    tokens: int = 64
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3


def limit(
    c: int, d: int, m: int, rows: Any, streams: Any, recipe: str | None, mixed: bool
) -> str | None:
    """Why the kernel does not support these (rows, streams: their dtypes), None if it does."""
    for dtype, allowed in (
        (rows, (jnp.float32, jnp.bfloat16, E4M3)),
        (streams, (jnp.float32, jnp.bfloat16)),
    ):
        if dtype not in allowed:
            return f"{dtype} is not float32 or bfloat16"
    if c % TILE or d % TILE:
        return f"d_mem = {c} and d = {d} must be multiples of {TILE}"
    return "FP8 rows need FP8 weights" if mixed else None


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
    """As tpu.forward."""
    m, t, d = streams.shape
    if recipe is not None and not isinstance(rows, Quantised):
        rows = quantise.quantise_rows(rows, recipe)
    values = rows.values if isinstance(rows, Quantised) else rows
    c = values.shape[1]
    if blocks is None:
        found = tuning.tuned("engram_gate", f"C{c}_d{d}_M{m}_{recipe or 'plain'}_{values.dtype}")
        blocks = Blocks(**found) if found else Blocks()
    if d % blocks.columns or c % blocks.depth:
        raise ValueError(f"{blocks} do not divide d_mem = {c} and d = {d}")
    operands = {"rows": values, "streams": streams, "gain": gain.astype(jnp.float32)}
    if isinstance(weights, Quantised):
        assert isinstance(rows, Quantised)
        operands["weights"] = jnp.moveaxis(weights.values, 1, 0)
        operands["row_scales"] = quantise.read_scales(rows)
        operands["column_scales"] = jnp.moveaxis(quantise.weight_scales(weights), 1, 0)
    else:
        operands["weights"] = weights.astype(values.dtype)
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)
    if mask is not None:
        operands["mask"] = mask.astype(jnp.int32)
    names = (*operands, "out", "stats")

    def kernel(*refs: Any) -> None:
        _kernel(dict(zip(names, refs, strict=True)), m=m, t=t, c=c, d=d, eps=eps, recipe=recipe,
                blocks=blocks)  # fmt: skip

    out_shape = [
        jax.ShapeDtypeStruct((m, t, d), streams.dtype),
        jax.ShapeDtypeStruct((t, 4 * m), jnp.float32),
    ]
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(pl.cdiv(t, blocks.tokens),),
            out_shape=out_shape,
            cost_estimate=cost.estimate(
                2 * t * c * (m + 1) * d, (*operands.values(), *out_shape), transcendentals=t * m
            ),
            compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            interpret=interpret,
            name="engram_gate",
        )(*operands.values())
    )


def _kernel(
    refs: dict[str, Any],
    *,
    m: int,
    t: int,
    c: int,
    d: int,
    eps: float,
    recipe: str | None,
    blocks: Blocks,
) -> None:
    tokens = pl.program_id(0) * blocks.tokens + jnp.arange(blocks.tokens)
    there = tokens < t

    project = functools.partial(_projected, refs, tokens, there, c=c, recipe=recipe, blocks=blocks)

    gates = []
    for branch in range(m):

        def keys(j: jax.Array, sums: tuple, branch: int = branch) -> tuple:
            columns = j * blocks.columns + jnp.arange(blocks.columns)
            key = project(branch, columns)
            h = plgpu.load(
                refs["streams"].at[branch, tokens[:, None], columns[None]],
                mask=jnp.broadcast_to(there[:, None], key.shape),
            ).astype(jnp.float32)
            gain = plgpu.load(refs["gain"].at[branch, columns])
            terms = (key * key, h * gain[None] * key, h * h)
            return tuple(s + jnp.sum(x, axis=1) for s, x in zip(sums, terms, strict=True))

        nothing = (jnp.zeros((blocks.tokens,), jnp.float32),) * 3
        key_key, dot, h_h = lax.fori_loop(0, d // blocks.columns, keys, nothing)
        r_h, r_key = lax.rsqrt(h_h * (1 / d) + eps), lax.rsqrt(key_key * (1 / d) + eps)
        score = dot * r_h * r_key * d**-0.5
        gate = gate_of_score(score)
        if "mask" in refs:
            gate = jnp.where(plgpu.load(refs["mask"].at[tokens], mask=there) > 0, gate, 0)
        for k, x in enumerate((gate, score, r_h, r_key)):
            plgpu.store(refs["stats"].at[tokens, k * m + branch], x, mask=there)
        gates.append(gate)

    def value(j: jax.Array, carry: None) -> None:
        columns = j * blocks.columns + jnp.arange(blocks.columns)
        found = project(m, columns)
        for branch, gate in enumerate(gates):
            plgpu.store(
                refs["out"].at[branch, tokens[:, None], columns[None]],
                (gate[:, None] * found).astype(refs["out"].dtype),
                mask=jnp.broadcast_to(there[:, None], found.shape),
            )

    lax.fori_loop(0, d // blocks.columns, value, None)


def _projected(
    refs: dict[str, Any],
    tokens: jax.Array,
    there: jax.Array,
    branch: int,
    columns: jax.Array,
    *,
    c: int,
    recipe: str | None,
    blocks: Blocks,
) -> jax.Array:
    """rows W for a tile: float32 [tokens, columns]; undefined for tokens that are not `there`."""
    depth = TILE if recipe == BLOCK else blocks.depth
    rows_there = jnp.broadcast_to(there[:, None], (blocks.tokens, depth))

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        inner = k * depth + jnp.arange(depth)
        x = plgpu.load(refs["rows"].at[tokens[:, None], inner[None]], mask=rows_there)
        w = plgpu.load(refs["weights"].at[branch, inner[:, None], columns[None]])
        if recipe == MX:  # exact in bfloat16: scales are powers of two
            group = inner // quantise.WIDTH[MX]
            scales = refs["row_scales"].at[tokens[:, None], group[None]]
            x_scale = plgpu.load(scales, mask=rows_there)
            w_scale = plgpu.load(refs["column_scales"].at[branch, group[:, None], columns[None]])
            x = (x.astype(jnp.float32) * x_scale).astype(jnp.bfloat16)
            w = (w.astype(jnp.float32) * w_scale).astype(jnp.bfloat16)
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        part = lax.dot_general(
            x, w, (((1,), (0,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if recipe == BLOCK:
            x_scale = plgpu.load(refs["row_scales"].at[tokens, k], mask=there)
            w_scale = plgpu.load(refs["column_scales"].at[branch, k, columns])
            part = part * x_scale[:, None] * w_scale[None]
        return total + part

    start = jnp.zeros((blocks.tokens, blocks.columns), jnp.float32)
    out = lax.fori_loop(0, c // depth, step, start)
    if recipe == quantise.CHANNEL:
        x_scale = plgpu.load(refs["row_scales"].at[tokens, 0], mask=there)
        w_scale = plgpu.load(refs["column_scales"].at[branch, 0, columns])
        out = out * x_scale[:, None] * w_scale[None]
    if "bias" in refs:
        out = out + plgpu.load(refs["bias"].at[branch, columns])[None]
    return out
