"""Lowers the engine's compiled programs from shapes alone, for --mode=compile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from engram_jax.config import DEVICE, ServeConfig
from engram_jax.model.program import Program, Weights
from engram_jax.serve.engine_steps import PAGES_FROM, EngineSteps, StepBatch
from engram_jax.serve.row_fetch import DeviceMemory
from engram_jax.sharding.rules import P, row_major


@dataclass(frozen=True)
class LoweredSteps:
    """programs: by name, in the order in which a step runs them; "rows 4" reads the rows of Engram
    layer 4 where the tables are on the device.

    weights, cache, kept: shapes of the arrays that stay on the device from step to step; kept:
    what shared beginnings of prompts need beside pages (serve/prefixes.py).
    """

    programs: dict[str, jax.stages.Lowered]
    weights: Weights
    cache: Any
    kept: Any


def lower_steps(program: Program, serve: ServeConfig, *, prefill: bool) -> LoweredSteps:
    """One step of decoding (serve.sequences x 1 token), or of prefilling (serve.prefill_sequences x
    serve.prefill_chunk tokens), without log-probabilities. Rows are taken to be in table_dtype,
    whatever a memory file would hold."""
    steps, mesh = EngineSteps(program, serve), program.mesh
    replicated = NamedSharding(mesh, P())
    batch = serve.prefill_sequences if prefill else serve.sequences
    tokens = serve.prefill_chunk if prefill else 1

    def shape(x: Any, where: Any = replicated) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def array(*dims: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    weights = program.abstract_weights()
    tables, network = weights.rows, replace(weights, rows={})
    cache = jax.tree.map(shape, jax.eval_shape(steps.fresh, network))
    cache = replace(cache, pool=shape(cache.pool, row_major(mesh, P(), 4)))
    kept = jax.tree.map(shape, jax.eval_shape(steps.fresh_kept, network))
    numbers = array(batch, PAGES_FROM + steps.pages_each)
    running = StepBatch(numbers, array(batch, dtype=jnp.uint32), array(batch, 2, dtype=jnp.float32))
    given = array(batch, tokens) if prefill else None  # decoding: those sampled last

    compiled = steps.programs
    programs = {"first": compiled["first"].lower(network, cache, running, given)}
    flow = jax.eval_shape(compiled["first"], network, cache, running, given)[0]
    flow = jax.tree.map(shape, flow)
    engram = program.config.model.engram
    addresses = array(batch, tokens, engram.heads)
    for layer in steps.layers:
        rows = signs = None
        if layer in tables and not serve.is_off(layer):
            dtype = jnp.dtype(engram.table_dtype)
            rows = array(batch, tokens, engram.heads, engram.dim, dtype=dtype)
            if engram.signs:
                signs = array(batch, tokens, engram.heads, dtype=jnp.int8)
            if serve.memory == DEVICE:
                read = DeviceMemory(program, tables[layer]).read
                programs[f"rows {layer}"] = read.lower(tables[layer], addresses)
        name = f"span {layer}"
        programs[name] = compiled[name].lower(network, cache, running, flow, rows, signs)
    programs["sample"] = compiled["sample"].lower(
        network, cache, running, flow, None, logprobs=False, listed=0
    )
    resident = weights if serve.memory == DEVICE else network
    return LoweredSteps(programs, resident, cache, kept)
