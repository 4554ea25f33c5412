"""TPU slices by name, as the compiler sees them: no TPU is needed, only the package libtpu."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from engram_jax.errors import UserError

EXAMPLES = '"v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4"'
MIB = 1 << 20


@dataclass(frozen=True)
class Generation:
    """What does not depend on the slice.

    dimensions: of the torus, so of a slice's name.
    devices_per_chip: JAX devices; a tpu7x chip shows as two, every other as one.
    hbm_bytes: of one device, what a program can use (below).
    flops: bfloat16 FLOP/s of one device, Google's published peak (below).
    device_kinds: `jax.Device.device_kind`, of a described device first; real ones may have another.
    """

    name: str
    dimensions: int
    devices_per_chip: int
    hbm_bytes: int
    flops: float
    device_kinds: tuple[str, ...]


# hbm_bytes: libtpu 0.0.52 refuses a program as soon as memory_analysis().peak_memory_in_bytes +
# generated_code_size_in_bytes exceeds these, found by bisection to 8 KiB. It is what the runtime
# leaves of the chip's HBM; the message rounds it ("exceeds available HBM (15.75G)", then 95.73G,
# 31.24G and 94.74G).
# flops of a chip: cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x): 197, 459, 918, 2307 TFLOP/s.
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v5e", 2, 1, 16126 * MIB, 197e12, ("TPU v5 lite", "TPU v5e")),
        Generation("v5p", 3, 1, 98025 * MIB, 459e12, ("TPU v5", "TPU v5p")),
        Generation("v6e", 2, 1, 31992 * MIB, 918e12, ("TPU v6 lite", "TPU v6e")),
        Generation("tpu7x", 3, 2, 97012 * MIB, 2307e12 / 2, ("TPU7x",)),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: its name, and the devices a mesh for compilation is made of.

    devices: descriptions of jax.Device; nothing can be put or run on them.
    hbm_capacity_bytes, peak_flops: of one device, see Generation.
    """

    name: str
    generation: str
    devices: tuple[Any, ...]
    chips: int
    devices_per_chip: int
    hbm_capacity_bytes: int
    peak_flops: float


def parse(name: str) -> tuple[Generation, tuple[int, ...]]:
    """ "v5p:4x4x8" -> (v5p, (4, 4, 8)).

    Raises:
      UserError: not a known generation, or not its number of dimensions.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in GENERATIONS:
        raise UserError(
            f"topology {name!r} is not GENERATION:SIZE with one of {', '.join(GENERATIONS)};"
            f" examples: {EXAMPLES}"
        )
    generation = GENERATIONS[found[1]]
    size = tuple(int(n) for n in found[2].split("x"))
    # Checked here: libtpu takes a wrong number of dimensions and crashes on a zero.
    if len(size) != generation.dimensions or 0 in size:
        form = "x".join("ABC"[: generation.dimensions])
        raise UserError(
            f"topology {name!r}: a {generation.name} slice is {generation.name}:{form} with"
            f" {generation.dimensions} positive numbers; examples: {EXAMPLES}"
        )
    return generation, size


def slice_topology(name: str) -> Topology:
    """The slice `name` ("v5p:4x4x8": 128 chips) to compile for; works on a machine without a TPU.

    Raises:
      UserError: a bad name, a slice that libtpu refuses, or no libtpu.
    """
    generation, size = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    try:
        with _loadable():
            description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise UserError(f"topology {name!r} is refused: {reason}; examples: {EXAMPLES}") from error
    devices: list[Any] = description.devices
    chips = math.prod(size)
    assert len(devices) == chips * generation.devices_per_chip, (name, len(devices))
    assert devices[0].device_kind in generation.device_kinds, devices[0].device_kind
    return Topology(
        name,
        generation.name,
        tuple(devices),
        chips,
        generation.devices_per_chip,
        generation.hbm_bytes,
        generation.flops,
    )


def slices_of(generation: str) -> list[str]:
    """Slices that are rented, smallest first: each number of chips that is a power of two in its
    most cubic shape, up to 256 chips in two dimensions and 4,096 in three."""
    flat = GENERATIONS[generation].dimensions == 2
    size, found = ([2, 2] if flat else [2, 2, 1]), []
    while math.prod(size) <= (256 if flat else 4096):
        found.append(f"{generation}:{'x'.join(map(str, size))}")
        smallest = min(size)
        size[max(i for i, n in enumerate(size) if n == smallest)] *= 2
    return found


# libtpu alone, beside others and without a TPU: without the first variable a second process that
# compiles fails on /tmp/libtpu_lockfile; without the second libtpu asks a metadata server for what
# only a machine with a TPU has; without the others it complains of what it then does not know.
_LOADABLE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@contextlib.contextmanager
def _loadable() -> Iterator[None]:
    """libtpu, loaded in here, gets along; what the user set stays, and the rest is taken back: a
    real TPU that this process opens later is to be found as ever."""
    added = {name: value for name, value in _LOADABLE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
