"""mHC's kernels, interpreted on a CPU, against the NumPy oracle: outputs and gradients."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.dispatch import GPU, Choice, UnsupportedError
from kernels_pallas.mhc import gpu, tpu, tpu_backward, tpu_blocks, tpu_merge, vjp
from kernels_pallas.mhc.api import mhc_merge, mhc_pre
from kernels_pallas.mhc.shapes import TINY, Shape
from tests.kernels.cuda import lowered_for_cuda
from tests.kernels.mhc.cases import (
    LIMITS,
    OPTIONS,
    cast,
    compiled,
    error,
    expected_pre,
    merge_arguments,
    pre_arguments,
    with_gradients,
)
from tests.oracle import mhc as oracle

NAMES = ("x", "fn", "base", "scale", "gain")
SMALL = Shape(150, 2, 128)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that there are several blocks, the last of them partly empty."""
    for module in (tpu, tpu_backward, tpu_merge):
        monkeypatch.setattr(module, "blocks_for", lambda *_: tpu_blocks.Blocks(128, 128))


def pre(implementation="pallas", **options):
    return functools.partial(mhc_pre, **(OPTIONS | options), implementation=implementation)


def merge(implementation="pallas"):
    return functools.partial(mhc_merge, implementation=implementation)


def as_cotangents(g, dtype):
    collapsed, post, res, x = g
    wide = (jnp.asarray(a, jnp.float32) for a in (post, res))
    return jnp.asarray(collapsed, dtype), *wide, jnp.asarray(x, dtype)


