"""The pure training and evaluation steps.

    tokens -> addresses -> rows -> loss(params, rows) -> gradients -> optimizer, row-wise Adam

The tables are touched twice: the gather before differentiation and the scatter of the summed row
gradients after it. With the state donated both happen in place, so a step costs what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engram_jax.address import hashing_jnp
from engram_jax.layers.moe import updated_bias
from engram_jax.loss import cross_entropy
from engram_jax.memory.row_gradients import RowGradients, deduplicate, drop_all, squared_norm
from engram_jax.memory.table import Memory, Table, lookup_all
from engram_jax.model.block import MOE
from engram_jax.model.transformer import Output, stages
from engram_jax.optim import optimizer, rowwise_adam
from engram_jax.train_state import Params, Program, TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, Any]


def batch_addresses(program: Program, batch: Batch) -> dict[str, jax.Array]:
    """Addresses of every Engram layer, int32 [B, T, H]: from the pipeline, or hashed here."""
    if program.addressing is None:
        return {}
    if "addresses" in batch:
        return dict(batch["addresses"])
    canonical = program.canonical(batch["tokens"])
    return {
        str(layer_id): hashing_jnp.addresses(canonical, layer, batch["segments"])
        for layer_id, layer in program.addressing.layers.items()
    }


def summed_loss(
    program: Program, params: Params, rows: Mapping[str, jax.Array], bias: Params, batch: Batch
) -> tuple[jax.Array, Output]:
    """Sum of the batch's token losses (nats), and the model's output for its statistics."""
    model = program.model(params, bias)
    mask = program.memory_mask(batch["tokens"])
    output = model(batch["tokens"], rows, batch["positions"], batch["segments"], mask)
    loss = cross_entropy(output.hidden, model.unembedding(), batch["targets"], batch["loss_mask"])
    return loss, output


def statistics(output: Output, segments: jax.Array) -> Metrics:
    """Sums over real tokens, so that micro-batches add up: gates per branch, expert loads."""
    real = (segments > 0)[..., None]
    gates = {k: jnp.sum(jnp.where(real, g, 0), axis=(0, 1)) for k, g in output.gates.items()}
    return {"gate": gates, "load": output.loads, "tokens": jnp.sum(real)}


def gradients(
    program: Program, state: TrainState, rows: Mapping[str, jax.Array], batch: Batch
) -> tuple[jax.Array, Params, dict[str, jax.Array], Metrics]:
    """Loss (nats per target), its gradients for parameters and for every looked-up row, statistics.

    With accumulation the batch is cut along B and scanned; parameter gradients are summed, the
    lookups' gradients stay one per lookup, so nothing differs from the whole batch but the order of
    sums.
    """
    parts = program.config.train.accumulation
    targets = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
    inputs = {k: batch[k] for k in ("tokens", "targets", "loss_mask", "segments", "positions")}

    def part(rows: Any, inputs: Any) -> Any:
        def loss_fn(params: Params, rows: Any) -> tuple[jax.Array, Metrics]:
            loss, output = summed_loss(program, params, rows, state.router_bias, inputs)
            return loss / targets, statistics(output, inputs["segments"])

        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, stats), (grad_params, grad_rows) = grad_fn(state.params, rows)
        return (loss, grad_params, stats), grad_rows

    if parts == 1:
        (loss, grad_params, stats), grad_rows = part(rows, inputs)
        return loss, grad_params, grad_rows, stats

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    def body(total: Any, xs: Any) -> tuple[Any, Any]:
        sums, grad_rows = part(*xs)
        return jax.tree.map(jnp.add, total, sums), grad_rows

    xs = jax.tree.map(cut, (dict(rows), inputs))
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], xs))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (loss, grad_params, stats), grad_rows = jax.lax.scan(body, zeros, xs)
    grad_rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), grad_rows)
    return loss, grad_params, grad_rows, stats


def update_memory(
    program: Program,
    memory: Memory,
    row_gradients: Mapping[str, RowGradients],
    factor: jax.Array,
    step: jax.Array,
) -> tuple[dict[str, Table], dict[str, jax.Array]]:
    """Apply the summed row gradients (times the clipping factor) to their rows.

    Returns the tables and, per layer, how many of the touched rows had been trained before.
    """
    config = program.config.optimizer
    dense = config.memory_optimizer == "dense_adam"
    update = rowwise_adam.update_dense if dense else rowwise_adam.update
    rate = program.rate(step) * config.memory_lr_multiplier
    tables, seen = {}, {}
    for layer, grads in row_gradients.items():
        tables[layer], seen[layer] = update(
            memory[layer], grads.scaled(factor), rate=rate, step=step, config=config
        )
    return tables, seen


def update_router_bias(program: Program, bias: Params, loads: jax.Array) -> Params:
    """Auxiliary-loss-free balancing: every selection bias steps against this batch's load."""
    blocks, start = dict(bias.get("blocks", {})), 0
    for stage in stages(program.config.model):
        if stage.kind == MOE:
            load = loads[start : start + stage.count]
            start += stage.count
            rate = program.config.model.ffn.bias_update_rate
            blocks[stage.name] = jax.tree.map(
                lambda b, load=load, rate=rate: updated_bias(b, load, rate), blocks[stage.name]
            )
    return {"blocks": blocks} if blocks else bias


