"""The short convolution's kernels, interpreted on a CPU, and its reference: against the NumPy
oracle, within the same limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import GPU, Choice, UnsupportedError
from kernels_pallas.short_conv import tpu, tpu_backward, vjp
from kernels_pallas.short_conv.api import short_conv
from kernels_pallas.short_conv.shapes import TINY, Shape
from tests.kernels.cuda import lowered_for_cuda
from tests.kernels.short_conv.cases import (
    EPS,
    LIMITS,
    NAMES,
    arguments,
    cast,
    check,
    error,
    oracle_of,
    run,
)
from tests.oracle import short_conv as oracle


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two chunks to a block: several blocks, and the last may be partly empty. One column at once:
    the program is shorter (test_blocks.py has the kernel's own)."""

    def blocks(tokens, *_, **__):
        return tpu.Blocks(min(128, -(-tokens // 64) * 64))

    monkeypatch.setattr(tpu, "blocks_for", blocks)
    monkeypatch.setattr(tpu_backward, "blocks_for", blocks)
    monkeypatch.setattr(tpu, "UNROLL", 1)


def test_the_oracle_differentiates_itself():
    shape = Shape(1, 9, 2, 5, 3, 2)
    found, segments, mask, g = arguments(shape, jnp.float32)
    values = [found["u"][0], found["gain"], found["taps"]]
    fixed = segments[0], mask[0], shape.dilation, EPS
    gradients = oracle.backward(*values, *fixed, g[0])
    rng, step = np.random.default_rng(1), 1e-6
    for k, gradient in enumerate(gradients):
        for _ in range(5):
            direction = rng.normal(size=values[k].shape)
            ends = []
            for sign in (1, -1):
                moved = list(values)
                moved[k] = values[k] + sign * step * direction
                ends.append(np.sum(oracle.forward(*moved, *fixed) * g[0]))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-6)


@pytest.mark.parametrize("implementation", ["pallas", "reference"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_against_the_oracle(shape, dtype, implementation):
    """With many documents and masked tokens; then with none: only the ends have closed taps."""
    found, segments, mask, g = arguments(shape, dtype, seed=shape.tokens)
    check(found, segments, mask, g, shape, dtype, implementation)
    check(found, segments * 0, mask | True, g, shape, dtype, implementation)


def test_the_reference_of_any_width():
    """Of widths that no kernel takes."""
    shape = Shape(2, 40, 3, 24, 4, 3)
    for dtype in LIMITS:
        found, segments, mask, g = arguments(shape, dtype, seed=13)
        check(found, segments, mask, g, shape, dtype, "reference")


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed):
    """A few documents only: chunks of both kinds, all open and not, beside each other."""
    rng = np.random.default_rng(100 + seed)
    shape = Shape(
        batch=int(rng.integers(1, 3)),
        tokens=int(rng.integers(150, 400)),
        streams=int(rng.integers(1, 3)),
        d=128 * int(rng.integers(1, 4)),
        kernel=int(rng.integers(1, 9)),
        dilation=int(rng.integers(1, 9)),
    )
    found, _, _, g = arguments(shape, "float32", seed)
    starts = rng.integers(0, shape.tokens, (shape.batch, 2))
    segments = (np.arange(shape.tokens) >= starts[..., None]).sum(1)
    mask = np.arange(shape.tokens)[None] != starts[:, :1] // 2
    check(found, segments, mask, g, shape, "float32")


@pytest.mark.parametrize("more", ["segments", "mask", "neither"])
def test_without_segments_or_mask(more):
    shape = Shape(1, 70, 2, 128, 4, 3)
    found, segments, mask, g = arguments(shape, "float32", seed=12)
    segments, mask = segments if more == "segments" else None, mask if more == "mask" else None
    check(found, segments, mask, g, shape, "float32")


def test_nothing_but_arguments_is_kept():
    shape = Shape(1, 256, 2, 128, 4, 3)
    found, segments, mask, _ = arguments(shape, "float32")
    args = cast(found, "float32")
    rest = jnp.asarray(segments, jnp.int32), jnp.asarray(mask)

    def pullback_of(implementation, args):
        def conv(*args):
            return short_conv(*args, *rest, dilation=3, eps=EPS, implementation=implementation)

        return jax.vjp(conv, *args)[1]

    pullback = pullback_of("pallas", args)
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    assert kept <= sum(x.size for x in args) + 2 * shape.tokens
    pullback = pullback_of("reference", args)  # the measure measures
    assert sum(x.size for x in jax.tree.leaves(pullback)) > kept + args[0].size
    args = cast(found, "bfloat16")
    kept = sum(x.nbytes for x in jax.tree.leaves(pullback_of("reference", args)))
    assert kept <= sum(x.nbytes for x in args) + 5 * shape.tokens  # segments and mask


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("documents", [True, False])
def test_a_bad_token_reaches_what_its_taps_reach(bad, documents):
    """Forward, and backward in the gradient of u. Bit for bit everywhere else."""
    shape = Shape(1, 300, 2, 128, 4, 3)
    found, _, _, g = arguments(shape, "float32", seed=7)
    segments = np.where(np.arange(300) < 205, 0, 1)[None] if documents else None
    good, good_gradients = run("pallas", shape, found, segments, None, g, "float32")
    for t in (124, 200):  # one at the end of a block, one at the end of a document
        found["u"][0, t, 1, 5] = bad
    out, gradients = run("pallas", shape, found, segments, None, g, "float32")
    reached = [124, 127, 130, 133, 200, 203] + ([] if documents else [206, 209])
    others = np.setdiff1d(np.arange(300), reached)
    np.testing.assert_array_equal(out[:, others], good[:, others])
    np.testing.assert_array_equal(out[:, :, 0], good[:, :, 0])  # the other stream
    assert not np.isfinite(out[0, reached, 1]).all(axis=-1).any()
    # Backward the bad outputs reach back over the same taps.
    reached = {t - 3 * k for t in reached for k in range(4)}
    others = np.setdiff1d(np.arange(300), sorted(reached))
    np.testing.assert_array_equal(gradients[0][:, others], good_gradients[0][:, others])
    np.testing.assert_array_equal(gradients[0][:, :, 0], good_gradients[0][:, :, 0])


def test_a_bad_gradient_reaches_back_only():
    shape = Shape(1, 150, 1, 128, 3, 2)
    found, _, mask, g = arguments(shape, "float32", seed=8)
    mask[0, [60, 100]] = False, True
    good = run("pallas", shape, found, None, mask, g, "float32")[1][0]
    g[0, 60, 0, 3] = np.nan  # masked: it never counts
    g[0, 100, 0, 3] = np.nan
    bad = run("pallas", shape, found, None, mask, g, "float32")[1][0]
    others = np.setdiff1d(np.arange(150), [96, 98, 100])
    np.testing.assert_array_equal(bad[0, others], good[0, others])
    assert np.isnan(bad[0, [96, 98, 100], 0, 3]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-3, 1e6, 1e15])
@pytest.mark.parametrize("dtype", LIMITS)
def test_scales(scale, dtype):
    """1e-30: the mean square underflows, eps does not; 1e15: it is 1e30."""
    shape = Shape(1, 70, 2, 128, 4, 3)
    found, segments, mask, g = arguments(shape, dtype, seed=9, scale=scale)
    check(found, segments, mask, g, shape, dtype)


@pytest.mark.parametrize("what", ["zeros", "some zeros", "equal", "large taps", "no taps"])
def test_degenerate(what):
    shape = Shape(1, 70, 2, 128, 4, 3)
    found, segments, mask, g = arguments(shape, "float32", seed=10)
    if what == "zeros":
        found["u"][:] = 0
    elif what == "some zeros":
        found["u"][:, ::3] = 0
    elif what == "equal":
        found["u"][:] = 0.75
    elif what == "large taps":  # SiLU saturates on both sides
        found["taps"] *= 1e4
    else:
        found["taps"][:] = 0
    found["taps"] = np.float64(np.float32(found["taps"]))
    check(found, segments, mask, g, shape, "float32")


def test_everything_masked():
    shape = Shape(1, 70, 2, 128, 4, 3)
    found, segments, mask, g = arguments(shape, "float32")
    out, gradients = run("pallas", shape, found, segments, mask & False, g, "float32")
    for x in (out, *gradients):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (Shape(1, 4, 1, 100, 4, 3), "float32", "d = 100 is not a multiple of 128"),
        (Shape(1, 4, 1, 128, 9, 3), "float32", "kernel = 9"),
        (Shape(1, 4, 1, 128, 4, 9), "float32", "dilation = 9"),
        (Shape(1, 4, 1, 128, 4, 3), "float16", "float16 is not float32 or bfloat16"),
    ],
)
def test_limits(shape, dtype, message):
    found, segments, mask, g = arguments(shape, dtype)
    with pytest.raises(UnsupportedError, match=message):
        run("pallas", shape, found, segments, mask, g, dtype)
    assert run("auto", shape, found, segments, mask, g, dtype)[0].dtype == dtype


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [TINY[1], TINY[3], Shape(1, 70, 1, 128, 8, 8)], ids=str)
def test_gpu_kernel(shape, dtype):
    """Interpreted here, and lowered for CUDA by Pallas' Triton backend; no GPU ran it."""
    found, segments, mask, g = arguments(shape, dtype, seed=11)
    args = cast(found, dtype)
    rest = jnp.asarray(segments, jnp.int32), jnp.asarray(mask)

    def conv(interpret, *args):
        return vjp.short_conv(*args, *rest, shape.dilation, EPS, Choice(GPU, interpret))

    @jax.jit
    def both(args, g):
        out, pullback = jax.vjp(functools.partial(conv, True), *args)
        return out, pullback(g)

    out, gradients = both(args, jnp.asarray(g, dtype))
    expected, true = oracle_of(found, segments, mask, g, shape.dilation)
    assert error(out, expected) <= LIMITS[dtype][0]
    for name, ours, theirs in zip(NAMES, gradients, true, strict=True):
        assert error(ours, theirs) <= LIMITS[dtype][1], name
    assert "triton" in lowered_for_cuda(functools.partial(conv, False), *args)
