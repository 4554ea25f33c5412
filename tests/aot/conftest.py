"""What the tests of compiled TPU programs need: libtpu, a mesh, and a compiled shard_map."""

from __future__ import annotations

import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engram_jax.aot.compiling import compile_with_text
from engram_jax.aot.topology import Topology, slice_topology


@pytest.fixture(scope="session")
def tpu_slice():
    """`tpu_slice("v5e:2x2")` -> (Topology, Mesh of one axis "x"). Without libtpu: fails in CI."""
    if importlib.util.find_spec("libtpu") is None:
        message = 'no libtpu: pip install -e ".[tpu]"'
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)

    def make(name: str) -> tuple[Topology, Mesh]:
        topology = slice_topology(name)
        return topology, Mesh(np.array(topology.devices), ("x",))

    return make


@pytest.fixture(scope="session")
def shard_mapped(tpu_slice):
    """`shard_mapped(name, f, shape, dtype, ...)` -> text of f run on each device's own [shape]."""

    def text(name, f, *shapes, dtype=np.float32, options=None, out_specs=None):
        _, mesh = tpu_slice(name)
        spec = PartitionSpec("x")
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=spec, out_specs=out_specs or spec, check_vma=False
        )
        arguments = [
            jax.ShapeDtypeStruct(
                (shape[0] * mesh.size, *shape[1:]), dtype, sharding=NamedSharding(mesh, spec)
            )
            for shape in shapes
        ]
        return compile_with_text(jax.jit(mapped).lower(*arguments), options)[1]

    return text