def train_step(program: Program, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update. A non-finite loss or gradient changes nothing and sets `halted`.

    Metrics (device scalars unless a shape is given): loss, grad_norm (all gradients, rows after
    summation, before clipping), grad_norm_memory, learning_rate, finite, gate/<layer> [M] mean per
    branch, load [MoE layers, E] assignments, and per Engram layer rows_touched and hit_rate
    (share of the touched rows that earlier steps had already trained).
    """
    addresses = batch_addresses(program, batch)
    rows = lookup_all(state.memory, addresses)
    loss, grad_params, grad_rows, stats = gradients(program, state, rows, batch)
    row_gradients = {k: deduplicate(addresses[k], g) for k, g in grad_rows.items()}

    memory_norm = sum((squared_norm(g) for g in row_gradients.values()), jnp.float32(0))
    norm = optax.tree.norm(grad_params, squared=True) + memory_norm
    factor = optimizer.clip_factor(norm, program.config.optimizer.clip_norm)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    apply = finite & ~state.halted

    updates, opt_state = program.tx.update(
        jax.tree.map(lambda g: g * factor.astype(g.dtype), grad_params),
        state.opt_state,
        state.params,
    )
    params = optax.apply_updates(state.params, updates)
    bias = update_router_bias(program, state.router_bias, stats["load"])
    keep = partial(jax.tree.map, lambda new, old: jnp.where(apply, new, old))
    row_gradients = {k: drop_all(g, ~apply) for k, g in row_gradients.items()}
    memory, seen = update_memory(program, state.memory, row_gradients, factor, state.step)
    if program.config.optimizer.memory_optimizer == "dense_adam":
        memory = keep(memory, state.memory)  # dense moments decay even without gradients
    new_state = TrainState(
        step=state.step + apply.astype(jnp.int32),
        params=keep(params, state.params),
        router_bias=keep(bias, state.router_bias),
        opt_state=keep(opt_state, state.opt_state),
        memory=memory,
        halted=~apply,
    )
    metrics: Metrics = {
        "loss": loss,
        "grad_norm": jnp.sqrt(norm),
        "grad_norm_memory": jnp.sqrt(memory_norm),
        "learning_rate": program.rate(state.step),
        "finite": apply,
        "load": stats["load"],
    }
    for k, grads in row_gradients.items():
        metrics[f"gate/{k}"] = stats["gate"][k] / jnp.maximum(stats["tokens"], 1)
        metrics[f"rows_touched/{k}"] = grads.count
        metrics[f"hit_rate/{k}"] = seen[k] / jnp.maximum(grads.count, 1)
    return new_state, metrics


def utilisation(memory: Memory) -> dict[str, jax.Array]:
    """Share of each table's rows that training has touched so far. Reads the moments: O(R)."""
    return {k: jnp.mean(jnp.any(t.nu > 0, axis=1)) for k, t in memory.items()}


def eval_step(
    program: Program, params: Params, bias: Params, rows_of: Mapping[str, jax.Array], batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """(sum of token losses in nats, number of targets) of one batch.

    rows_of: Engram layer id -> the table's rows [R, dim].
    """
    addresses = batch_addresses(program, batch)
    rows = {k: rows_of[k].at[a].get(mode="promise_in_bounds") for k, a in addresses.items()}
    loss, _ = summed_loss(program, params, rows, bias, batch)
    return loss, jnp.sum(batch["loss_mask"])


def jit_train_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step compiled, its state donated (updated in place)."""
    return jax.jit(partial(train_step, program), donate_argnums=0)
