"""The training step (`train_step`) and the evaluation step, as pure functions.

    tokens -> addresses -> rows -> loss(params, rows) -> gradients -> optimizer, row-wise Adam

The tables are touched twice: the gather before differentiation and the scatter of the summed row
gradients after it. With the state donated both happen in place, so a step costs what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from engram_jax.addressing import hash_jax
from engram_jax.config import FROZEN, SHUFFLED, ServeConfig
from engram_jax.memory.exchange import ExchangePlan
from engram_jax.memory.table import Tables
from engram_jax.model.program import Params, Program
from engram_jax.model.switches import switched
from engram_jax.model.trained import join_trained, split_trained
from engram_jax.model.transformer import Output, Transformer
from engram_jax.sharding.rules import BATCH, P, check_length, specs
from engram_jax.training.loss import cross_entropy, cross_entropy_and_z, target_nats
from engram_jax.training.measures import activations, norms
from engram_jax.training.optim import optimizer
from engram_jax.training.state import TrainingProgram, TrainState, state_shardings
from engram_jax.training.updates import moving_average, update_memory, update_router_bias

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
INPUTS = ("tokens", "targets", "loss_mask", "segments", "positions")


def batch_addresses(program: Program, batch: Batch) -> dict[str, jax.Array]:
    """Addresses of every Engram layer, int32 [B, T, H]: from the pipeline, or hashed here; those of
    other sequences where the lookup is "shuffled"."""
    if program.addressing is None:
        return {}
    if "addresses" in batch:
        found = dict(batch["addresses"])
    else:
        canonical = program.canonical(batch["tokens"])
        found = {
            str(layer_id): hash_jax.addresses(canonical, layer, batch["segments"])
            for layer_id, layer in program.addressing.layers.items()
        }
    if program.addressing.lookup == SHUFFLED:
        return {layer: of_other_sequences(ids) for layer, ids in found.items()}
    return found


def of_other_sequences(addresses: jax.Array) -> jax.Array:
    """[B, T, H] -> every sequence with the addresses of the one B / 2 further on (cyclically), at
    the same positions: each row is read as often as before, by tokens that it is not about. None is
    of a sequence's own text, so none tells what comes next in it. Raises ValueError for an odd
    B."""
    if addresses.shape[0] % 2:
        raise ValueError(f"a batch of {addresses.shape[0]} sequences has no two halves to exchange")
    return jnp.roll(addresses, addresses.shape[0] // 2, axis=0)


def fetch_rows(
    program: Program, memory: Tables, addresses: Mapping[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, ExchangePlan]]:
    """Rows [B, T, H, dim] of every Engram layer, in the dtype the network computes in, and the
    plans to send their gradients back by. Their tokens are in device order (sharding/sequence.py),
    which is that of the text unless sequences are cut over devices."""
    dtype = program.config.model.dtype
    exchanges = program.exchanges()
    plans = {k: exchanges[k].plan(ids) for k, ids in addresses.items()}
    rows = {
        k: exchanges[k].fetch(memory[k].rows, ids, plans[k], dtype) for k, ids in addresses.items()
    }
    return rows, plans


def forward(
    program: Program,
    params: Params,
    rows: Mapping[str, jax.Array],
    bias: Params,
    batch: Batch,
    *,
    z_loss: float = 0.0,
    measure: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Sum of the batch's token losses (nats), and sums over its real tokens (`statistics`).

    z_loss: with a coefficient, the first is the losses and `z_loss` times the squares of the
      normalisers' logarithms, and the statistics have "cross_entropy", the losses alone.
    measure: whether the statistics have moments of activations.
    """
    shard = program.shard_view

    def result(model: Transformer, output: Output, batch: Batch) -> tuple[jax.Array, Metrics]:
        inputs = output.hidden, model.unembedding(), batch["targets"], batch["loss_mask"]
        if not z_loss:
            loss = cross_entropy(*inputs)
            return shard.psum_tokens((loss, statistics(output, batch["segments"])))
        loss, alone = cross_entropy_and_z(*inputs, z_loss=z_loss)
        stats = statistics(output, batch["segments"])
        return shard.psum_tokens((loss, {**stats, "cross_entropy": alone}))

    return run_network(program, params, rows, bias, batch, result, P(), measure=measure)


