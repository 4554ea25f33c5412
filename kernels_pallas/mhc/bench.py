"""What a benchmark of mHC needs: floors, arguments and the implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import PALLAS, REFERENCE
from kernels_pallas.mhc.api import mhc_merge, mhc_pre
from kernels_pallas.mhc.shapes import Shape, merge_arrays, pre_arrays

OPTIONS = {"iterations": 20, "eps": 1e-6, "transpose": False}
OPS = ("pre", "pre_backward", "merge", "merge_backward")


def floor(shape: Shape, dtype: Any = jnp.bfloat16) -> dict[str, tuple[int, int]]:
    """Of every one of OPS: (bytes, FLOPs) that no program can do without.

    Bytes: streams and sub-layer arrays once, float32 coefficients and parameters once. FLOPs: two
    for every multiply-add with a number of a stream; Sinkhorn's are few beside them.
    """
    t, n, d, c = shape.tokens, shape.streams, shape.d, shape.coefficients
    size = jnp.dtype(dtype).itemsize
    one, coefficients, parameters = t * d * size, 4 * t * (n + n * n), 4 * c * (n * d + 1)
    return {
        "pre": ((n + 1) * one + coefficients + parameters, 2 * t * n * d * (c + 2)),
        "pre_backward": (
            (2 * n + 1) * one + coefficients + 2 * parameters,
            2 * t * n * d * (3 * c + 3),
        ),
        "merge": ((2 * n + 1) * one + coefficients, 2 * t * n * d * (n + 1)),
        "merge_backward": ((3 * n + 2) * one + 2 * coefficients, 4 * t * n * d * (n + 1)),
    }


def inputs(shape: Shape, key: jax.Array, dtype: Any = jnp.bfloat16) -> dict[str, tuple]:
    """Random arguments of every one of OPS; a backward pass has its cotangents first."""

    def normal(arrays: tuple, key: jax.Array) -> tuple:
        keys = jax.random.split(key, len(arrays))
        return tuple(
            jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, arrays, strict=True)
        )

    keys = jax.random.split(key, 4)
    x, fn, base, scale, gain = normal(pre_arrays(shape, dtype), keys[0])
    pre = (x, fn * 0.02, base, scale, 1 + 0.1 * gain)
    merge = normal(merge_arrays(shape, dtype), keys[1])
    after = normal((merge[1], merge[2], merge[3]), keys[2])
    streams = normal((merge[0],), keys[3])
    return {
        "pre": pre,
        "pre_backward": (after, *pre),
        "merge": merge,
        "merge_backward": (*streams, *merge),
    }


def variants(shape: Shape) -> dict[str, dict[str, Callable[..., Any]]]:
    """Implementation -> every one of OPS as a function of its `inputs`.

    A backward pass is the gradient of all arguments; XLA leaves out of its forward pass what it
    does not need.
    """
    del shape

    def backward(function: Callable[..., Any], g: Any, *args: jax.Array) -> Any:
        return jax.vjp(function, *args)[1](g)

    out = {}
    for name in (REFERENCE, PALLAS):
        pre = functools.partial(mhc_pre, **OPTIONS, implementation=name)
        merge = functools.partial(mhc_merge, implementation=name)
        out[name] = {
            "pre": pre,
            "pre_backward": functools.partial(backward, pre),
            "merge": merge,
            "merge_backward": functools.partial(backward, merge),
        }
    return out
