"""The benchmarks of mHC: lower bounds, and XLA's and our implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import OURS, XLA, Case
from kernels_pallas.dispatch import PALLAS, REFERENCE
from kernels_pallas.mhc.api import mhc_merge, mhc_pre
from kernels_pallas.mhc.shapes import REAL, Shape, merge_arrays, pre_arrays

OPTIONS = {"iterations": 20, "eps": 1e-6, "transpose": False}
# What the tuner times: every block of tokens moves the same bytes, so they differ only in time.
TIMED_CANDIDATES = [
    {"tokens": tokens, "columns": columns} for tokens in (128, 256, 512) for columns in (256, 512)
]
GPU_CANDIDATES = [
    {"tokens": tokens, "columns": columns, "warps": warps, "stages": stages}
    for tokens in (16, 32, 64)
    for columns in (64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
]


def cases() -> list[Case]:
    """pre and merge in bfloat16 at the true sizes: forward, and a step (forward and backward)."""
    return [case for name, shape in REAL.items() for case in _cases(name, shape)]


def floor(s: Shape, dtype: Any = jnp.bfloat16) -> dict[str, tuple[int, int]]:
    """The least (bytes, FLOPs) of any implementation, of pre and merge, forward and step.

    Bytes: streams and the sub-layer's arrays once a pass, coefficients and parameters in float32.
    FLOPs: two for every multiply-add with a stream's number; Sinkhorn's are negligible.
    """
    t, n, d, c = s.tokens, s.streams, s.d, s.coefficients
    one, between = t * d * jnp.dtype(dtype).itemsize, 4 * t * (n + n * n)
    parameters = 4 * (n * d * (c + 1) + c + 3)
    work = 2 * t * n * d
    pre, merge = (n + 1) * one + between + parameters, (2 * n + 1) * one + between
    pre_back = (3 * n + 1) * one + between + 2 * parameters
    merge_back = (3 * n + 2) * one + 2 * between
    return {
        "pre forward": (pre, work * (c + 2)),
        "pre step": (pre + pre_back, work * (3 * c + 6)),
        "merge forward": (merge, work * (n + 1)),
        "merge step": (merge + merge_back, 3 * work * (n + 1)),
    }


def _cases(name: str, s: Shape) -> list[Case]:
    found = []
    for op, (moved, flops) in floor(s).items():
        function: Callable[..., Any] = _merge
        if "pre" in op:
            function = _pre_and_streams if "step" in op else _pre
        arguments = (pre_arrays if "pre" in op else merge_arrays)(s, jnp.bfloat16)
        if "step" in op:
            results = jax.eval_shape(functools.partial(function, REFERENCE), *arguments)
            arguments, function = (results, *arguments), functools.partial(_step, function)
        variants = {
            label: functools.partial(function, implementation)
            for label, implementation in ((XLA, REFERENCE), (OURS, PALLAS))
        }
        found.append(Case(f"{name} {op}", arguments, variants, moved, flops))
    return found


def _pre(implementation: str, *args: jax.Array) -> Any:
    return mhc_pre(*args, **OPTIONS, implementation=implementation)[:3]


def _pre_and_streams(implementation: str, *args: jax.Array) -> Any:
    """With the streams, through which `mhc_merge` reads them: their gradient is added."""
    return mhc_pre(*args, **OPTIONS, implementation=implementation)


def _merge(implementation: str, *args: jax.Array) -> jax.Array:
    return mhc_merge(*args, implementation=implementation)


def _step(function: Callable[..., Any], implementation: str, g: Any, *args: jax.Array) -> Any:
    """Results, those that are arguments left out, and the gradients of all arguments."""
    out, pullback = jax.vjp(functools.partial(function, implementation), *args)
    return out[:3] if function is _pre_and_streams else out, pullback(g)
