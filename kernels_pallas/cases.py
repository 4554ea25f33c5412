"""The description of a kernel benchmark; every operation's bench.py makes a list of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

XLA, OURS = "XLA", "ours"


@dataclass(frozen=True)
class Case:
    """One operation with given shapes, and its implementations.

    arguments: pytrees of jax.ShapeDtypeStruct.
    variants: name -> function of the arguments; XLA and OURS among them.
    bytes: necessary traffic: every argument that is read and every result, once.
    flops: necessary floating-point operations of the matrix products; 0 if it is memory-bound.
    fp8: whether the products are of e4m3 numbers.
    """

    name: str
    arguments: tuple[Any, ...]
    variants: Mapping[str, Callable[..., Any]]
    bytes: int
    flops: int = 0
    fp8: bool = False