def slopes(loss, values, gradients, seed=0):
    """Each gradient along random directions: (by hand, central difference)."""
    rng, step = np.random.default_rng(seed), 1e-6
    for k, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.normal(size=np.shape(values[k]))
            ends = []
            for sign in (1, -1):
                moved = list(values)
                moved[k] = values[k] + sign * step * direction
                ends.append(loss(moved))
            yield np.sum(gradient * direction), (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_oracle_differentiates_itself(transpose):
    options = {"iterations": 3, "eps": 1e-3, "transpose": transpose}
    values, g = pre_arguments(Shape(2, 3, 5), jnp.float32)

    def loss(values):
        out = oracle.pre(*values, **options)
        return sum(np.sum(a * b) for a, b in zip(out, g, strict=True))

    gradients = oracle.pre_gradients(*values, g, **options)
    for by_hand, difference in slopes(loss, values, gradients):
        np.testing.assert_allclose(by_hand, difference, rtol=1e-6, atol=1e-8)


def test_the_oracle_differentiates_merging():
    values, g = merge_arguments(Shape(2, 3, 5), jnp.float32)
    gradients = oracle.merge_gradients(*values, g)
    for by_hand, difference in slopes(lambda v: np.sum(oracle.merge(*v) * g), values, gradients):
        np.testing.assert_allclose(by_hand, difference, rtol=1e-6, atol=1e-8)


CASES = [
    (TINY[0], "float32", True),
    (TINY[1], "bfloat16", True),
    (TINY[2], "float32", False),
    pytest.param(TINY[3], "bfloat16", True, marks=pytest.mark.slow),
    pytest.param(TINY[2], "bfloat16", True, marks=pytest.mark.slow),
    pytest.param(TINY[3], "float32", True, marks=pytest.mark.slow),
    pytest.param(TINY[4], "float32", False, marks=pytest.mark.slow),
    pytest.param(TINY[4], "bfloat16", True, marks=pytest.mark.slow),
    *(pytest.param(Shape(9, n, 128), "float32", n % 2 == 0, marks=pytest.mark.slow)
      for n in (5, 6, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype", "transpose"), CASES)
def test_pre_and_its_gradients(shape, dtype, transpose):
    values, g = pre_arguments(shape, dtype)
    options = OPTIONS | {"transpose": transpose}
    args, cotangents = cast(values, dtype, 1), as_cotangents(g, dtype)
    want, want_gradients = expected_pre(values, g, **options)
    forward, backward = LIMITS[dtype]
    for implementation in ("pallas", "reference"):
        function = pre(implementation, transpose=transpose)
        out, gradients = with_gradients(function, args, cotangents)
        for name, ours, exact in zip(("collapsed", "post", "res", "x"), out, want, strict=True):
            limit = forward if name == "collapsed" else 1e-5  # coefficients are float32 always
            assert error(ours, exact) <= limit, (implementation, name)
        for name, ours, exact in zip(NAMES, gradients, want_gradients, strict=True):
            limit = backward if name == "x" else 1e-5
            assert error(ours, exact) <= limit, (implementation, name)
        assert [a.dtype for a in out] == [dtype, jnp.float32, jnp.float32, dtype]
        assert [a.dtype for a in gradients] == [a.dtype for a in args]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (TINY[0], "bfloat16"),
        (TINY[2], "float32"),
        (TINY[3], "bfloat16"),
        (TINY[4], "float32"),
        *(pytest.param(shape, dtype, marks=pytest.mark.slow) for shape in TINY for dtype in LIMITS),
    ],
)
def test_merge_and_its_gradients(shape, dtype):
    values, g = merge_arguments(shape, dtype)
    args, cotangent = cast(values, dtype, 2), jnp.asarray(g, dtype)
    forward, backward = LIMITS[dtype]
    wanted = oracle.merge_gradients(*values, g)
    for implementation in ("pallas", "reference"):
        out, gradients = with_gradients(merge(implementation), args, cotangent)
        assert error(out, oracle.merge(*values)) <= forward
        for k, (ours, exact) in enumerate(zip(gradients, wanted, strict=True)):
            assert error(ours, exact) <= (backward if k < 2 else 1e-5), (implementation, k)
        assert [a.dtype for a in gradients] == [a.dtype for a in args]


@pytest.mark.parametrize("iterations", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_few_iterations_and_a_large_eps(iterations):
    values, g = pre_arguments(SMALL, "float32", seed=3)
    options = {"iterations": iterations, "eps": 0.05, "transpose": True}
    out, gradients = with_gradients(
        pre(**options), cast(values, "float32", 1), as_cotangents(g, "float32")
    )
    want, want_gradients = expected_pre(values, g, **options)
    for ours, exact in zip((*out, *gradients), (*want, *want_gradients), strict=True):
        assert error(ours, exact) <= 1e-5


def test_mixing_is_doubly_stochastic():
    """Logits as wide as a trained network's: their products spread by 2.5."""
    values, _ = pre_arguments(Shape(200, 4, 128), "float32")
    values[2] = np.zeros_like(values[2])
    _, post, res, _ = compiled(pre(), *cast(values, "float32", 1))
    np.testing.assert_allclose(np.sum(res, -1), 1, atol=1e-3)
    np.testing.assert_allclose(np.sum(res, -2), 1, atol=1e-3)
    assert np.all((np.asarray(post) > 0) & (np.asarray(post) < 2))
    assert np.min(res) > 0


def test_what_is_not_a_number_stays_in_its_token():
    bad = {3: np.inf, 77: -np.inf, 130: np.nan}
    others = ~np.isin(np.arange(SMALL.tokens), list(bad))
    values, g = pre_arguments(SMALL, "float32")
    run = functools.partial(with_gradients, pre(), g=as_cotangents(g, "float32"))
    clean, _ = run(args=cast(values, "float32", 1))
    for token, value in bad.items():
        values[0][token, 1, 7] = value
    out, gradients = run(args=cast(values, "float32", 1))
    for ours, before in zip(out, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[others], np.asarray(before)[others])
    assert np.all(np.isfinite(np.asarray(gradients[0])[others]))
    for token in bad:
        assert not np.all(np.isfinite(np.asarray(out[0])[token]))

    values, g = merge_arguments(SMALL, "float32")
    for token, value in bad.items():
        values[0][token, 1, 7] = value
    out, gradients = with_gradients(merge(), cast(values, "float32", 2), jnp.asarray(g, "float32"))
    for ours in (out, *gradients):
        assert np.all(np.isfinite(np.asarray(ours)[others]))
    for token in bad:
        assert not np.any(np.isfinite(np.asarray(out)[token, :, 7]))


def test_rows_of_zeros_equal_rows_and_extreme_scales():
    shape = Shape(6, 3, 128)
    values, g = pre_arguments(shape, "float32")
    x = values[0]
    x[0] = 0
    x[1] = 1
    x[2] *= 1e-30
    x[3] *= 1e15
    x[4] *= 1e-4
    x[5] *= 1e4
    values[0] = x = np.float64(np.float32(x))
    out, gradients = with_gradients(pre(), cast(values, "float32", 1), as_cotangents(g, "float32"))
    want, want_gradients = expected_pre(values, g, **OPTIONS)
    for t in range(shape.tokens):  # one by one: a large token would hide the others
        for ours, exact in zip((*out, gradients[0]), (*want, want_gradients[0]), strict=True):
            assert error(ours[t], exact[t]) <= 1e-5, t
    for ours, exact in zip(gradients[1:], want_gradients[1:], strict=True):
        assert error(ours, exact) <= 1e-5


def test_logits_out_of_range_stay_finite():
    values, g = pre_arguments(Shape(4, 4, 128), "float32")
    values[2] = np.float64(np.float32(80 * np.random.default_rng(1).normal(size=24)))
    out, gradients = with_gradients(pre(), cast(values, "float32", 1), as_cotangents(g, "float32"))
    want, _ = expected_pre(values, g, **OPTIONS)
    for ours, exact in zip(out, want, strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-4)
    assert all(np.all(np.isfinite(a)) for a in gradients)


def test_golden_deepseek_v4(golden):
    """The released form and its gradients. Its width is not the kernel's: streams stand there
    `copies` times, which keeps their mean square, and fn is divided by that number."""
    data = golden("mhc")
    n, d = data["streams"].shape[2:]
    copies = 128 // np.gcd(128, d)

    def tiled(name):
        return jnp.asarray(np.tile(data[name], copies), jnp.float32)

    def added(x):
        """Over the copies."""
        x = np.asarray(x, np.float64)
        return x.reshape(*x.shape[:-1], copies, d).sum(-2)

    fn = data["param.fn"].T.reshape(n, 1, d, -1) / copies
    fn = np.repeat(fn, copies, axis=1).reshape(n * copies * d, -1)
    params = [jnp.asarray(a, jnp.float32) for a in (fn, data["param.base"], data["param.scale"])]
    around = pre(iterations=int(data["sinkhorn_iters"]), eps=float(data["eps"]), transpose=True)

    def layer(x, y, *params):
        collapsed, post, res, x = around(x, *params)
        return collapsed, merge()(x, y, post, res), post, res

    cotangents = [tiled(f"cotangent_{name}") / copies for name in ("collapsed", "output")]
    coefficients = [jnp.zeros(data[name].shape, jnp.float32) for name in ("post", "comb")]
    out, (grad_x, grad_y, grad_fn, grad_base, grad_scale) = with_gradients(
        layer, [tiled("streams"), tiled("sublayer_output"), *params], (*cotangents, *coefficients)
    )
    collapsed, after, post, res = out
    pairs = {
        "collapsed": (collapsed, tiled("collapsed")),
        "output": (after, tiled("output")),
        "post": (post, data["post"]),
        "comb": (np.swapaxes(res, -1, -2), data["comb"]),
        "grad_streams": (added(grad_x), data["grad_streams"]),
        "grad_sublayer_output": (added(grad_y), data["grad_sublayer_output"]),
        "grad.fn": (added(grad_fn.T.reshape(-1, n, copies * d)), data["grad.fn"] * copies),
        "grad.base": (grad_base, data["grad.base"]),
        "grad.scale": (grad_scale, data["grad.scale"]),
    }
    for name, (got, want) in pairs.items():
        assert error(np.reshape(got, np.shape(want)), want) <= 1e-5, name


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((2, 4, 100), "float32", {}, "d = 100 is not a multiple of 128"),
        ((2, 9, 128), "float32", {}, "9 streams are not 1 to 8"),
        ((2, 4, 128), "float16", {}, "float16 is not float32 or bfloat16"),
        ((0, 4, 128), "float32", {}, "there are no tokens"),
        ((2, 8, 5120), "float32", {}, r"128 tokens of \[8, 5120\] need \d+ MiB of VMEM, of 62"),
        ((2, 4, 128), "float32", {"iterations": 0}, "0 Sinkhorn iterations are less than 1"),
    ],
)
def test_what_the_kernel_cannot_take(shape, dtype, options, message):
    n, d = shape[1:]
    args = [
        jnp.zeros(shape, dtype),
        *(jnp.zeros(s) for s in ((n * d, 2 * n + n * n), 2 * n + n * n, 3)),
    ]
    with pytest.raises(UnsupportedError, match=message):
        pre(**options)(*args)
    if not options:
        with pytest.raises(UnsupportedError, match=message):
            merge()(args[0], args[0][:, 0], jnp.zeros((2, n)), jnp.zeros((2, n, n)))


def test_coefficients_of_another_dtype_are_refused():
    x = jnp.zeros((2, 4, 128))
    with pytest.raises(UnsupportedError, match="post is float32 and res bfloat16, not float32"):
        merge()(x, x[:, 0], jnp.zeros((2, 4)), jnp.zeros((2, 4, 4), jnp.bfloat16))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(33, 3, 128), "float32"),
        pytest.param(Shape(70, 4, 256), "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_gpu_kernels(shape, dtype):
    """Interpreted, and lowered for CUDA; gradients are the reference's."""
    choice = Choice(GPU, interpret=True)
    options = vjp.Options(**OPTIONS)
    forward, backward = LIMITS[dtype]
    values, g = pre_arguments(shape, dtype)
    values[4] = np.ones_like(values[4])
    args = cast(values, dtype, 1)[:4]
    out, gradients = with_gradients(
        lambda *a: vjp.pre(*a, options, choice), args, as_cotangents(g, dtype)
    )
    want, want_gradients = expected_pre(values, g, **OPTIONS)
    for k, (ours, exact) in enumerate(zip(out, want, strict=True)):
        assert error(ours, exact) <= (1e-5 if k else forward)
    for k, (ours, exact) in enumerate(zip(gradients, want_gradients[:4], strict=True)):
        assert error(ours, exact) <= (1e-5 if k else backward)

    values, g = merge_arguments(shape, dtype)
    merged = cast(values, dtype, 2)
    out, gradients = with_gradients(lambda *a: vjp.merge(*a, choice), merged, jnp.asarray(g, dtype))
    assert error(out, oracle.merge(*values)) <= forward
    for ours, exact in zip(gradients, oracle.merge_gradients(*values, g), strict=True):
        assert error(ours, exact) <= backward

    entries = merged[3].reshape(shape.tokens, -1)
    for name, kernel, operands in (
        ("mhc_pre", functools.partial(gpu.pre, **OPTIONS), args),
        ("mhc_merge", gpu.merge, [*merged[:3], entries]),
    ):
        assert name in lowered_for_cuda(kernel, *operands)
