"""The static part of a run (configuration, mesh, addressing, network), and the weights it takes.

What training adds (optimizer, schedule, state) is in training/state.py; serving needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from engram_jax.addressing import hash_jax
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.hash_plan import LayerAddressing
from engram_jax.config import SCONE, SHUFFLED, Config
from engram_jax.config.errors import UserError
from engram_jax.hardware.xla_flags import options_of
from engram_jax.layers.moe import RouterBias
from engram_jax.memory.exchange import ROW_SHARDED, Exchange
from engram_jax.memory.table import TableLayout
from engram_jax.model.beside import Beside, classes
from engram_jax.model.transformer import Transformer
from engram_jax.sharding.rules import Axes, axes_of, check, make_mesh, row_major, shardings
from engram_jax.sharding.shard_view import ShardView

Params = dict[str, Any]
PLANNED_DISTINCT = 0.75  # of a device's lookups, where it has not been measured


@dataclass(frozen=True)
class Program:
    """What compiled functions close over. Build it once with `build_program`.

    graphdef: the network without its values (Flax NNX). addressing: None without memory.
    """

    config: Config
    addressing: Addressing | None
    mesh: Mesh
    graphdef: Any

    @property
    def axes(self) -> Axes:
        return axes_of(self.mesh)

    @property
    def shard_view(self) -> ShardView:
        """The mesh as the network sees it from inside shard_map."""
        model = self.config.model
        platform = self.mesh.devices.flat[0].platform
        return ShardView(self.axes, model.dtype, model.ffn.routed_experts, platform)

    @property
    def layouts(self) -> dict[str, TableLayout]:
        """How the rows are sharded, by Engram layer id."""
        devices, spare = self.axes.devices, int(self.config.model.engram.form == SCONE)
        return {k: TableLayout(rows, devices, spare) for k, rows in self.table_rows.items()}

    def jit(self, function: Callable, *, training: bool = False, **how: Any) -> jax.stages.Wrapped:
        """`jax.jit` with the compiler options of the mesh's devices (hardware/xla_flags.py).

        training: the function updates parameters.
        Because of them JAX refuses it inside another jit, scan or grad: use `function` there.
        """
        return jax.jit(function, compiler_options=options_of(self.mesh, training=training), **how)

    def exchanges(self) -> dict[str, Exchange]:
        """The exchange of every table's rows and gradients, by Engram layer id."""
        capacity = self.row_capacity()
        return {k: Exchange(self.mesh, layout, capacity) for k, layout in self.layouts.items()}

    @property
    def lookups(self) -> int:
        """Rows that one device reads of one table in a training step, duplicates included."""
        data, heads = self.config.data, self.config.model.engram.heads
        return data.batch_size * data.seq_len * heads // self.axes.devices

    def row_capacity(self) -> int:
        """The exchange's capacity: rows that one all-to-all moves between two devices.

        The planned number of distinct rows times the headroom, or plus five standard deviations if
        that is more; at most what a device looks up.
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
        return hash_jax.canonicalise(tokens, table)

    def memory_mask(self, tokens: jax.Array) -> jax.Array:
        """bool [...]: False for ids without memory: negative ones (masked, image) and those past
        the tokenizer's."""
        return self.canonical(tokens) >= 0

    def beside(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        history: jax.Array | None = None,
    ) -> Beside | None:
        """What tokens int32 [B, T] read beside their rows, None if nothing. segments, history: as
        for their addresses (`hash_jax.addresses`)."""
        addressing, case = self.addressing, self.config.model.engram.case
        if addressing is None or not (addressing.signs or case):
            return None
        signs = {}
        if addressing.signs:
            canonical = self.canonical(tokens)
            signs = {
                str(layer_id): hash_jax.signs(canonical, layer, segments, history)
                for layer_id, layer in addressing.layers.items()
                if isinstance(layer, LayerAddressing)
            }
        return Beside(signs, classes(addressing, tokens) if case else None)

    def beside_in_layer(
        self, layer: str, tokens: jax.Array, signs: jax.Array | None
    ) -> Beside | None:
        """As `beside`, of one Engram layer whose signs [B, T, H] the host has computed."""
        case, addressing = self.config.model.engram.case, self.addressing
        if addressing is None or (signs is None and not case):
            return None
        found = {} if signs is None else {layer: signs}
        return Beside(found, classes(addressing, tokens) if case else None)

    @property
    def table_rows(self) -> dict[str, int]:
        """Stored rows per Engram layer id (R, plus the padding that the "qwen" dialect has)."""
        if self.addressing is None:
            return {}
        return {str(k): layer.padded_rows for k, layer in self.addressing.layers.items()}

    def abstract_weights(self) -> Weights:
        """Shapes, dtypes and shardings of what inference needs, rows in their natural order."""
        params, bias = jax.eval_shape(lambda: split_model(_network(self.config))[1:])
        engram = self.config.model.engram
        dtype, where = jnp.dtype(engram.table_dtype), table_format(self.mesh)
        rows: dict[str, Any] = {
            k: jax.ShapeDtypeStruct((layout.stored, engram.dim), dtype, sharding=where)
            for k, layout in self.layouts.items()
        }
        params, bias = (
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                tree,
                shardings(tree, self.mesh),
            )
            for tree in (params, bias)
        )
        return Weights(params, bias, rows)


def check_decodes(config: Config) -> None:
    """Raises UserError for a model that cannot continue a sequence or give its tables away: it
    reads the rows of another sequence of its batch."""
    if config.model.engram.layers and config.model.engram.lookup == SHUFFLED:
        raise UserError(
            f"config.model.engram.lookup = {SHUFFLED!r}: is a control for training and evaluation;"
            " it reads the rows of another sequence of the batch, and a sequence by itself has none"
        )


def split_model(model: Transformer) -> tuple[Any, Params, Params]:
    """(graphdef, params, router biases) of a model, the latter two as plain nested dicts."""
    graphdef, *states = nnx.split(model, nnx.Param, RouterBias)
    params, bias = (nnx.to_pure_dict(state) for state in states)
    return graphdef, params, bias


def build_program(
    config: Config, addressing: Addressing | None, mesh: Mesh | None = None
) -> Program:
    """The program of a configuration; mesh: by default config.mesh over all devices.

    Raises UserError where the mesh does not fit the devices or the model, and for float64 where JAX
    has it disabled: it would compute in float32.
    """
    for key in ("dtype", "param_dtype"):
        dtype = getattr(config.model, key)
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise UserError(
                f"config.model.{key} = {dtype!r}: must be float32 or bfloat16, unless"
                " JAX_ENABLE_X64=1 is set in the environment"
            )
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check(config, axes_of(mesh))
    graphdef = split_model(nnx.eval_shape(lambda: _network(config)))[0]
    return Program(config, addressing, mesh, graphdef)


def _network(config: Config) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def table_format(mesh: Mesh) -> Any:
    """The sharding of a table: row-major, rows over all devices."""
    return row_major(mesh, ROW_SHARDED, 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weights:
    """What inference needs of a training state; rows: Engram layer id -> [n L, dim] by address,
    those from R on being padding (`TableLayout`); np.ndarray [R, dim] where read to the host."""

    params: Params
    router_bias: Params
    rows: Mapping[str, jax.Array]
