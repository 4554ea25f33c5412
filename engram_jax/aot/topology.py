"""Describes a TPU slice to compile for, without a TPU (needs libtpu)."""

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

from engram_jax.config.errors import UserError
from engram_jax.hardware.generations import GENERATIONS, Generation

EXAMPLES = '"v5e:16x16", "v5p:4x4x8", "v6e:16x16", "tpu7x:4x4x4"'


@dataclass(frozen=True)
class Topology:
    """A slice: its name, and the topology devices that a mesh for compilation is made of.

    wraps: for each dimension, whether it is a ring (Generation.wraps).
    devices: descriptions of devices; they can neither hold arrays nor run programs.
    hbm_capacity_bytes, peak_flops: of one device, see Generation (hardware/generations.py).
    """

    name: str
    generation: str
    wraps: tuple[bool, ...]
    devices: tuple[Any, ...]
    chips: int
    devices_per_chip: int
    hbm_capacity_bytes: int
    peak_flops: float


def parse_topology(name: str) -> tuple[Generation, tuple[int, ...]]:
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
    # Checked here: libtpu accepts a wrong number of dimensions and crashes on a zero.
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
      UserError: a bad name, a slice that libtpu rejects, or no libtpu.
    """
    generation, size = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for a TPU needs libtpu: pip install -e ".[tpu]"')
    try:
        with _loadable():
            # Without `wrap` libtpu describes a mesh, not a torus, whatever the slice, and compiles
            # other collectives. It takes three entries for two dimensions, too, and in three it
            # accepts links that a slice does not have.
            wraps = generation.wraps(size)
            three = (*wraps, False)[:3]
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=name, wrap=three
            )
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
        wraps,
        tuple(devices),
        chips,
        generation.devices_per_chip,
        generation.hbm_bytes,
        generation.flops,
    )


def slices_of(generation: str) -> list[str]:
    """Names of the available slices, smallest first: each power-of-two number of chips in its most
    cubic shape, up to 256 chips in two dimensions and 4,096 in three."""
    flat = GENERATIONS[generation].dimensions == 2
    size, found = ([2, 2] if flat else [2, 2, 1]), []
    while math.prod(size) <= (256 if flat else 4096):
        found.append(f"{generation}:{'x'.join(map(str, size))}")
        smallest = min(size)
        size[max(i for i, n in enumerate(size) if n == smallest)] *= 2
    return found


# For libtpu without a TPU: without the first variable a second process that compiles fails on
# /tmp/libtpu_lockfile; without the second libtpu queries a metadata server, which only a machine
# with a TPU has; without the others it warns that it does not know them.
_LOADABLE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@contextlib.contextmanager
def _loadable() -> Iterator[None]:
    """Set the variables that libtpu needs to load without a TPU, unless the user has set them, and
    remove them afterwards, so that this process can still open a real TPU."""
    added = {name: value for name, value in _LOADABLE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
