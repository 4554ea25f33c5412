"""Everything a training run carries from step to step, as one pytree."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from engram_jax import random_streams
from engram_jax.address import hashing_jnp
from engram_jax.address.artifact import Addressing
from engram_jax.aot.xla_flags import options_of
from engram_jax.config import Config
from engram_jax.errors import UserError
from engram_jax.layers.moe import RouterBias
from engram_jax.memory.exchange import EVERYWHERE, Exchange
from engram_jax.memory.table import Table, TableLayout, init_memory
from engram_jax.model.transformer import Transformer
from engram_jax.optim import optimizer
from engram_jax.optim.schedule import learning_rate
from engram_jax.sharding.local import Local
from engram_jax.sharding.rules import Axes, axes_of, check, make_mesh, on_tpu, row_major, shardings

Params = dict[str, Any]
PLANNED_DISTINCT = 0.75  # of a device's lookups, where nobody has measured it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: int32 [], updates applied so far.

    params: the model's trained parameters, a plain nested dict.
    router_bias: the experts' selection biases (not trained by gradients), likewise.
    opt_state: the optax state of `params`.
    memory: Engram layer id -> Table (rows and their moments).
    halted: bool [], True after a non-finite loss or gradient: later steps change nothing.
    """

    step: jax.Array
    params: Params
    router_bias: Params
    opt_state: Any
    memory: dict[str, Table]
    halted: jax.Array


@dataclass(frozen=True)
class Program:
    """The static half of a run: what functions close over. Build it once with `build_program`."""

    config: Config
    addressing: Addressing | None
    mesh: Mesh
    graphdef: Any
    tx: optax.GradientTransformation
    rate: Any

    @property
    def axes(self) -> Axes:
        return axes_of(self.mesh)

    @property
    def local(self) -> Local:
        """The mesh as the network sees it from inside shard_map."""
        model = self.config.model
        return Local(self.axes, model.dtype, model.ffn.routed_experts, on_tpu(self.mesh))

    @property
    def layouts(self) -> dict[str, TableLayout]:
        """Where the rows lie, by Engram layer id."""
        devices = self.axes.devices
        return {k: TableLayout(rows, devices) for k, rows in self.table_rows.items()}

    def jit(self, function: Callable, **how: Any) -> jax.stages.Wrapped:
        """`jax.jit` with the compiler options of the mesh's devices (aot/xla_flags.py)."""
        return jax.jit(function, compiler_options=options_of(self.mesh), **how)

    def exchanges(self) -> dict[str, Exchange]:
        """How rows get to their lookups, by Engram layer id."""
        capacity = self.row_capacity()
        return {k: Exchange(self.mesh, layout, capacity) for k, layout in self.layouts.items()}

    @property
    def lookups(self) -> int:
        """Rows that one device reads of one table in a training step, duplicates included."""
        data, heads = self.config.data, self.config.model.engram.heads
        return data.batch_size * data.seq_len * heads // self.axes.devices

    def row_capacity(self) -> int:
        """Rows that one all-to-all moves between two devices.

        The planned number of distinct rows times the headroom, or five standard deviations more, if
        that is more; no more than a device looks up.
        """
        mesh, devices = self.config.mesh, self.axes.devices
        mean = self.lookups * (mesh.distinct or PLANNED_DISTINCT) / devices
        wanted = max(mesh.headroom * mean, mean + 5 * math.sqrt(mean))
        return min(self.lookups, -(-math.ceil(wanted) // 8) * 8)

    def model(self, params: Params, router_bias: Params) -> Transformer:
        """The model with these values; call it inside jit."""
        return nnx.merge(self.graphdef, params, router_bias)

    def canonical(self, tokens: jax.Array) -> jax.Array:
        """Raw ids int32 [...] -> canonical ids; negative where a token has no memory."""
        compression = self.addressing.compression if self.addressing is not None else None
        table = None if compression is None else jnp.asarray(compression)
        return hashing_jnp.canonicalise(tokens, table)

    def memory_mask(self, tokens: jax.Array) -> jax.Array:
        """bool [...]: False for what yields no memory: negative (masked, image) ids, ids past the
        tokenizer's."""
        return self.canonical(tokens) >= 0

    @property
    def table_rows(self) -> dict[str, int]:
        """Stored rows per Engram layer id (R, plus the padding that the "qwen" dialect has)."""
        if self.addressing is None:
            return {}
        return {str(k): layer.padded_rows for k, layer in self.addressing.layers.items()}


def split_model(model: Transformer) -> tuple[Any, Params, Params]:
    """(graphdef, params, router biases) of a model, the latter two as plain nested dicts."""
    graphdef, *states = nnx.split(model, nnx.Param, RouterBias)
    params, bias = (nnx.to_pure_dict(state) for state in states)
    return graphdef, params, bias


def build_program(
    config: Config, addressing: Addressing | None, mesh: Mesh | None = None
) -> Program:
    """mesh: default: config.mesh over all devices.

    Raises UserError where the mesh does not fit the devices or the model, and for float64 where JAX
    has it switched off: it would compute in float32.
    """
    for key in ("dtype", "param_dtype"):
        dtype = getattr(config.model, key)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UserError(
                f"config.model.{key} = {dtype!r}: must be float32 or bfloat16, unless"
                " JAX_ENABLE_X64=1 is set in the environment"
            )
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    rate = learning_rate(config.optimizer, config.train.steps)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check(config, axes_of(mesh))
    return Program(
        config=config,
        addressing=addressing,
        mesh=mesh,
        graphdef=split_model(model)[0],
        tx=optimizer.build(config.optimizer, rate, mesh),
        rate=rate,
    )


def init_state(program: Program) -> TrainState:
    """A fresh state, a pure function of `config.train.seed`, whatever the mesh."""
    config, engram = program.config, program.config.model.engram
    seed = config.train.seed
    rngs = nnx.Rngs(params=random_streams.stream(seed, random_streams.PARAMS))
    _, params, bias = split_model(Transformer(config, rngs=rngs))
    key = random_streams.stream(seed, random_streams.MEMORY)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router_bias=bias,
        opt_state=program.tx.init(params),
        memory=init_memory(
            key, program.layouts, engram.dim, engram.init_std, jnp.dtype(engram.table_dtype)
        ),
        halted=jnp.zeros((), bool),
    )


def state_shardings(program: Program) -> TrainState:
    """Where every array of the state lies: NamedShardings in the state's structure."""
    mesh = program.mesh
    shapes = jax.eval_shape(lambda: init_state(program))
    found = shardings(shapes, mesh)
    tables = jax.tree.map(lambda _: table_format(mesh), shapes.memory)
    return dataclasses.replace(found, memory=tables)


def table_format(mesh: Mesh) -> Any:
    """Rows one after another, cut over all devices."""
    return row_major(mesh, EVERYWHERE, 2)


def abstract_state(program: Program) -> TrainState:
    """The state's shapes, dtypes and shardings, without allocating it."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: init_state(program)),
        state_shardings(program),
    )


def create_state(program: Program) -> TrainState:
    """`init_state`, every device making its own part."""
    create = jax.jit(partial(init_state, program), out_shardings=state_shardings(program))
    return create()


def check_memory(program: Program) -> None:
    """Raises UserError if the state cannot lie in memory: a machine that tries may stand still."""
    needed = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract_state(program))
    )
    stats = jax.local_devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"config.model: parameters, tables and their moments take {needed / 1e9:,.1f} GB on"
            f" each of {program.axes.devices} devices, this {jax.default_backend()} has"
            f" {there / 1e9:,.1f} GB; --mode=describe tells the parts"
        )
