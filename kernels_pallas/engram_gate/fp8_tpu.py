"""Computes the projection rows W inside the TPU kernels, in every number format.

    plain     rows and weights in one dtype: a product
    channel   e4m3 product, times the token's and the column's scale
    block     an e4m3 product for every 128 rows of W, times both scales, summed in float32
    mx        rows and weights become bfloat16, exactly (scales are powers of two), then a product

Rows that are not quantised yet are quantised (for "mx" also dequantised) once per block of tokens,
in the first step (`prologue`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import dispatch
from kernels_pallas.engram_gate import quantise
from kernels_pallas.engram_gate.quantise import BLOCK, CHANNEL, E4M3, MX, WIDTH, Quantised

LANES = 128
NATIVE_FP8 = ("TPU7x",)  # kinds of devices whose matrix unit multiplies e4m3
LONG_ROWS = 8 << 20  # bytes; a larger block of rows is not double-buffered


@dataclass(frozen=True)
class Projection:
    """rows [T, C] and weights [M + 1, C, d] as the kernels take them.

    recipe: None, or one of quantise.RECIPES; prepared: the rows are already quantised.
    native: the matrix unit multiplies e4m3 (tpu7x); others get the same numbers in bfloat16.
    """

    rows: jax.Array
    row_scales: jax.Array | None
    columns: jax.Array
    column_scales: jax.Array | None
    recipe: str | None
    prepared: bool
    native: bool

    @property
    def depth(self) -> int:
        """C."""
        return self.rows.shape[1]

    @property
    def name(self) -> str:
        return f"{self.recipe or 'plain'}_{self.rows.dtype}"

    def _once(self, tokens: int) -> bool:
        return tokens * self.depth * self.rows.dtype.itemsize > LONG_ROWS

    def vmem(self, tokens: int, chunk: int, columns: int) -> int:
        """An upper bound of the bytes of VMEM for blocks, scratch and temporaries of a product."""
        size = tokens * self.depth * self.rows.dtype.itemsize * (1 if self._once(tokens) else 2)
        size += sum(s.shape[1] * tokens * s.dtype.itemsize for s in self.scratch(tokens).values())
        size += 2 * self.depth * columns * self.columns.dtype.itemsize
        if self.recipe is not None:
            size += 2 * self.depth * columns + chunk * self.depth * 4
        if self.row_scales is not None:
            lanes = pl.cdiv(self.row_scales.shape[1], LANES) * LANES
            buffers = 1 if self._once(tokens) else 2
            size += buffers * tokens * lanes * self.row_scales.dtype.itemsize
        return size + 16 * chunk * columns * 4

    def operands(
        self, tokens: int, columns: int, column: Callable[..., tuple]
    ) -> tuple[dict[str, jax.Array], dict[str, pl.BlockSpec]]:
        """(arrays, block specs) by name; column: index map of the weights' blocks."""
        c = self.depth
        once = {"pipeline_mode": pl.Buffered(1)} if self._once(tokens) else {}
        arrays = {"rows": self.rows, "weights": self.columns}
        specs = {
            "rows": pl.BlockSpec((tokens, c), lambda i, j: (i, 0), **once),
            "weights": pl.BlockSpec((None, c, columns), column),
        }
        if self.row_scales is not None:
            arrays["row_scales"] = self.row_scales
            specs["row_scales"] = pl.BlockSpec(
                (tokens, self.row_scales.shape[1]), lambda i, j: (i, 0), **once
            )
        if self.column_scales is not None:
            arrays["column_scales"] = self.column_scales
            groups = self.column_scales.shape[1:]
            specs["column_scales"] = (
                pl.BlockSpec((None, 1, columns), column)
                if self.recipe == CHANNEL
                else pl.BlockSpec((None, *groups), lambda i, j: (column(i, j)[0], 0, 0))
            )
        return arrays, specs

    def scratch(self, tokens: int) -> dict[str, Any]:
        if self.recipe is None:
            return {}
        if self.recipe == MX:
            return {"ready": pltpu.VMEM((tokens, self.depth), jnp.bfloat16)}
        if self.prepared:
            return {}
        return {
            "ready": pltpu.VMEM((tokens, self.depth), E4M3),
            "ready_scales": pltpu.VMEM((tokens, LANES), jnp.float32),
        }

    def prologue(self, refs: dict[str, Any], tokens: Any) -> None:
        """Quantise the rows of a chunk; runs before any product with them."""
        if self.recipe is None or (self.prepared and self.recipe != MX):
            return
        if self.prepared:
            refs["ready"][tokens] = _scaled_by_powers(
                refs["rows"][tokens], refs["row_scales"][tokens]
            )
            return
        x = refs["rows"][tokens].astype(jnp.float32)
        if self.recipe == CHANNEL:
            scale = quantise.scale_of(jnp.max(jnp.abs(x), axis=1, keepdims=True), CHANNEL)
            refs["ready"][tokens] = (x / scale).astype(E4M3)
            refs["ready_scales"][tokens] = jnp.broadcast_to(scale, (x.shape[0], LANES))
        elif self.recipe == BLOCK:
            lane = lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
            scales = jnp.ones((x.shape[0], LANES), jnp.float32)
            for k in range(self.depth // 128):
                part = x[:, k * 128 : (k + 1) * 128]
                scale = quantise.scale_of(jnp.max(jnp.abs(part), axis=1, keepdims=True), BLOCK)
                refs["ready"][tokens, k * 128 : (k + 1) * 128] = (part / scale).astype(E4M3)
                scales = jnp.where(lane == k, scale, scales)
            refs["ready_scales"][tokens] = scales
        else:
            scale = quantise.scale_of(_group_largest(jnp.abs(x), 32), MX)
            rounded = (x / scale).astype(E4M3).astype(jnp.float32)
            refs["ready"][tokens] = (rounded * scale).astype(jnp.bfloat16)

    def weights(self, refs: dict[str, Any]) -> tuple[Any, jax.Array | None]:
        """The step's weights [C, columns], ready for products with many chunks, and the scales
        of their columns: float32 [1, columns] or [C / 128, columns]."""
        if self.recipe is None:
            return refs["weights"], None
        weights = refs["weights"][...]
        scales = self._of_columns(refs, weights.shape[1])
        if self.recipe == MX:
            scales = scales.astype(jnp.bfloat16)[:, None, :]
            grouped = weights.astype(jnp.bfloat16).reshape(-1, 32, weights.shape[1])
            return (grouped * scales).reshape(weights.shape), None
        return weights if self.native else weights.astype(jnp.bfloat16), scales

    def _of_columns(self, refs: dict[str, Any], columns: int) -> jax.Array:
        """Scales of the step's columns from those of groups of columns, by a product with zeros and
        ones. Expanded in HBM they would be read again in every pass.

        refs["first_column"]: of the step, within its branch."""
        scales = refs["column_scales"][...]
        if self.recipe == CHANNEL:
            return scales
        shape = scales.shape[1], columns
        group, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        inside = group == (refs["first_column"] + column) // WIDTH[str(self.recipe)]
        return dot(scales, inside.astype(scales.dtype))

    def product(
        self, refs: dict[str, Any], weights: tuple[Any, jax.Array | None], tokens: Any
    ) -> jax.Array:
        """rows W of a chunk, W of `weights`: float32 [chunk, columns]."""
        matrix, column_scales = weights
        if self.recipe is None:
            return dot(refs["rows"][tokens], matrix[...])
        if self.recipe == MX:
            return dot(refs["ready"][tokens], matrix)
        x = refs["rows" if self.prepared else "ready"][tokens]
        x = x if self.native else x.astype(jnp.bfloat16)
        scales = refs["row_scales" if self.prepared else "ready_scales"][tokens]
        assert column_scales is not None
        if self.recipe == CHANNEL:
            return dot(x, matrix) * scales[:, :1] * column_scales
        total = jnp.zeros((x.shape[0], matrix.shape[1]), jnp.float32)
        for k in range(self.depth // 128):
            part = slice(k * 128, (k + 1) * 128)
            scale = scales[:, k : k + 1] * column_scales[k : k + 1]
            total += dot(x[:, part], matrix[part]) * scale
        return total


def projection(
    rows: jax.Array | Quantised, weights: jax.Array | Quantised, recipe: str | None
) -> Projection:
    """The `Projection` of rows [T, C] and weights: plain ones [M + 1, C, d], quantised ones
    [C, M + 1, d] (quantise.Quantised)."""
    prepared = isinstance(rows, Quantised)
    if not isinstance(weights, Quantised):
        weights = weights.astype(rows.dtype)
        return Projection(rows, None, weights, None, None, False, False)
    recipe = weights.recipe
    column_scales = jnp.moveaxis(quantise.read_scales(weights), 1, 0)
    if recipe != CHANNEL:  # whole rows of lanes
        padding = (0, 0), (0, 0), (0, -column_scales.shape[2] % LANES)
        column_scales = jnp.pad(column_scales, padding)
    row_scales = quantise.read_scales(rows) if prepared else None
    if recipe == MX:  # powers of two: exact in bfloat16
        column_scales = column_scales.astype(jnp.bfloat16)
        row_scales = row_scales if row_scales is None else row_scales.astype(jnp.bfloat16)
    values = rows.values if prepared else rows
    native = dispatch.device()[1] in NATIVE_FP8
    columns = jnp.moveaxis(weights.values, 1, 0)
    return Projection(values, row_scales, columns, column_scales, recipe, prepared, native)


def dot(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x times weights in float32; float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x,
        weights,
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _scaled_by_powers(values: jax.Array, scales: jax.Array) -> jax.Array:
    """e4m3 [chunk, C] times bfloat16 powers of two [chunk, C / 32]: bfloat16, exact.

    A product with a matrix of zeros and ones repeats every scale 32 times.
    """
    groups, c = scales.shape[1], values.shape[1]
    group = lax.broadcasted_iota(jnp.int32, (groups, c), 0)
    of_column = lax.broadcasted_iota(jnp.int32, (groups, c), 1) // 32
    spread = dot(scales, (group == of_column).astype(jnp.bfloat16))
    return (values.astype(jnp.float32) * spread).astype(jnp.bfloat16)


def _group_largest(x: jax.Array, width: int) -> jax.Array:
    """The largest of every `width` adjacent lanes, in each of them: [chunk, C]."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    step = 1
    while step < width:  # a butterfly: lane and lane ^ step exchange their maxima
        up, down = pltpu.roll(x, step, 1), pltpu.roll(x, x.shape[1] - step, 1)
        x = jnp.maximum(x, jnp.where(lane & step == 0, down, up))
        step *= 2
    return x
