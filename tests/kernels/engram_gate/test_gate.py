"""The gate's kernels, interpreted on a CPU, and its reference against the NumPy oracle: outputs and
gradients, within the same limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import GPU, Choice
from kernels_pallas.engram_gate import quantise, tpu, tpu_backward, vjp
from kernels_pallas.engram_gate.api import engram_gate
from kernels_pallas.engram_gate.quantise import RECIPES
from kernels_pallas.engram_gate.shapes import TINY, Shape
from tests.kernels.cuda import lowered_for_cuda
from tests.kernels.engram_gate.cases import NAMES, arguments, cast, error, through_fp8
from tests.oracle import engram_gate as oracle

EPS = 1e-6
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (4e-3, 1e-2)}  # forward, gradients

both_forms = pytest.mark.parametrize("implementation", ["pallas", "reference"])


def run(implementation, mask, recipe=None, eps=EPS):
    return functools.partial(
        lambda *args: engram_gate(
            *args, mask, eps=eps, recipe=recipe, implementation=implementation
        )
    )


def with_gradients(function, args, g):
    """(outputs, gradients); jitted, so that every piece compiles once, and in a hurry."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(args, g):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(g)

    return both(args, g)


def cotangents(g, dtype):
    return jnp.asarray(g[0], dtype), jnp.asarray(g[1], jnp.float32)


def test_the_oracle_differentiates_itself():
    found, mask, g = arguments(Shape(3, 4, 2, 5), jnp.float32)
    values = [found[n] for n in NAMES]

    def loss(values):
        out, gates = oracle.forward(*values, mask, EPS)
        return np.sum(out * g[0]) + np.sum(gates * g[1])

    gradients = oracle.backward(*values, mask, EPS, *g)
    rng, step = np.random.default_rng(1), 1e-6
    for k, gradient in enumerate(gradients):
        for _ in range(5):
            direction = rng.normal(size=values[k].shape)
            ends = []
            for sign in (1, -1):
                moved = list(values)
                moved[k] = values[k] + sign * step * direction
                ends.append(loss(moved))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-6)


@both_forms
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", TINY, ids=str)
def test_against_the_oracle(shape, dtype, implementation, monkeypatch):
    """Blocks so small that there are several, the last of them partly empty."""
    blocks = tpu.Blocks(64, 128, 32)
    monkeypatch.setattr(tpu, "blocks_for", lambda *_: blocks)
    monkeypatch.setattr(tpu_backward, "blocks_for", lambda *_: blocks)
    found, mask, g = arguments(shape, dtype)
    values = [found[n] for n in NAMES]
    args = cast(found, dtype)
    out, gradients = with_gradients(
        run(implementation, jnp.asarray(mask)), args, cotangents(g, dtype)
    )
    assert [x.dtype for x in (*out, *gradients)] == [dtype, jnp.float32, *(a.dtype for a in args)]
    forward, backward = LIMITS[dtype]
    expected = oracle.forward(*values, mask, EPS)
    assert error(out[0], expected[0]) <= forward
    np.testing.assert_allclose(out[1], expected[1], atol=1e-5)
    for name, ours, true in zip(
        NAMES, gradients, oracle.backward(*values, mask, EPS, *g), strict=True
    ):
        assert error(ours, true) <= backward, name


def test_no_bias_and_no_mask():
    shape = TINY[2]
    found, _, g = arguments(shape, "float32", seed=3)
    found["bias"] *= 0
    args, everywhere = cast(found, "float32")[:4], np.ones(shape.tokens, bool)
    out, gradients = with_gradients(run("pallas", None), (*args, None), cotangents(g, "float32"))
    values = [found[n] for n in NAMES]
    assert error(out[0], oracle.forward(*values, everywhere, EPS)[0]) <= 1e-5
    true = oracle.backward(*values, everywhere, EPS, *g)
    assert gradients[4] is None
    for ours, expected in zip(gradients[:4], true[:4], strict=True):
        assert error(ours, expected) <= 1e-4


