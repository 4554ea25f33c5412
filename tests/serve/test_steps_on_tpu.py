"""The serving steps compiled for a TPU: a page pool of gigabytes must be updated in place."""

from __future__ import annotations

import pytest

from engram_jax.aot import data_movement
from engram_jax.aot.compiling import compile_with_text, memory_of
from engram_jax.config import ServeConfig
from engram_jax.model.program import build_program
from engram_jax.serve.lower_steps import lower_steps
from engram_jax.sharding.rules import make_mesh
from tests.tiny import tiny_addressing, tiny_config


@pytest.mark.parametrize("prefill", [False, True])
def test_no_step_copies_the_pool(tpu_slice, prefill):
    topology, _ = tpu_slice("v5e:2x2")
    config = tiny_config(**{"model.dtype": "bfloat16"})
    mesh = make_mesh(config.mesh, topology.devices[:1])
    program = build_program(config, tiny_addressing(config), mesh)
    serve = ServeConfig(sequences=4, capacity=1024, page=16, pages=4096, prefill_chunk=16)
    steps = lower_steps(program, serve, prefill=prefill)
    pool = steps.cache.pool
    size = pool.size * pool.dtype.itemsize
    spans = [name for name in steps.programs if name.startswith("span")]
    for name in ("first", spans[0]):
        compiled, text, _ = compile_with_text(steps.programs[name])
        assert data_movement.large_copies(text, [pool.shape]) == [], name
        memory = memory_of(compiled)
        assert memory.alias >= size and memory.temp < size / 4, name
