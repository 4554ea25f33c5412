"""The gate's work in benchmarks: floors, and XLA's and our way to do it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cases import OURS, XLA, Case
from kernels_pallas.dispatch import PALLAS, REFERENCE
from kernels_pallas.engram_gate.api import engram_gate
from kernels_pallas.engram_gate.quantise import BLOCK, CHANNEL, MX
from kernels_pallas.engram_gate.shapes import REAL, Shape, arrays

EPS = 1e-6
# What the tuner tries: a block of tokens for every number of passes over the weights.
CANDIDATES = [
    {"tokens": tokens, "columns": columns, "chunk": 256}
    for tokens in (4096, 2816, 2048, 1536, 1024, 512)
    for columns in (512, 256, 128)
]


def cases() -> list[Case]:
    """bfloat16 forward and backward, and every FP8 recipe forward, at the true sizes."""
    found = []
    for name, shape in REAL.items():
        found.append(_case(f"{name} bf16 forward", shape, None, prepared=False, backward=False))
        found.append(_case(f"{name} bf16 backward", shape, None, prepared=False, backward=True))
        found += [
            _case(f"{name} fp8 {recipe} forward", shape, recipe, prepared=True, backward=False)
            for recipe in (CHANNEL, BLOCK, MX)
        ]
    return found


def _case(name: str, s: Shape, recipe: str | None, *, prepared: bool, backward: bool) -> Case:
    arguments = arrays(s, jnp.bfloat16, recipe, prepared=prepared)
    moved = sum(map(_bytes, jax.tree.leaves(arguments)))
    streams = _bytes(arguments[2])
    if backward:  # reads the cotangent, too, and writes a gradient of every argument
        moved = 2 * moved + streams
        arguments = (arguments[2], *arguments)
    else:
        moved += streams
    flops = 2 * s.tokens * s.d_mem * (s.streams + 1) * s.d
    functions = {
        label: functools.partial(_backward if backward else _forward, implementation)
        for label, implementation in ((XLA, REFERENCE), (OURS, PALLAS))
    }
    times = 3 if backward else 1  # the keys again, and two products for gradients
    return Case(name, arguments, functions, moved, times * flops, fp8=recipe is not None)


def _forward(implementation: str, *args: Any) -> jax.Array:
    return engram_gate(*args, eps=EPS, implementation=implementation)[0]


def _backward(implementation: str, g: jax.Array, *args: Any) -> Any:
    """Gradients alone: of the forward pass only what the backward pass needs is computed."""
    forward: Callable[..., jax.Array] = functools.partial(_forward, implementation)
    return jax.vjp(forward, *args)[1](g)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
