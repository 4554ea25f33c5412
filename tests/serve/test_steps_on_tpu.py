"""The serving steps compiled for a TPU: a page pool of gigabytes must be updated in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from engram_jax.aot import data_movement
from engram_jax.aot.compiling import compile_with_text, memory_of
from engram_jax.config import ServeConfig
from engram_jax.model.program import build_program
from engram_jax.serve.engine_steps import PAGES_FROM, EngineSteps, Logprobs, StepBatch
from engram_jax.serve.logit_rules import no_adjustments
from engram_jax.serve.lower_steps import lower_steps
from engram_jax.sharding.rules import P, make_mesh
from tests.tiny import VOCAB, tiny_addressing, tiny_config


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


def test_drawing_again_compiles(tpu_slice):
    """With rules for logits; its temporaries are a few copies of the logits."""
    topology, _ = tpu_slice("v5e:2x2")
    config = tiny_config()
    mesh = make_mesh(config.mesh, topology.devices[:1])
    program = build_program(config, tiny_addressing(config), mesh)
    steps = EngineSteps(program, ServeConfig(sequences=4, capacity=64, page=16))
    everywhere = NamedSharding(mesh, P())

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def like(values):
        return jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), values)

    many, floats = steps.alternatives, array(4, VOCAB, dtype=jnp.float32)
    batch = StepBatch(
        array(4, PAGES_FROM + steps.pages_each),
        array(4, dtype=jnp.uint32),
        array(4, 2, dtype=jnp.float32),
    )
    own = Logprobs(array(4, dtype=jnp.float32), array(4, many, dtype=jnp.float32), array(4, many))
    rules = like(no_adjustments(4, steps.entries, VOCAB))
    lowered = steps._redraw.lower(array(4), batch, array(4), floats, own, rules)
    compiled, text, _ = compile_with_text(lowered)
    assert "scatter" in text and memory_of(compiled).temp < 2**20
