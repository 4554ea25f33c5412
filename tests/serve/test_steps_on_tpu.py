"""The serving steps compiled for a TPU: a page pool of gigabytes must be changed where it lies."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from engram_jax.aot import data_movement
from engram_jax.aot.compiling import compile_with_text, memory_of
from engram_jax.config import ServeConfig
from engram_jax.model.program import Weights, build_program
from engram_jax.serve.engine_steps import PAGES_FROM, EngineSteps, StepBatch
from engram_jax.sharding.rules import P, make_mesh, row_major
from engram_jax.training.state import abstract_state
from tests.tiny import tiny_addressing, tiny_config


@pytest.mark.parametrize(("sequences", "tokens"), [(4, 1), (2, 16)])
def test_no_step_copies_the_pool(tpu_slice, sequences, tokens):
    topology, _ = tpu_slice("v5e:2x2")
    config = tiny_config(**{"model.dtype": "bfloat16"})
    mesh = make_mesh(config.mesh, topology.devices[:1])
    program = build_program(config, tiny_addressing(config), mesh)
    serve = ServeConfig(sequences=4, capacity=1024, page=16, pages=4096, prefill_chunk=16)
    steps, replicated = EngineSteps(program, serve), NamedSharding(mesh, P())

    def shape(x, where=replicated):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    state = abstract_state(program)
    weights = jax.tree.map(shape, Weights(state.params, state.router_bias, {}))
    cache = jax.tree.map(shape, jax.eval_shape(steps._fresh, weights))
    cache = dataclasses.replace(cache, pool=shape(cache.pool, row_major(mesh, P(), 4)))

    def array(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    batch = StepBatch(
        array(sequences, PAGES_FROM + steps.pages_each),
        array(sequences, dtype=jnp.uint32),
        array(sequences, 2, dtype=jnp.float32),
    )
    given = None if tokens == 1 else array(sequences, tokens)
    flow = jax.eval_shape(steps._run_first, weights, cache, batch, given)[0]
    flow = jax.tree.map(shape, flow)
    engram = config.model.engram
    rows = array(sequences, tokens, engram.heads, engram.dim, dtype=jnp.float32)
    lowered = {
        "first": steps._first.lower(weights, cache, batch, given),
        "piece": steps._middle[0].lower(weights, cache, batch, flow, rows),
    }
    pool = cache.pool.size * cache.pool.dtype.itemsize
    for name, one in lowered.items():
        compiled, text, _ = compile_with_text(one)
        assert data_movement.large_copies(text, [cache.pool.shape]) == [], name
        memory = memory_of(compiled)
        assert memory.alias >= pool and memory.temp < pool / 4, name
