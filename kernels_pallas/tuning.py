"""Looks up the tuned block sizes of a device, its VMEM and its number of cores."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.experimental.pallas.tpu as pltpu

from kernels_pallas import dispatch

MIB = 1 << 20
SMALLEST_VMEM = 64 * MIB  # of the TPUs that we compile for: v5p and tpu7x; v5e and v6e have 128


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may use: those of the device in context, less a reserve."""
    platform, _ = dispatch.device()
    known = platform == dispatch.TPU and pltpu.is_tpu_device()
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes if known else SMALLEST_VMEM
    return capacity - 2 * MIB


def cores() -> int:
    """Tensor cores that a kernel's parallel blocks are split over: 2 on v5p, 1 elsewhere."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    on_tpu = dispatch.device()[0] == dispatch.TPU
    if abstract is not None and on_tpu:
        return abstract.num_cores or 1
    return getattr(jax.devices()[0], "num_cores", 1) or 1 if on_tpu else 1


@functools.cache
def _table(op: str) -> dict[str, dict[str, dict[str, int]]]:
    path = Path(__file__).parent / op / "tuned.json"
    return json.loads(path.read_text())["blocks"] if path.exists() else {}


# While a tuner runs: blocks to use instead, and the (op, key) that were looked up.
_tried: dict[tuple[str, str], dict[str, int]] = {}
_asked: list[tuple[str, str]] | None = None


def tuned(op: str, key: str) -> dict[str, int] | None:
    """Block sizes of `op` for the device in context, None if it has not been tuned.

    tuned.json: {"blocks": {device kind: {key: {block: size}}}, ...}; key: the shape, in the op's
    notation.
    """
    if _asked is not None:
        _asked.append((op, key))
    if (op, key) in _tried:
        return _tried[op, key]
    return _table(op).get(dispatch.device()[1], {}).get(key)


@contextlib.contextmanager
def trying(blocks: dict[tuple[str, str], dict[str, int]]) -> Iterator[list[tuple[str, str]]]:
    """For a tuner: use these blocks for (op, key); yields the list of (op, key) looked up."""
    global _asked
    _asked = asked = []
    _tried.update(blocks)
    try:
        yield asked
    finally:
        _tried.clear()
        _asked = None