def test_kernel_equals_the_reference_over_leading_dimensions():
    found, mask, g = arguments(Shape(60, 128, 4, 128), "float32")
    args = cast(found, "float32")
    args[0], args[2] = (x.reshape(3, 20, *x.shape[1:]) for x in (args[0], args[2]))
    g = tuple(x.reshape(3, 20, *x.shape[1:]) for x in cotangents(g, "float32"))
    mask = jnp.asarray(mask).reshape(3, 20)
    ours, theirs = (with_gradients(run(i, mask), args, g) for i in ("pallas", "reference"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert error(a, b) <= 1e-4


@both_forms
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("prepared", [False, True], ids=["rounded in the kernel", "FP8 arguments"])
def test_fp8(recipe, prepared, implementation, monkeypatch):
    """As exact as without FP8 for what FP8 leaves, and within 5 % of what it was."""
    monkeypatch.setattr(tpu, "blocks_for", lambda *_: tpu.Blocks(64, 128, 32))
    shape = Shape(100, 256, 3, 256)
    found, mask, g = arguments(shape, "bfloat16", seed=5)
    rounded = through_fp8(found, recipe, jnp.bfloat16)
    args = cast(found, jnp.bfloat16)
    if prepared:
        args[0] = quantise.quantise_rows(args[0], recipe)
        args[1] = quantise.quantise_weights(args[1], recipe)
    function = run(implementation, jnp.asarray(mask), recipe)
    out = jax.jit(function)(*args)
    expected = oracle.forward(*(rounded[n] for n in NAMES), mask, EPS)
    assert error(out[0], expected[0]) <= 4e-3
    assert error(out[0], oracle.forward(*(found[n] for n in NAMES), mask, EPS)[0]) <= 5e-2
    if prepared:
        return
    _, gradients = with_gradients(function, args, cotangents(g, jnp.bfloat16))
    same = oracle.backward(*(rounded[n] for n in NAMES), mask, EPS, *g)
    for name, ours, true in zip(NAMES, gradients, same, strict=True):
        assert error(ours, true) <= 1e-2, name


@both_forms
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_of_float32_parameters(recipe, implementation):
    """They are used in the rows' dtype: what FP8 makes of them is what it makes of them there."""
    found, mask, g = arguments(Shape(40, 256, 2, 256), "bfloat16", seed=6)
    found["weights"] = arguments(Shape(40, 256, 2, 256), "float32", seed=6)[0]["weights"]
    args = cast(found, jnp.bfloat16)
    wide = [args[0], jnp.asarray(found["weights"], jnp.float32), *args[2:]]
    assert not np.array_equal(wide[1], args[1].astype(jnp.float32))
    function = run(implementation, jnp.asarray(mask), recipe)
    ours, narrow = (with_gradients(function, a, cotangents(g, jnp.bfloat16)) for a in (wide, args))
    assert ours[1][1].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(narrow), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


@both_forms
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_arguments_are_constants(recipe, implementation):
    """They get no gradient; the others' are those of the rounded arguments."""
    shape = Shape(32, 128, 2, 128)
    found, mask, g = arguments(shape, "float32")
    args = cast(found, jnp.float32)
    rows = quantise.quantise_rows(args[0], recipe)
    weights = quantise.quantise_weights(args[1], recipe)
    rounded = [through_fp8(found, recipe, jnp.float32)[n] for n in NAMES]

    @jax.jit
    def gradients(*args):
        return jax.vjp(run(implementation, jnp.asarray(mask)), *args)[1](cotangents(g, "float32"))

    of_rows, of_weights, *others = gradients(rows, weights, *args[2:])
    for constant in (of_rows, of_weights):
        if recipe != "mx":  # whose scales are whole numbers and have no gradient to begin with
            assert not np.any(constant.scales)
    true = oracle.backward(*rounded, mask, EPS, *g)[2:]
    for ours, expected in zip(others, true, strict=True):
        assert error(ours, expected) <= 1e-2


def test_nothing_as_large_as_the_keys_is_kept():
    shape = Shape(256, 128, 4, 128)
    found, mask, _ = arguments(shape, "float32")
    args = cast(found, "float32")
    _, pullback = jax.vjp(run("pallas", jnp.asarray(mask)), *args)
    kept = sum(x.size for x in jax.tree.leaves(pullback))
    statistics = 4 * shape.tokens * shape.streams
    assert kept <= sum(x.size for x in args) + statistics + shape.tokens
    _, pullback = jax.vjp(run("reference", jnp.asarray(mask)), *args)  # the measure measures
    assert sum(x.size for x in jax.tree.leaves(pullback)) > kept + args[2].size
    args = cast(found, "bfloat16")
    _, pullback = jax.vjp(run("reference", jnp.asarray(mask)), *args)
    kept = sum(x.nbytes for x in jax.tree.leaves(pullback))
    assert kept <= sum(x.nbytes for x in args) + shape.tokens


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", [None, "block"])
def test_a_bad_token_stays_alone(bad, recipe):
    shape = Shape(70, 128, 2, 128)
    found, _, _ = arguments(shape, "float32")
    good = run("pallas", None, recipe)(*cast(found, "float32"))
    found["rows"][7, 3] = bad
    found["streams"][40, 1, 5] = bad
    out, gates = run("pallas", None, recipe)(*cast(found, "float32"))
    others = np.setdiff1d(np.arange(70), [7, 40])
    np.testing.assert_array_equal(out[others], good[0][others])
    np.testing.assert_array_equal(gates[others], good[1][others])
    np.testing.assert_array_equal(out[40, 0], good[0][40, 0])  # the other branch of the token
    assert np.isnan(out[7]).all() and np.isnan(gates[40, 1])


@both_forms
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", LIMITS)
def test_scales_of_rows(scale, dtype, implementation):
    found, mask, _ = arguments(Shape(33, 128, 2, 128), dtype)
    args = cast(found, dtype)
    args[0] = (args[0].astype(jnp.float32) * scale).astype(dtype)
    found["rows"] = np.float64(args[0])
    out = jax.jit(run(implementation, jnp.asarray(mask)))(*args)
    expected = oracle.forward(*(found[n] for n in NAMES), mask, EPS)
    assert error(out[0], expected[0]) <= LIMITS[dtype][0]


@pytest.mark.parametrize("what", ["rows of zeros", "equal rows", "streams of zeros"])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_degenerate_tokens(what, recipe):
    shape = Shape(40, 128, 2, 128)
    found, mask, g = arguments(shape, "float32")
    if what == "rows of zeros":
        found["rows"][::2] = 0
        found["bias"] *= 0
    elif what == "equal rows":
        found["rows"][:] = found["rows"][0]
    else:
        found["streams"][::3] = 0
    out, gradients = with_gradients(
        run("pallas", jnp.asarray(mask), recipe), cast(found, "float32"), cotangents(g, "float32")
    )
    rounded = through_fp8(found, recipe, "float32")
    values = [rounded[n] for n in NAMES]
    assert error(out[0], oracle.forward(*values, mask, EPS)[0]) <= 1e-5
    for name, ours, true in zip(
        NAMES, gradients, oracle.backward(*values, mask, EPS, *g), strict=True
    ):
        assert error(ours, true) <= 1e-2, name


# ---- GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, *RECIPES])
@pytest.mark.parametrize("shape", [TINY[1], TINY[2]], ids=str)
def test_gpu_kernel(recipe, shape):
    """Interpreted here, and lowered for CUDA by Pallas' Triton backend; no GPU ran it."""
    found, mask, g = arguments(shape, "bfloat16")
    args = [*cast(found, jnp.bfloat16), jnp.asarray(mask)]
    rounded = through_fp8(found, recipe, jnp.bfloat16)
    values = [rounded[n] for n in NAMES]

    def gate(interpret):
        return lambda *args: vjp.engram_gate(*args, EPS, recipe, Choice(GPU, interpret))

    out, gradients = with_gradients(
        lambda *a: gate(True)(*a, args[-1]), args[:-1], cotangents(g, jnp.bfloat16)
    )
    assert error(out[0], oracle.forward(*values, mask, EPS)[0]) <= 4e-3
    for name, ours, true in zip(
        NAMES, gradients, oracle.backward(*values, mask, EPS, *g), strict=True
    ):
        assert error(ours, true) <= 1e-2, name
    assert "triton" in lowered_for_cuda(gate(False), *args)


def test_gpu_backward_goes_through_chunks_of_tokens(monkeypatch):
    monkeypatch.setattr(vjp, "RECOMPUTED_AT_ONCE", 16)
    found, mask, g = arguments(Shape(40, 128, 2, 128), "float32")
    args = cast(found, "float32")
    _, gradients = with_gradients(
        lambda *a: vjp.engram_gate(*a, jnp.asarray(mask), EPS, None, Choice(GPU, True)),
        args,
        cotangents(g, "float32"),
    )
    true = oracle.backward(*(found[n] for n in NAMES), mask, EPS, *g)
    for name, ours, expected in zip(NAMES, gradients, true, strict=True):
        assert error(ours, expected) <= 1e-4, name
