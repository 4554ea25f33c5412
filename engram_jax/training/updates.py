"""What one step changes besides the parameters: tables, selection biases, the moving average."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from engram_jax.config import DENSE_ADAM
from engram_jax.config.random_streams import ROUNDING, number
from engram_jax.layers.moe import updated_bias
from engram_jax.memory.exchange import ExchangePlan, Sent
from engram_jax.memory.table import Table, Tables
from engram_jax.model.block import MOE
from engram_jax.model.program import Params
from engram_jax.model.transformer import stages
from engram_jax.training.optim import rowwise_adam
from engram_jax.training.state import TrainingProgram


def update_memory(
    program: TrainingProgram,
    memory: Tables,
    plans: Mapping[str, ExchangePlan],
    sent: Mapping[str, Sent],
    factor: jax.Array,
    step: jax.Array,
    apply: jax.Array,
    count: jax.Array | None = None,
) -> tuple[dict[str, Table], dict[str, jax.Array]]:
    """Apply the summed row gradients (times the clipping factor) where the rows are stored.

    step: of the schedule. count: updates behind the moments, where these are more than `step`
    (`TrainState.memory_steps`).

    Returns the tables and, per layer, how many of the touched rows had been trained before. Tables
    that are not updated are returned as they are.
    """
    config = program.config.optimizer
    if not program.trained_tables:
        return dict(memory), {}
    adam = rowwise_adam.RULES[config.memory_optimizer]
    rate = program.rate(step) * config.memory_lr_multiplier
    step = step if count is None else count
    tables, seen = {}, {}
    for layer, exchange in program.exchanges().items():
        if layer not in program.trained_tables:
            tables[layer] = memory[layer]
            continue
        seed = number(program.config.train.seed, ROUNDING, int(layer))
        update = partial(adam, config=config, seed=seed)
        tables[layer], seen[layer] = exchange.apply(
            update, memory[layer], plans[layer], sent[layer], factor, apply, (rate, step)
        )
    if config.memory_optimizer == DENSE_ADAM:  # its moments decay even without gradients
        tables = jax.tree.map(lambda new, old: jnp.where(apply, new, old), tables, dict(memory))
    return tables, seen


def update_router_bias(program: TrainingProgram, bias: Params, loads: jax.Array) -> Params:
    """Auxiliary-loss-free balancing: every selection bias steps against this batch's load, but for
    those of routers that are not updated."""
    blocks, start = dict(bias.get("blocks", {})), 0
    for stage in stages(program.config.model):
        if stage.kind == MOE:
            load = loads[start : start + stage.count]
            start += stage.count
            router = f"blocks/{stage.name}/blocks/ffn/router"
            if program.trained is not None and router not in program.trained:
                continue
            rate = program.config.model.ffn.bias_update_rate
            blocks[stage.name] = jax.tree.map(
                lambda b, load=load, rate=rate: updated_bias(b, load, rate), blocks[stage.name]
            )
    return {"blocks": blocks} if blocks else bias


def moving_average(
    program: TrainingProgram, average: Params | None, params: Params, apply: jax.Array
) -> Params | None:
    """decay * average + (1 - decay) * params, of the parameters that are updated; unchanged unless
    `apply`. None has none."""
    if average is None:
        return None
    share = 1 - program.config.train.ema_decay
    # As a step towards the parameters: where they do not change, the average does not either.
    return jax.tree.map(lambda a, p: jnp.where(apply, a + share * (p - a), a), average, params)
