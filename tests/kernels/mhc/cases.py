"""Random arguments of mHC: float64 for the oracle, and in the dtype for the kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import mhc as oracle

LIMITS = {"float32": (1e-5, 1e-5), "bfloat16": (4e-3, 1e-2)}  # forward, gradients
OPTIONS = {"iterations": 20, "eps": 1e-6, "transpose": False}


def exact(values, dtype):
    """Rounded to the dtype."""
    return np.asarray(jnp.asarray(values, dtype), np.float64)


def pre_arguments(shape, dtype, seed=0):
    """[x, fn, base, scale, gain], cotangents of (collapsed, post, res, x)."""
    rng = np.random.default_rng(seed)
    t, n, d, c = shape.tokens, shape.streams, shape.d, shape.coefficients

    def normal(*size, dtype=jnp.float32):
        return exact(rng.normal(size=size), dtype)

    x = normal(t, n, d, dtype=dtype)
    fn = exact(normal(n * d, c) * (n * d) ** -0.5, jnp.float32)
    scale = exact([1.25, 0.75, 0.5], jnp.float32)
    gain = exact(1 + 0.25 * normal(n * d), jnp.float32)
    g = normal(t, d, dtype=dtype), normal(t, n), normal(t, n, n)
    return [x, fn, normal(c), scale, gain], (*g, normal(t, n, d, dtype=dtype))


def merge_arguments(shape, dtype, seed=0):
    """[x, y, post, res], cotangent."""
    rng = np.random.default_rng(seed)
    t, n, d = shape.tokens, shape.streams, shape.d
    x, y, g = (exact(rng.normal(size=s), dtype) for s in ((t, n, d), (t, d), (t, n, d)))
    post, res = (exact(rng.normal(size=s), jnp.float32) for s in ((t, n), (t, n, n)))
    return [x, y, post, res], g


def cast(values, dtype, wide):
    """The first `wide` arrays in the dtype, parameters and coefficients in float32."""
    return [jnp.asarray(v, dtype if k < wide else jnp.float32) for k, v in enumerate(values)]


def compiled(function, *args):
    """function(*args), its program compiled in a hurry: interpreted kernels are long programs."""
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*args).compile(quick)(*args)


def with_gradients(function, args, g):
    def both(args, g):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(g)

    return compiled(both, args, g)


def error(ours, want):
    """Relative L2 error."""
    ours, want = np.asarray(ours, np.float64), np.asarray(want, np.float64)
    assert ours.shape == want.shape
    assert np.all(np.isfinite(ours))
    return np.linalg.norm(ours - want) / max(np.linalg.norm(want), 1e-300)


def expected_pre(values, g, **options):
    return oracle.pre(*values, **options), oracle.pre_gradients(*values, g, **options)
