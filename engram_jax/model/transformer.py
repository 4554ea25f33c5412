"""The language model: embedding, stacks of blocks with Engram modules between them, head.

It holds no tables. The rows that its tokens address are an input, like the tokens themselves, so
the same model trains on device tables and serves from host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engram_jax.config import Config, ModelConfig
from engram_jax.config.random_streams import fold_name
from engram_jax.layers.case_vectors import CaseVectors
from engram_jax.layers.hyper_connections import collapse, expand
from engram_jax.layers.norm import RMSNorm
from engram_jax.layers.product_keys import ProductKeys
from engram_jax.model.beside import Beside, signed
from engram_jax.model.block import DENSE, MOE, Stack, moments
from engram_jax.model.decode_state import DecodeState
from engram_jax.model.memory_module import memory_module
from engram_jax.sharding.shard_view import UNSHARDED, ShardView

Rows = Mapping[str, Any]  # layer id -> [B, T, H, dim]; None = the layer is off (switches.py)


@dataclass(frozen=True)
class Stage:
    """Identical layers [first, first + count); an Engram module and then a product-key memory, if
    any, precede `first`."""

    first: int
    count: int
    kind: str

    @property
    def name(self) -> str:
        return str(self.first)


def moe_layers(config: ModelConfig) -> list[int]:
    """The ids of the layers with routed experts, in the order of `Output.loads`."""
    moe = [stage for stage in stages(config) if stage.kind == MOE]
    return [layer for stage in moe for layer in range(stage.first, stage.first + stage.count)]


def stages(config: ModelConfig) -> tuple[Stage, ...]:
    """The layers, split where the kind of block changes and before every layer with a memory."""
    moe = config.ffn.routed_experts > 0
    kinds = [
        MOE if moe and layer >= config.ffn.dense_layers else DENSE for layer in range(config.layers)
    ]
    memories = {*config.engram.layers, *config.product_keys.layers}
    firsts = [
        layer
        for layer in range(config.layers)
        if layer == 0 or kinds[layer] != kinds[layer - 1] or layer in memories
    ]
    ends = [*firsts[1:], config.layers]
    return tuple(Stage(a, b - a, kinds[a]) for a, b in zip(firsts, ends, strict=True))


def spans(config: ModelConfig) -> tuple[tuple[Stage, ...], ...]:
    """The stages in groups: the first has no Engram module (and may be empty), every other begins
    with one. A span can run while the next one's rows are being fetched."""
    found: list[list[Stage]] = [[]]
    for stage in stages(config):
        if stage.first in config.engram.layers:
            found.append([])
        found[-1].append(stage)
    return tuple(map(tuple, found))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """hidden [B, T, d] after the last norm; gates: layer id -> [B, T, M] ([B, T, 1] of one branch),
    of the layers that have gates; loads [MoE layers, E]; moments, where they are measured:
    "stack/LAYER" [layers, B, T, 2] of a stack's layers, "memory/LAYER" [B, T, 2] (`moments`).
    Where they are kept, added: layer id -> [B, T, M, d], what Engram layers add to the streams, and
    read, as they find them; layers [layers, B, T, d]: the streams after each layer as `finish`
    takes them, before its norm.
    """

    hidden: jax.Array
    gates: dict[str, jax.Array]
    loads: jax.Array
    moments: dict[str, jax.Array] = field(default_factory=dict)
    added: dict[str, jax.Array] = field(default_factory=dict)
    read: dict[str, jax.Array] = field(default_factory=dict)
    layers: jax.Array | None = None