def run_network(
    program: Program,
    params: Params,
    rows: Mapping[str, jax.Array],
    bias: Params,
    batch: Batch,
    result: Callable[[Transformer, Output, Batch], Any],
    out_specs: Any,
    *,
    measure: bool = False,
    keep: bool = False,
    extra: Sequence[str] = (),
) -> Any:
    """`result(model, output, batch)` of the network on a batch.

    One shard_map over several devices: each runs the network on its sequences, or its tokens of
    them, with weights all-gathered when they are needed. Differentiating it leaves each device its
    own shards of the gradients. One device runs the same function as it is.

    rows: as `fetch_rows` gives them. result: gets what the device has; tokens of whole sequences
    are `ShardView.whole_sequences`.
    out_specs: how the result is sharded, P() for what `result` has summed over the devices.
    measure, keep: see `Transformer.__call__`. extra: arrays [B, ...] of the batch that only
    `result` reads, whole. Raises UserError for sequences that the mesh cannot cut.
    """
    shard = program.shard_view
    check_length("tokens of a sequence", batch["tokens"].shape[1], program.config, program.axes)

    def on_device(params: Params, rows: Any, bias: Params, batch: Batch) -> Any:
        stacks = {"blocks": params["blocks"]}  # a layer's weights are gathered when it runs
        rest = shard.all_gather({k: v for k, v in params.items() if k != "blocks"})
        model = program.model({**rest, **stacks}, bias)
        tokens, segments = batch["tokens"], batch["segments"]
        mask, beside = program.memory_mask(tokens), program.beside(tokens, segments)
        # Every device has the tokens of whole sequences, few bytes: n-grams need no other's.
        mask, beside = shard.own_tokens((mask, beside))
        mine = {k: shard.own_tokens(batch[k]) if k in INPUTS else batch[k] for k in batch}
        tokens, segments, positions = mine["tokens"], mine["segments"], mine["positions"]
        how = {"measure": measure, "keep": keep}
        output = model(tokens, rows, positions, segments, mask, shard, beside, **how)
        return result(model, output, mine)

    inputs = {k: batch[k] for k in (*INPUTS, *extra)}
    if program.mesh.size == 1:  # shard_map's gradient would be all-reduced over one device
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):  # kernels look there
            return on_device(params, dict(rows), bias, inputs)
    sequences, tokens = P(BATCH), P(BATCH, "sequence")
    run = jax.shard_map(
        on_device,
        mesh=program.mesh,
        in_specs=(specs(params, program.axes), tokens, P(), sequences),
        out_specs=out_specs,
        check_vma=False,
    )
    return run(params, dict(rows), bias, inputs)


def statistics(output: Output, segments: jax.Array) -> Metrics:
    """Sums over real tokens, so that parts of a batch add up: gates per branch, expert loads, and
    what `Output.moments` has."""
    real = (segments > 0)[..., None]
    gates = {k: jnp.sum(jnp.where(real, g, 0), axis=(0, 1)) for k, g in output.gates.items()}
    found = {"gate": gates, "load": output.loads, "tokens": jnp.sum(real)}
    if output.moments:
        found["moments"] = {
            k: jnp.sum(jnp.where(real, m, 0), axis=(-3, -2)) for k, m in output.moments.items()
        }
    return found


