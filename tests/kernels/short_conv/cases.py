"""Random arguments of the short convolution: float64 for the oracle, and as kernels get them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.short_conv.api import short_conv
from tests.oracle import short_conv as oracle

EPS = 1e-6
NAMES = ("u", "gain", "taps")
LIMITS = {"float32": (1e-6, 1e-6), "bfloat16": (4e-3, 1e-2)}  # forward, gradients


def arguments(shape, dtype, seed=0, scale=1.0):
    """({name: float64}, segments [B, T], mask [B, T], g [B, T, M, d]); exact in `dtype`.

    Documents of about eight tokens; a tenth of the tokens is masked, u is not 0 there.
    """
    rng = np.random.default_rng(seed)
    size = (shape.batch, shape.tokens, shape.streams, shape.d)

    def normal(*size, dtype=dtype):
        return np.asarray(jnp.asarray(rng.normal(size=size), dtype), np.float64)

    found = {
        "u": np.asarray(jnp.asarray(normal(*size) * scale, dtype), np.float64),
        "gain": 1 + 0.125 * normal(*size[2:], dtype=jnp.bfloat16),
        "taps": normal(shape.kernel, *size[2:], dtype=jnp.float32),
    }
    segments = np.cumsum(rng.random(size[:2]) < 0.125, axis=1)
    return found, segments, rng.random(size[:2]) < 0.9, normal(*size)


def cast(found, dtype):
    """u in the dtype; gain and taps are float32 parameters."""
    dtypes = {"u": dtype}
    return [jnp.asarray(found[name], dtypes.get(name, jnp.float32)) for name in NAMES]


@functools.cache
def _compiled(implementation, dilation):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(args, segments, mask, g):
        def conv(*args):
            return short_conv(
                *args, segments, mask, dilation=dilation, eps=EPS, implementation=implementation
            )

        out, pullback = jax.vjp(conv, *args)
        return out, pullback(g)

    return both


def run(implementation, shape, found, segments, mask, g, dtype):
    """(output, gradients). Compiled once for shapes and dtypes, not for documents and masks."""
    return _compiled(implementation, shape.dilation)(
        cast(found, dtype),
        None if segments is None else jnp.asarray(segments, jnp.int32),
        None if mask is None else jnp.asarray(mask),
        jnp.asarray(g, dtype),
    )


def oracle_of(found, segments, mask, g, dilation, eps=EPS):
    """(output, gradients of NAMES) over all sequences; segments and mask may be None."""
    outs, gradients = [], []
    u, gain, taps = (found[name] for name in NAMES)
    for b in range(len(u)):
        own = [None if x is None else x[b] for x in (segments, mask)]
        outs.append(oracle.forward(u[b], gain, taps, *own, dilation, eps))
        gradients.append(oracle.backward(u[b], gain, taps, *own, dilation, eps, g[b]))
    d_u, d_gain, d_taps = zip(*gradients, strict=True)
    return np.stack(outs), (np.stack(d_u), sum(d_gain), sum(d_taps))


def check(found, segments, mask, g, shape, dtype, implementation="pallas"):
    """Output and gradients are the oracle's, and finite."""
    out, gradients = run(implementation, shape, found, segments, mask, g, dtype)
    expected, true = oracle_of(found, segments, mask, g, shape.dilation)
    forward, backward = LIMITS[dtype]
    assert out.dtype == dtype and gradients[0].dtype == dtype
    assert error(out, expected) <= forward
    for name, ours, theirs in zip(NAMES, gradients, true, strict=True):
        assert error(ours, theirs) <= backward, name


def error(ours, oracle):
    """Relative L2 error; absolute where the truth is zero."""
    ours, oracle = np.asarray(ours, np.float64), np.asarray(oracle, np.float64)
    assert ours.shape == oracle.shape
    assert np.all(np.isfinite(ours))
    return np.linalg.norm(ours - oracle) / (np.linalg.norm(oracle) or 1)
