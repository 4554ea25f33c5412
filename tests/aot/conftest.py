"""What the tests of compiled TPU programs need: a compiled shard_map."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax.aot.compiling import compile_with_text


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


@pytest.fixture(scope="session")
def compiled(tpu_slice):
    """`compiled("v5p:2x2x1", f, x, ...)` -> text of f, its arguments whole on every device."""

    @functools.cache
    def text(name, f, *args):
        _, mesh = tpu_slice(name)
        whole = NamedSharding(mesh, PartitionSpec())
        lowered = jax.jit(f, in_shardings=whole, out_shardings=whole).lower(*args)
        return compile_with_text(lowered, stage="after_codegen")[1]

    return text