def gradients(
    program: TrainingProgram, state: TrainState, rows: Mapping[str, jax.Array], batch: Batch
) -> tuple[jax.Array, Params, dict[str, jax.Array], Metrics]:
    """Loss (nats per target), its gradients for parameters and for every looked-up row, statistics.

    With accumulation every device's sequences are split along B and scanned; parameter gradients
    are summed, the lookups' gradients stay one per lookup, so nothing differs from the whole batch
    but the order of sums. What is not updated has no gradients: parameters are None, tables absent.
    The loss includes train.z_loss (`forward`).
    """
    train = program.config.train
    parts, tables = train.accumulation, program.trained_tables
    targets = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
    inputs = {k: batch[k] for k in INPUTS}
    switches: Any = {"z_loss": train.z_loss, "measure": train.log_activations}
    updated, kept = split_trained(state.params, program.trained)

    def part(rows: Any, inputs: Any) -> Any:
        def loss_fn(updated: Params, of_tables: Any) -> tuple[jax.Array, Metrics]:
            params, all_rows = join_trained(updated, kept), {**rows, **of_tables}
            loss, stats = forward(program, params, all_rows, state.router_bias, inputs, **switches)
            return loss / targets, stats

        if not tables:
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, stats), grad_params = grad_fn(updated, {})
            return (loss, grad_params, stats), {}
        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        of_tables = {k: rows[k] for k in tables}
        (loss, stats), (grad_params, grad_rows) = grad_fn(updated, of_tables)
        return (loss, grad_params, stats), grad_rows

    if parts == 1:
        (loss, grad_params, stats), grad_rows = part(rows, inputs)
        return loss, grad_params, grad_rows, stats

    def split(x: jax.Array) -> jax.Array:
        # Part p is every device's sequences p, p + parts, ...: no sequence changes devices.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def body(total: Any, xs: Any) -> tuple[Any, Any]:
        sums, grad_rows = part(*xs)
        return jax.tree.map(jnp.add, total, sums), grad_rows

    xs = jax.tree.map(split, (dict(rows), inputs))
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], xs))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (loss, grad_params, stats), grad_rows = jax.lax.scan(body, zeros, xs)
    return loss, grad_params, jax.tree.map(join, grad_rows), stats


