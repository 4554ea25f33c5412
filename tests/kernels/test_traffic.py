"""Bytes that kernels and XLA's instructions move, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from engram_jax.aot.one_chip import compile_operation, xla_bytes
from kernels_pallas.traffic import kernel_bytes


def product(x, w, order):
    """[512, 64] x [64, 512] in 4 x 2 blocks of [128, 256]; order: which index moves faster."""

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def at(i, j):
        return (i, j) if order == "rows first" else (j, i)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((512, 512), jnp.float32),
        grid=(4, 2) if order == "rows first" else (2, 4),
        in_specs=[
            pl.BlockSpec((128, 64), lambda i, j: (at(i, j)[0], 0)),
            pl.BlockSpec((64, 256), lambda i, j: (0, at(i, j)[1])),
        ],
        out_specs=pl.BlockSpec((128, 256), at),
        name="product",
    )(x, w)


@pytest.mark.parametrize(
    ("order", "rows", "columns"),
    [
        ("rows first", 4, 4 * 2),  # the columns' blocks alternate under each block of rows
        ("columns first", 2 * 4, 2),
    ],
)
def test_blocks_are_fetched_when_their_index_changes(order, rows, columns):
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 64), (64, 512)))
    expected = 4 * (rows * 128 * 128 + columns * 64 * 256 + 512 * 512)  # 64 columns take 128 lanes
    once = jax.jit(lambda x, w: product(x, w, order) + 1)  # found inside jit
    assert kernel_bytes(once, x, w) == {"product": expected}
    twice = kernel_bytes(lambda x, w: once(x, w) * once(x, w), x, w)
    assert twice == {"product": 2 * expected}


def test_kernels_in_loops_and_rows_of_whole_lanes():
    """[8, 3] lies in rows of 128 lanes; five rounds of a scan are five times as much."""

    def kernel(x, out):
        out[...] = x[...]

    def copied(x):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=like, name="copy")(x)

    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    assert kernel_bytes(copied, x) == {"copy": 2 * 4 * 8 * 128}
    looped = kernel_bytes(lambda x: jax.lax.scan(lambda x, _: (copied(x), None), x, length=5), x)
    assert looped == {"copy": 5 * 2 * 4 * 8 * 128}
    with pytest.raises(ValueError, match="while loop"):
        kernel_bytes(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, copied, x), x)


HLO = """HloModule m, entry_computation_layout={()->()}

%body (p: (s32[], f32[256,128])) -> (s32[], f32[256,128]) {
  %p = (s32[], f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[256,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[256,128]{1,0:T(8,128)} negate(%x)
  ROOT %t = (s32[], f32[256,128]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (p: (s32[], f32[256,128])) -> pred[] {
  %p = (s32[], f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[256,128], b: f32[8,4]) -> f32[256,128] {
  %a = f32[256,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,4]{1,0:T(8,128)} parameter(1)
  %start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]) copy-start(%b)
  %done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%start)
  %near = f32[8,4]{1,0:T(8,128)S(1)} negate(%done)
  %k = f32[256,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call"
  %zero = s32[] constant(0)
  %state = (s32[], f32[256,128]{1,0:T(8,128)}) tuple(%zero, %k)
  %loop = (s32[], f32[256,128]{1,0:T(8,128)}) while(%state), condition=%condition, body=%body
  ROOT %out = f32[256,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_instructions_of_xla_by_hand():
    """The small array is padded to a tile and read once; in VMEM it is free; the loop runs thrice
    (two arrays and the counter's three words each time); the kernel does not count."""
    tile, array, words = 8 * 128 * 4, 256 * 128 * 4, 3 * 4
    assert xla_bytes(HLO) == tile + 3 * (2 * array + words)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="how often loop runs"):
        xla_bytes(HLO.replace("direction=LT", "direction=EQ"))


def test_one_operation_on_one_chip(tpu_slice):
    topology, _ = tpu_slice("v5e:2x2")
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    found = compile_operation(topology, lambda x: x * 2, x)
    assert found.bytes == found.xla_bytes == 2 * 4 * 1024 * 1024
    assert found.memory.argument == 4 * 1024 * 1024 and found.vmem == 0
