"""The training state as one pytree: its contents, its shardings, and how it is created."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from engram_jax.addressing.artifact import Addressing
from engram_jax.config import FROZEN, Config, random_streams
from engram_jax.config.errors import UserError
from engram_jax.hardware.memory import device_bytes
from engram_jax.memory.exchange import natural_order
from engram_jax.memory.table import Table, init_memory
from engram_jax.model.program import (
    Params,
    Program,
    Weights,
    build_program,
    split_model,
    table_format,
)
from engram_jax.model.trained import MEMORY, join_trained, split_trained, trained_paths
from engram_jax.model.transformer import Transformer
from engram_jax.sharding.rules import shardings
from engram_jax.training.optim import optimizer
from engram_jax.training.optim.schedule import learning_rate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32 [], updates applied so far.

    params: the model's trained parameters, a plain nested dict.
    router_bias: the experts' selection biases (not trained by gradients), likewise.
    opt_state: the optax state of `params`.
    memory: Engram layer id -> Table (rows and their moments).
    halted: bool [], True after a non-finite loss or gradient: later steps change nothing.
    average: the moving average of the parameters that are trained (train.ema_decay), as `params`
      with None for the others; None without one.
    memory_steps: int32 [], the updates behind the tables' moments, where these were taken over from
      another run (train.init_optimizer); None = as many as `step`.
    """

    step: jax.Array
    params: Params
    router_bias: Params
    opt_state: Any
    memory: dict[str, Table]
    halted: jax.Array
    average: Params | None = None
    memory_steps: jax.Array | None = None


@dataclass(frozen=True)
class TrainingProgram(Program):
    """A program with its optimizer.

    tx: the optimizer of params. rate: step -> learning rate. trained: the paths of what is updated
    (model/trained.py); None = all.
    """

    tx: optax.GradientTransformation
    rate: optax.Schedule
    trained: frozenset[str] | None = None

    @property
    def trained_tables(self) -> tuple[str, ...]:
        """The layers whose tables are updated."""
        if self.config.optimizer.memory_optimizer == FROZEN:
            return ()
        return tuple(
            k for k in self.table_rows if self.trained is None or f"{MEMORY}/{k}" in self.trained
        )

    def with_average(self, state: TrainState) -> TrainState:
        """The state with a moving average that begins at its parameters, or with none."""
        updated, _ = split_trained(state.params, self.trained)
        average = updated if self.config.train.ema_decay else None
        return dataclasses.replace(state, average=average)

    def averaged(self, state: TrainState) -> TrainState:
        """The state with the moving average in place of the parameters that are trained. Raises
        ValueError without one."""
        if state.average is None:
            raise ValueError("the run has no average (train.ema_decay = 0)")
        _, kept = split_trained(state.params, self.trained)
        return dataclasses.replace(state, params=join_trained(state.average, kept))


def build_training(
    config: Config, addressing: Addressing | None, mesh: Mesh | None = None
) -> TrainingProgram:
    """`build_program`, with the optimizer and the schedule that `config.optimizer` names."""
    program = build_program(config, addressing, mesh)
    rate = learning_rate(config.optimizer, config.train.steps)
    values = bool(config.model.product_keys.layers)
    tx = optimizer.build_optimizer(config.optimizer, rate, program.mesh, memory_values=values)
    layers = list(program.table_rows)
    trained = trained_paths(config, program.abstract_weights().params, layers)
    return TrainingProgram(
        program.config, addressing, program.mesh, program.graphdef, tx, rate, trained
    )


def check_trained(config: Config) -> None:
    """Raises UserError for patterns of train.trainable that match nothing, before any text is
    read."""
    if config.train.trainable:
        params = jax.eval_shape(lambda: split_model(Transformer(config, rngs=nnx.Rngs(0)))[1])
        trained_paths(config, params, [str(layer) for layer in config.model.engram.layers])


def init_state(program: TrainingProgram) -> TrainState:
    """The initial state, a pure function of the configuration and its seed, whatever the mesh."""
    config, engram = program.config, program.config.model.engram
    seed = config.train.seed
    rngs = nnx.Rngs(params=random_streams.stream(seed, random_streams.PARAMS))
    _, params, bias = split_model(Transformer(config, rngs=rngs))
    key = random_streams.stream(seed, random_streams.MEMORY)
    memory = init_memory(
        key,
        program.layouts,
        engram.dim,
        engram.init_std,
        jnp.dtype(engram.table_dtype),
        trained=config.optimizer.memory_optimizer != FROZEN,
    )
    return _state(program, params, bias, memory)


def state_from(program: TrainingProgram, weights: Weights) -> TrainState:
    """The initial state with these weights, rows as stored, and with moments that are zero. Every
    device keeps its own shards; the weights are donated."""

    def build(weights: Weights) -> TrainState:
        tables = {k: Table(rows, *_zero_moments(rows)) for k, rows in weights.rows.items()}
        return _state(program, weights.params, weights.router_bias, tables)

    return jax.jit(build, out_shardings=state_shardings(program), donate_argnums=0)(weights)


def _zero_moments(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros(rows.shape, jnp.float32)
    return zeros, zeros


def _state(
    program: TrainingProgram, params: Params, bias: Params, memory: dict[str, Table]
) -> TrainState:
    """The state before the first step; tables that are not updated have no moments."""
    train, zero = program.config.train, jnp.zeros((), jnp.int32)
    updated, _ = split_trained(params, program.trained)
    state = TrainState(
        step=zero,
        params=params,
        router_bias=bias,
        opt_state=program.tx.init(updated),
        memory={
            k: table if k in program.trained_tables else Table(table.rows, None, None)
            for k, table in memory.items()
        },
        halted=jnp.zeros((), bool),
        memory_steps=zero if train.init_optimizer else None,
    )
    return program.with_average(state)


def state_shardings(program: TrainingProgram) -> TrainState:
    """How every array of the state is sharded: NamedShardings in the state's structure."""
    mesh = program.mesh
    shapes = jax.eval_shape(lambda: init_state(program))
    found = shardings(shapes, mesh)
    tables = jax.tree.map(lambda _: table_format(mesh), shapes.memory)
    return dataclasses.replace(found, memory=tables)


def abstract_state(program: TrainingProgram) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating it."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(program)),
        state_shardings(program),
    )


def create_state(program: TrainingProgram) -> TrainState:
    """`init_state`, every device computing its own shards."""
    create = jax.jit(partial(init_state, program), out_shardings=state_shardings(program))
    return create()


def check_fits(program: TrainingProgram) -> None:
    """Raises UserError if the state does not fit in memory: trying may hang the machine."""
    needed = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract_state(program))
    )
    there = device_bytes()
    if needed > there:
        raise UserError(
            f"config.model: parameters, tables and their moments take {needed / 1e9:,.1f} GB on"
            f" each of {program.axes.devices} devices, this {jax.default_backend()} has"
            f" {there / 1e9:,.1f} GB; --mode=describe tells the parts"
        )


def weights_of(program: Program, state: TrainState) -> Weights:
    """The part of a training state that inference uses, rows in their natural order."""
    mesh, layouts = program.mesh, program.layouts
    rows = {k: natural_order(mesh, layouts[k], t.rows) for k, t in state.memory.items()}
    return Weights(state.params, state.router_bias, rows)
