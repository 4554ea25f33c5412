"""Random arguments of the gate, as float64 for the oracle and in the dtype for the kernel."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.engram_gate import quantise

NAMES = ("rows", "weights", "streams", "gain", "bias")


def arguments(shape, dtype, seed=0, scale=1.0):
    """({name: float64}, mask, (g_out, g_gates)); values are exact in `dtype`."""
    rng = np.random.default_rng(seed)
    t, c, m, d = shape.tokens, shape.d_mem, shape.streams, shape.d

    def normal(*size):
        return np.asarray(jnp.asarray(rng.normal(size=size), dtype), np.float64)

    found = {
        "rows": normal(t, c) * scale,
        "weights": normal(c, m + 1, d) * 2.0**-5,
        "streams": normal(t, m, d),
        "gain": 1 + 0.125 * normal(m, d),
        "bias": 0.125 * normal(m + 1, d),
    }
    mask = rng.random(t) < 0.8
    return found, mask, (normal(t, m, d), np.float64(np.float32(rng.normal(size=(t, m)))))


def cast(found, dtype):
    """The arguments as the kernel gets them; gain and bias are float32 parameters."""
    dtypes = {"gain": jnp.float32, "bias": jnp.float32}
    return [jnp.asarray(found[name], dtypes.get(name, dtype)) for name in NAMES]


def through_fp8(found, recipe, dtype):
    """The arguments with rows and weights as FP8 leaves them (test_quantise.py has that exact)."""
    if recipe is None:
        return dict(found)
    rows = quantise.quantise_rows(jnp.asarray(found["rows"], dtype), recipe)
    weights = quantise.quantise_weights(jnp.asarray(found["weights"], dtype), recipe)
    return dict(
        found,
        rows=np.float64(quantise.dequantise_rows(rows)),
        weights=np.float64(quantise.dequantise_weights(weights)),
    )


def error(ours, oracle):
    """Relative L2 error."""
    ours, oracle = np.asarray(ours, np.float64), np.asarray(oracle, np.float64)
    assert np.all(np.isfinite(ours))
    return np.linalg.norm(ours - oracle) / max(np.linalg.norm(oracle), 1e-300)