class Transformer(nnx.Module):
    """The network of a configuration.

    What a module starts from depends on the seed, its name and its layer alone, and not on which
    other modules there are: models that differ in one part share the others' initial values.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        model = config.model
        vocab, d = config.tokenizer.vocab_size, model.d_model
        param_dtype = jnp.dtype(model.param_dtype)
        self.dtype = jnp.dtype(model.dtype)
        self.streams = model.hyper.streams
        self.stage_list = stages(model)

        key = rngs.params()
        keys = {name: fold_name(key, name) for name in ("engrams", "product_keys", "blocks")}

        def matrix(name: str, *shape: int) -> nnx.Param:
            values = jax.random.normal(fold_name(key, name), shape, param_dtype)
            return nnx.Param(values * model.init_std)

        def how(name: str, layer: int) -> dict[str, Any]:
            """Dtypes and the random stream of a module in front of a layer."""
            rngs = nnx.Rngs(params=jax.random.fold_in(keys[name], layer))
            return {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}

        self.embedding = matrix("embedding", vocab, d)
        self.engrams = nnx.Dict(
            {str(i): memory_module(model, **how("engrams", i)) for i in model.engram.layers}
        )
        self.product_keys = nnx.Dict(
            {
                str(layer): ProductKeys(
                    d,
                    model.product_keys,
                    norm_eps=model.norm_eps,
                    init_std=model.init_std,
                    **how("product_keys", layer),
                )
                for layer in model.product_keys.layers
            }
        )
        self.signs = model.engram.signs
        cased = model.engram.layers if model.engram.case else ()
        self.engram_case = nnx.Dict(
            {
                str(layer): CaseVectors(model.engram.d_mem, param_dtype=param_dtype)
                for layer in cased
            }
        )
        self.blocks = nnx.Dict(
            {
                stage.name: Stack(model, stage.kind, stage.first, stage.count, key=keys["blocks"])
                for stage in self.stage_list
            }
        )
        self.norm = RMSNorm(d, model.norm_eps, param_dtype=param_dtype)
        self.head = None if model.tie_embeddings else matrix("head", vocab, d)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [B, T] -> M equal streams [B, T, M, d]; a negative id embeds as id 0."""
        x = self.embedding[...].astype(self.dtype)[jnp.maximum(tokens, 0)]
        return expand(x, self.streams)

    def _read(self, layer: str, rows: jax.Array, beside: Beside | None) -> jax.Array:
        """A layer's rows with what is read beside them. Raises ValueError if that is missing."""
        if self.signs:
            if beside is None or layer not in beside.signs:
                raise ValueError(f"layer {layer}: its rows have signs, and none are given")
            rows = signed(rows, beside.signs[layer])
        if layer in self.engram_case:
            if beside is None or beside.case is None:
                raise ValueError(f"layer {layer}: its tokens have classes, and none are given")
            rows = self.engram_case[layer](rows, beside.case)
        return rows

    def _learned(self, stage: Stage, x: jax.Array) -> jax.Array:
        """Streams [..., M, d] after the stage's product-key memory, if it has one."""
        if stage.name not in self.product_keys:
            return x
        return x + self.product_keys[stage.name](x)[..., None, :]

    def finish(self, x: jax.Array) -> jax.Array:
        """streams [..., M, d] -> the hidden states that `logits` takes, [..., d]."""
        return self.norm(collapse(x))

    def unembedding(self) -> jax.Array:
        """[V, d]: the head's matrix, which is the embedding where the two are tied."""
        return self.embedding[...] if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., d] -> float32 (float64) logits [..., V]."""
        matrix = self.unembedding().astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, matrix, preferred_element_type=wide)

    def __call__(
        self,
        tokens: jax.Array,
        rows: Rows,
        positions: jax.Array,
        segments: jax.Array,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
        beside: Beside | None = None,
        measure: bool = False,
        keep: bool = False,
    ) -> Output:
        """The differentiated part of a training step.

        Args:
          tokens, positions, segments: int32 [B, T] (see data/packing.py).
          rows: Engram layer id -> [B, T, H, dim] from the memory; None = the layer adds nothing.
          mask: bool [B, T] or None; False = a token that gets no memory.
          shard: the mesh, if this runs on one device's sequences; the stacks' parameters are then
            this device's shards, all others whole.
          beside: what tokens read beside their rows (`Program.beside`), None where nothing is.
          measure: whether moments of activations are measured. keep: whether `Output.added`,
            `read` and `layers` are; not both.

        Returns:
          The hidden states, gates and loads (`Output`).
        """
        x = self.embed(tokens)
        gates, loads, measured, added, found, layers = {}, [], {}, {}, {}, []
        observe = moments if measure else collapse if keep else None
        for stage in self.stage_list:
            if stage.name in self.engrams and rows[stage.name] is not None:
                read = self._read(stage.name, rows[stage.name], beside)
                out, gate = self.engrams[stage.name](read, x, segments, mask, shard)
                if keep:
                    added[stage.name], found[stage.name] = out, x
                x = x + out
                if gate is not None:
                    gates[stage.name] = gate
                if measure:
                    measured[f"memory/{stage.name}"] = moments(out)
            x = self._learned(stage, x)
            x, load = self.blocks[stage.name](x, positions, segments, shard, observe)
            if observe is not None:
                load, seen = load
                if measure:
                    measured[f"stack/{stage.name}"] = seen
                else:
                    layers.append(seen)
            if stage.kind == MOE:
                loads.append(load)
        hidden = self.finish(x)
        of_experts = jnp.concatenate(loads) if loads else jnp.zeros((0, 0))
        every = jnp.concatenate(layers) if layers else None
        return Output(hidden, gates, of_experts, measured, added, found, every)

    def init_decode(self, batch: int, capacity: int) -> DecodeState:
        """An empty state for `batch` sequences of at most `capacity` tokens."""
        caches: dict[str, Any] = {}
        for stage in self.stage_list:
            attention = self.blocks[stage.name].blocks.attention
            one = attention.init_cache(batch, capacity)
            caches[stage.name] = jax.tree.map(
                lambda x, n=stage.count: jnp.broadcast_to(x, (n, *x.shape)), one
            )
        tails = {k: m.init_tail(batch, self.dtype) for k, m in self.engrams.items()}
        return DecodeState(jnp.zeros((batch,), jnp.int32), caches, tails)

    def cached(
        self,
        tokens: jax.Array,
        rows: Rows,
        valid: jax.Array,
        state: DecodeState,
        mask: jax.Array | None = None,
        shard: ShardView = UNSHARDED,
        beside: Beside | None = None,
    ) -> tuple[jax.Array, DecodeState]:
        """Prefill or decode S more tokens of each sequence.

        Args:
          tokens: int32 [B, S]; rows: layer id -> [B, S, H, dim].
          valid: int32 [B], how many of a row's S tokens are real (a prefix); the rest is padding.
          mask: bool [B, S] or None, beside: as in `__call__`.

        Returns:
          (hidden [B, S, d], the state after the real tokens).
        """
        x = self.embed(tokens)
        steps = jnp.arange(tokens.shape[1])
        real = steps < valid[:, None]
        capacity = state.capacity
        positions = jnp.where(real, state.lengths[:, None] + steps, capacity)
        caches, tails = {}, dict(state.tails)
        for stage in self.stage_list:
            if stage.name in self.engrams:
                read = self._read(stage.name, rows[stage.name], beside)
                out, tails[stage.name] = self.engrams[stage.name].cached(
                    read, x, state.tails[stage.name], valid, mask
                )
                x = x + out
            x = self._learned(stage, x)
            x, caches[stage.name] = self.blocks[stage.name].cached(
                x, positions, real.astype(jnp.int32), state.caches[stage.name], shard
            )
        hidden = self.finish(x)
        return hidden, DecodeState(state.lengths + valid, caches, tails)

    def paged(
        self,
        span: tuple[Stage, ...],
        x: jax.Array,
        rows: jax.Array | None,
        start: jax.Array,
        valid: jax.Array,
        mask: jax.Array | None,
        tail: jax.Array | None,
        pages: jax.Array,
        pool: jax.Array,
        shard: ShardView = UNSHARDED,
        beside: Beside | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """One of `spans` over S more tokens of each sequence, caches in shared pages.

        Args:
          x: streams [B, S, M, d].
          rows: [B, S, H, dim] of the span's Engram layer; None = it has none, or it is skipped.
          start: int32 [B], tokens before these. valid: int32 [B], how many of the S are real.
          mask: bool [B, S] or None, beside: as in `__call__`.
          tail: of the Engram module's convolution, [B, L, M, d], or None.
          pages, pool: see MLA.paged.

        Returns:
          (streams, tail, pool).
        """
        steps = jnp.arange(x.shape[1])
        real = steps < valid[:, None]
        beyond = pages.shape[1] * pool.shape[2]
        positions = jnp.where(real, start[:, None] + steps, beyond)
        for stage in span:
            if stage.name in self.engrams and rows is not None:
                read = self._read(stage.name, rows, beside)
                out, tail = self.engrams[stage.name].cached(read, x, tail, valid, mask)
                x = x + out
            x = self._learned(stage, x)
            x, pool = self.blocks[stage.name].paged(
                x, positions, real.astype(jnp.int32), pages, pool, shard
            )
        return x, tail, pool