def train_step(
    program: TrainingProgram, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update. A non-finite loss or gradient changes nothing and sets `halted`.

    Metrics (device scalars unless a shape is given): loss (without train.z_loss, which is z_loss),
    grad_norm (all gradients of what is updated, rows after summation, before clipping),
    grad_norm_memory, learning_rate, finite, gate/<layer> [M] mean per
    branch, load [MoE layers, E] assignments, and per Engram layer rows_touched, hit_rate (share of
    the touched rows that earlier steps had already trained), distinct (share of the devices'
    lookups that remains without each one's duplicates) and extra_rounds (of the exchange). What
    does not apply is absent: gate/<layer> without a gate (config.model.engram.gate "one", forms
    "over_encoding" and "scone"; of one branch it is [1]), and with frozen tables grad_norm_memory,
    rows_touched and hit_rate. With train.log_norms and train.log_activations: what
    training/measures.py names.
    """
    rows, plans = fetch_rows(program, state.memory, batch_addresses(program, batch))
    loss, grad_params, grad_rows, stats = gradients(program, state, rows, batch)
    exchanges = program.exchanges()
    sent = {k: exchanges[k].send(g, plans[k]) for k, g in grad_rows.items()}

    memory_norm = sum((s.squares for s in sent.values()), jnp.float32(0))
    norm = optax.tree.norm(grad_params, squared=True) + memory_norm
    factor = optimizer.clip_factor(norm, program.config.optimizer.clip_norm)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    apply = finite & ~state.halted

    before, kept = split_trained(state.params, program.trained)
    updates, opt_state = program.tx.update(
        jax.tree.map(lambda g: g * factor.astype(g.dtype), grad_params), state.opt_state, before
    )
    updated = optax.apply_updates(before, updates)
    bias = update_router_bias(program, state.router_bias, stats["load"])
    keep = partial(jax.tree.map, lambda new, old: jnp.where(apply, new, old))
    count = state.memory_steps
    memory, seen = update_memory(
        program, state.memory, plans, sent, factor, state.step, apply, count
    )
    step = state.step + apply.astype(jnp.int32)
    updated = keep(updated, before)
    new_state = TrainState(
        step=step,
        params=join_trained(updated, kept),
        router_bias=keep(bias, state.router_bias),
        opt_state=keep(opt_state, state.opt_state),
        memory=memory,
        halted=~apply,
        average=moving_average(program, state.average, updated, apply),
        memory_steps=None if count is None else count + apply.astype(jnp.int32),
    )
    metrics: Metrics = {
        "loss": loss,
        "grad_norm": jnp.sqrt(norm),
        "grad_norm_memory": jnp.sqrt(memory_norm),
        "learning_rate": program.rate(state.step),
        "finite": apply,
        "load": stats["load"],
    }
    if "cross_entropy" in stats:
        alone = stats["cross_entropy"] / jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        metrics |= {"loss": alone, "z_loss": loss - alone}
    if program.config.train.log_norms:
        metrics |= norms(grad_params, state.params)
    if program.config.train.log_activations:
        metrics |= activations(stats["moments"], stats["tokens"])
    frozen = program.config.optimizer.memory_optimizer == FROZEN
    if frozen or (program.table_rows and not program.trained_tables):
        del metrics["grad_norm_memory"]
    for k, plan in plans.items():
        asked = jnp.sum(plan.distinct.count)
        if k in stats["gate"]:
            metrics[f"gate/{k}"] = stats["gate"][k] / jnp.maximum(stats["tokens"], 1)
        if k in sent:
            touched = sent[k].touched
            metrics[f"rows_touched/{k}"] = touched
            metrics[f"hit_rate/{k}"] = seen[k] / jnp.maximum(touched, 1)
        metrics[f"distinct/{k}"] = asked / plan.distinct.order.size
        metrics[f"extra_rounds/{k}"] = plan.rounds - 1
    return new_state, metrics


def utilisation(program: Program, memory: Tables) -> dict[str, jax.Array]:
    """Share of each table's rows that training has touched so far. Reads the moments: O(R). Frozen
    tables have none, and are left out."""
    rows = program.table_rows
    return {k: touched / rows[k] for k, touched in touched_rows(memory).items()}


def touched_rows(memory: Tables) -> dict[str, jax.Array]:
    """How many of each table's rows training has touched so far, int32 []; not of frozen ones."""
    return {k: jnp.sum(jnp.any(t.nu > 0, axis=1)) for k, t in memory.items() if t.nu is not None}


def eval_step(
    program: Program, params: Params, bias: Params, memory: Tables, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """(sum of token losses in nats, number of targets) of one batch."""
    rows, _ = fetch_rows(program, memory, batch_addresses(program, batch))
    loss, _ = forward(program, params, rows, bias, batch)
    return loss, jnp.sum(batch["loss_mask"])


def score_step(
    program: Program,
    params: Params,
    bias: Params,
    memory: Tables,
    batch: Batch,
    off: ServeConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(nats of every target [B, T], 0 where there is none; hidden states after the last norm
    [B, T, d]) of one batch. off: says which layers and orders are switched off; None = none."""
    rows: Any = fetch_rows(program, memory, batch_addresses(program, batch))[0]
    if off is not None:
        rows = switched(program.config.model.engram, off, rows)
    return score_rows(program, params, rows, bias, batch)


def score_rows(
    program: Program, params: Params, rows: Mapping[str, Any], bias: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """As `score_step`, of rows that have been fetched: layer id -> [B, T, H, dim], None = the layer
    adds nothing."""
    shard = program.shard_view

    def result(model: Transformer, output: Output, batch: Batch) -> tuple[jax.Array, jax.Array]:
        nats = target_nats(output.hidden, model.unembedding(), batch["targets"])
        nats = jnp.where(batch["loss_mask"] > 0, nats, 0)
        return shard.whole_sequences(nats), shard.whole_sequences(output.hidden)

    return run_network(program, params, rows, bias, batch, result, P(BATCH))


def jit_train_step(program: TrainingProgram) -> jax.stages.Wrapped:
    """The step compiled, its state donated (updated in place). In other transformations: train_step
    (see Program.jit)."""
    return program.jit(
        partial(train_step, program),
        training=True,
        out_shardings=(state_shardings(program), NamedSharding(program.mesh, P())),
        donate_argnums=0,
    )


def jit_utilisation(program: Program) -> Callable[[Tables], dict[str, jax.Array]]:
    """`utilisation` compiled."""
    replicated = NamedSharding(program.mesh, P())
    return jax.jit(partial(utilisation, program), out_shardings=replicated)
