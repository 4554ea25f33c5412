"""What each Engram layer does at the tokens of one document: rows, gates, what it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.config import ServeConfig
from engram_jax.memory.table import lookup
from engram_jax.model.program import Program, Weights
from engram_jax.model.switches import switched
from engram_jax.model.transformer import Output
from engram_jax.sharding.rules import P
from engram_jax.training.step import batch_addresses


@dataclass(frozen=True)
class MemoryReading:
    """One Engram layer, over a document of T tokens.

    addresses: int32 [T, H], the table's rows that each token reads: all heads of the first order,
      then of the next. rows: [T, H, dim], as they are stored.
    gates: float32 [T, M], per branch ([T, 1] of one); None where the layer has none.
    added: [T, M, d], what the layer adds to the residual streams, the convolution included.
    streams: [T, M, d], the residual streams as the layer finds them: the queries of its gate.
    """

    addresses: np.ndarray
    rows: np.ndarray
    gates: np.ndarray | None
    added: np.ndarray
    streams: np.ndarray


def jit_reading(program: Program, off: ServeConfig | None = None) -> jax.stages.Wrapped:
    """(weights, tokens int32 [1, T]) -> (addresses, rows, gates, added, streams) by layer id,
    compiled. off: which layers and orders are switched off; layers that are off have no gates, add
    nothing and read no streams."""

    def read(weights: Weights, tokens: jax.Array) -> tuple[Any, ...]:
        addresses, rows, output = run_document(program, weights, tokens, off, keep=True)
        return addresses, rows, output.gates, output.added, output.read

    return program.jit(read, out_shardings=NamedSharding(program.mesh, P()))


def read_document(reading: Any, weights: Weights, ids: np.ndarray) -> dict[str, MemoryReading]:
    """By layer id, of the layers that are on. reading: of `jit_reading`. ids: int [T], the
    beginning of a document."""
    found = jax.device_get(reading(weights, ids[None].astype(np.int32)))
    addresses, rows, gates, added, streams = found
    return {
        k: MemoryReading(
            addresses=addresses[k][0],
            rows=rows[k][0],
            gates=gates[k][0] if k in gates else None,
            added=added[k][0],
            streams=streams[k][0],
        )
        for k in added
    }


def run_document(
    program: Program,
    weights: Weights,
    tokens: jax.Array,
    off: ServeConfig | None = None,
    *,
    remembers: jax.Array | None = None,
    keep: bool = False,
) -> tuple[Mapping[str, jax.Array], Mapping[str, jax.Array], Output]:
    """(addresses [B, T, H] and stored rows [B, T, H, dim] by layer id, output) of tokens int32
    [B, T], the beginnings of B documents. remembers: bool [B], the documents to which the layers
    add anything; None = all. keep: of what the layers find and add, too."""
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    addresses = batch_addresses(program, {"tokens": tokens, "segments": segments})
    stored = {layer: lookup(weights.rows[layer], ids) for layer, ids in addresses.items()}
    rows: Any = {layer: x.astype(program.config.model.dtype) for layer, x in stored.items()}
    if off is not None:
        rows = switched(program.config.model.engram, off, rows)
    model = program.model(weights.params, weights.router_bias)
    mask, beside = program.memory_mask(tokens), program.beside(tokens, segments)
    if remembers is not None:
        mask = mask & remembers[:, None]
    output = model(tokens, rows, positions, segments, mask, beside=beside, keep=keep)
    return addresses, stored, output
