"""The benchmarks of the short convolution: lower bounds, and XLA's and our implementation."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.cases import OURS, XLA, Case
from kernels_pallas.dispatch import GPU, PALLAS, REFERENCE, TPU
from kernels_pallas.short_conv import vjp
from kernels_pallas.short_conv.api import short_conv
from kernels_pallas.short_conv.shapes import REAL, Shape, arrays

EPS = 1e-5
# What the tuner times: every block of tokens moves the same bytes, so they differ only in time.
TIMED_CANDIDATES = [{"tokens": tokens} for tokens in (128, 256, 512)]
GPU_CANDIDATES = [
    {"tokens": tokens, "columns": columns, "warps": warps, "stages": 2}
    for tokens in (8, 16, 32)
    for columns in (128, 256)
    for warps in (4, 8)
]


def cases() -> list[Case]:
    """bfloat16 forward and backward at the true sizes."""
    return [
        _case(f"{name} bf16 {'backward' if backward else 'forward'}", shape, backward)
        for name, shape in REAL.items()
        for backward in (False, True)
    ]


def _case(name: str, s: Shape, backward: bool) -> Case:
    arguments = arrays(s, jnp.bfloat16)
    moved = sum(map(_bytes, arguments))
    if backward:  # reads the output's gradient, writes those of u, gain and taps
        moved += _bytes(arguments[0]) + sum(map(_bytes, arguments[:3]))
        arguments = (arguments[0], *arguments)
    else:
        moved += _bytes(arguments[0])
    functions = {XLA: _reference_backward, OURS: _backward} if backward else {
        XLA: functools.partial(_forward, REFERENCE),
        OURS: functools.partial(_forward, PALLAS),
    }  # fmt: skip
    functions = {
        label: functools.partial(function, dilation=s.dilation)
        for label, function in functions.items()
    }
    return Case(name, arguments, functions, moved)


def _forward(implementation: str, *args: Any, dilation: int) -> jax.Array:
    return short_conv(*args, dilation=dilation, eps=EPS, implementation=implementation)


def _reference_backward(g: jax.Array, *args: Any, dilation: int) -> Any:
    *trained, segments = args

    def forward(*trained: jax.Array) -> jax.Array:
        return _forward(REFERENCE, *trained, segments, dilation=dilation)

    return jax.vjp(forward, *trained)[1](g)


def _backward(g: jax.Array, *args: Any, dilation: int) -> Any:
    """The backward pass alone, which needs nothing computed by the forward pass."""
    choice = dispatch.choose("short_conv", PALLAS, {TPU: None, GPU: None})
    return vjp.gradients(*args, None, g, dilation, EPS, choice)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
