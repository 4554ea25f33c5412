"""The benchmarks of the gate: lower bounds, and XLA's and our implementation."""

from __future__ import annotations

import functools
import math
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
GPU_CANDIDATES = [
    {"tokens": tokens, "columns": columns, "depth": depth, "warps": warps, "stages": stages}
    for tokens in (64, 128)
    for columns in (64, 128, 256)
    for depth in (64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
]


def cases() -> list[Case]:
    """bfloat16 forward and a step (forward and backward), and every FP8 recipe forward, at the true
    sizes."""
    found = []
    for name, shape in REAL.items():
        found.append(_case(f"{name} bf16 forward", shape, None, step=False))
        found.append(_case(f"{name} bf16 step", shape, None, step=True))
        found += [
            _case(f"{name} fp8 {recipe} forward", shape, recipe, step=False)
            for recipe in (CHANNEL, BLOCK, MX)
        ]
    return found


def _case(name: str, s: Shape, recipe: str | None, *, step: bool) -> Case:
    arguments = arrays(s, jnp.bfloat16, recipe, prepared=recipe is not None)
    read, streams = sum(map(_bytes, jax.tree.leaves(arguments))), _bytes(arguments[2])
    moved, flops = read + streams, 2 * s.tokens * s.d_mem * (s.streams + 1) * s.d
    if step:  # backward reads the arguments and g and writes a gradient for each argument; the
        # keys again and two products for gradients
        moved, flops = moved + 2 * read + streams, 4 * flops
        arguments = (arguments[2], *arguments)
    functions = {
        label: functools.partial(_step if step else _forward, implementation)
        for label, implementation in ((XLA, REFERENCE), (OURS, PALLAS))
    }
    return Case(name, arguments, functions, moved, flops, fp8=recipe is not None)


def _forward(implementation: str, *args: Any) -> jax.Array:
    return engram_gate(*args, eps=EPS, implementation=implementation)[0]


def _step(implementation: str, g: jax.Array, *args: Any) -> Any:
    """The output and the gradients of all arguments."""
    *trained, mask = args

    def forward(*trained: jax.Array) -> jax.Array:
        return _forward(implementation, *trained, mask)

    out, pullback = jax.vjp(forward, *trained)
    return out, pullback(g)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
