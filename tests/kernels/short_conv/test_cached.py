"""Continued sequences: reference and kernel against the oracle, and against whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.short_conv import tpu
from kernels_pallas.short_conv.api import short_conv, short_conv_cached
from kernels_pallas.short_conv.shapes import Shape
from tests.kernels.short_conv.cases import EPS, LIMITS, arguments, cast, error
from tests.oracle import short_conv as oracle


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    def blocks(tokens, *_, **__):
        return tpu.Blocks(min(128, -(-tokens // 64) * 64))

    monkeypatch.setattr(tpu, "blocks_for", blocks)
    monkeypatch.setattr(tpu, "UNROLL", 1)


def run(implementation, shape, args, tail, valid, mask):
    u, gain, taps = args

    @jax.jit
    def continued(u, tail, valid, gain, taps, mask):
        return short_conv_cached(
            u, tail, valid, gain, taps, mask,
            dilation=shape.dilation, eps=EPS, implementation=implementation,
        )  # fmt: skip

    mask = None if mask is None else jnp.asarray(mask)
    return continued(u, tail, jnp.asarray(valid, jnp.int32), gain, taps, mask)


def tail_of(shape, dtype):
    size = (shape.batch, shape.tail, shape.streams, shape.d)
    return jnp.asarray(np.random.default_rng(5).normal(size=size), dtype)


@pytest.mark.parametrize("implementation", ["pallas", "reference"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("tail_dtype", LIMITS)
@pytest.mark.parametrize("shape", [Shape(2, 150, 1, 128, 4, 3), Shape(2, 5, 2, 128, 8, 8)], ids=str)
def test_against_the_oracle(shape, dtype, tail_dtype, implementation):
    found, _, mask, _ = arguments(shape, dtype, seed=1)
    tail = tail_of(shape, tail_dtype)
    valid = [shape.tokens, 3]
    args = cast(found, dtype)
    out, new = run(implementation, shape, args, tail, valid, mask)
    assert out.dtype == jnp.promote_types(dtype, tail_dtype) and new.dtype == tail_dtype
    rounded = "bfloat16" in (dtype, tail_dtype)
    limit = 4e-3 if rounded else 1e-6
    for b in range(2):
        values = found["u"][b], np.float64(tail[b]), valid[b], found["gain"], found["taps"]
        expected, true = oracle.continued(*values, mask[b], shape.dilation, EPS)
        assert error(out[b], expected) <= limit
        assert error(new[b], true) <= (4e-3 if rounded else 1e-6)


@pytest.mark.parametrize("implementation", ["pallas", "reference"])
def test_chunks_of_a_sequence_are_the_sequence(implementation):
    """Chunk after chunk through the tail; unreal tokens at the end of one leave nothing."""
    shape = Shape(1, 200, 2, 128, 4, 3)
    found, _, mask, _ = arguments(shape, "float32", seed=2)
    u, gain, taps = cast(found, "float32")
    whole = short_conv(
        u, gain, taps, None, jnp.asarray(mask), dilation=3, eps=EPS, implementation="reference"
    )
    tail, outs = jnp.zeros((1, shape.tail, 2, 128)), []
    for start, end, unreal in ((0, 70, 0), (70, 74, 66), (74, 144, 0), (144, 200, 14)):
        chunk = jnp.pad(u[:, start:end], ((0, 0), (0, unreal), (0, 0), (0, 0)), constant_values=9)
        there = np.pad(mask[:, start:end], ((0, 0), (0, unreal)))
        args = chunk, gain, taps
        out, tail = run(implementation, shape, args, tail, [end - start], there)
        outs.append(out[:, : end - start])
    assert error(jnp.concatenate(outs, axis=1), whole) <= 1e-6


@pytest.mark.parametrize("implementation", ["pallas", "reference"])
def test_where_a_bfloat16_sequence_is_cut_changes_no_bit(implementation):
    """What a tail keeps was rounded to bfloat16: so was what the tokens of its chunk read of it."""
    shape = Shape(1, 24, 1, 128, 4, 3)
    found, _, _, _ = arguments(shape, "bfloat16", seed=6)
    u, gain, taps = cast(found, "bfloat16")
    tail, outs = jnp.zeros((1, shape.tail, 1, 128), jnp.bfloat16), []
    whole, last = run(implementation, shape, (u, gain, taps), tail, [24], None)
    for start in (0, 12):
        args = u[:, start : start + 12], gain, taps
        out, tail = run(implementation, shape, args, tail, [12], None)
        outs.append(out)
    np.testing.assert_array_equal(jnp.concatenate(outs, axis=1), whole)
    np.testing.assert_array_equal(tail, last)


def test_the_kernel_differentiates():
    """As the reference does: nobody trains through a cache, but nothing stands in the way."""
    shape = Shape(1, 20, 1, 128, 4, 3)
    found, _, mask, _ = arguments(shape, "float32", seed=3)
    u, gain, taps = cast(found, "float32")
    tail, valid = tail_of(shape, "float32"), jnp.asarray([17])

    def gradients(implementation):
        def loss(u, tail, gain, taps):
            out, new = short_conv_cached(
                u, tail, valid, gain, taps, jnp.asarray(mask),
                dilation=3, eps=EPS, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(new))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(u, tail, gain, taps)

    for ours, theirs in zip(gradients("pallas"), gradients("reference"), strict=True):
        assert error(ours, theirs) <= 1e-5


def test_no_history():
    """K = 1: nothing is kept; the kernel says that it wants a history."""
    shape = Shape(1, 9, 1, 128, 1, 1)
    found, _, mask, _ = arguments(shape, "float32")
    args, tail = cast(found, "float32"), tail_of(shape, "float32")
    out, new = run("auto", shape, args, tail, [9], mask)
    values = found["u"][0], np.float64(tail[0]), 9, found["gain"], found["taps"]
    assert error(out[0], oracle.continued(*values, mask[0], 1, EPS)[0]) <= 1e-6
    assert new.shape == (1, 0, 1, 128)
    with pytest.raises(UnsupportedError, match="history"):
        run("pallas", shape, args, tail, [9], mask)
