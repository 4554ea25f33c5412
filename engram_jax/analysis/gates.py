"""Computes the gate of every Engram layer of a trained model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing.detokenizer import text_of
from engram_jax.analysis.depth import Variables
from engram_jax.analysis.memory_reading import run_document
from engram_jax.data.array_store import array_store
from engram_jax.data.packing import PackedSequences
from engram_jax.data.placement import place_batch
from engram_jax.model.program import Program, Weights
from engram_jax.model.transformer import Output, Transformer
from engram_jax.sharding.rules import BATCH, P
from engram_jax.training.step import batch_addresses, fetch_rows, run_network


def gates_of_document(
    program: Program, weights: Weights, tokenizer: Any, ids: Sequence[int]
) -> tuple[list[str], np.ndarray]:
    """(token strings, gates [Engram layers, T] averaged over the M branches) of T token ids, the
    beginning of a document. Layers without a gate are left out."""
    strings = [text_of(tokenizer, i, inside=place > 0) for place, i in enumerate(ids)]
    tokens = np.asarray([ids], np.int32)
    replicated = NamedSharding(program.mesh, P())
    gates = program.jit(partial(_gates, program), out_shardings=replicated)(weights, tokens)
    found = [np.asarray(g) for g in gates.values()]
    return strings, np.stack(found) if found else np.zeros((0, len(ids)), np.float32)


def _gates(program: Program, weights: Weights, tokens: jax.Array) -> dict[str, jax.Array]:
    output = run_document(program, weights, tokens)[2]
    return {layer: jnp.mean(gate[0], axis=-1) for layer, gate in output.gates.items()}


@dataclass(frozen=True)
class TextGates:
    """Gates on a text of T tokens. tokens: T strings. gates: float32 [layers, T, M], per branch
    (M = 1 of one). layers: ids of the Engram layers that have gates."""

    tokens: list[str]
    gates: np.ndarray
    layers: tuple[str, ...]


def jit_gates(program: Program) -> jax.stages.Wrapped:
    """(params, router bias, memory, batch) -> layer id -> float32 [B, T, M], compiled."""

    def result(model: Transformer, output: Output, batch: Any) -> dict[str, jax.Array]:
        return {k: program.shard_view.whole_sequences(gate) for k, gate in output.gates.items()}

    def run(params: Any, bias: Any, memory: Any, batch: Any) -> dict[str, jax.Array]:
        rows = fetch_rows(program, memory, batch_addresses(program, batch))[0]
        return run_network(program, params, rows, bias, batch, result, P(BATCH))

    return program.jit(run)


def gates_of_text(
    program: Program, variables: Variables, tokenizer: Any, ids: Sequence[int]
) -> TextGates:
    """The gates on token ids [T], the beginning of a document, T at most a sequence's tokens."""
    data, vocab = program.config.data, program.config.tokenizer.vocab_size
    sequences = PackedSequences(
        array_store([[*ids, 0]], vocab), data.seq_len, program.config.tokenizer.pad_id, True
    )
    batch = sequences.batch([0, *[1] * (data.batch_size - 1)])  # past the last one: padding
    placed = place_batch(program.mesh, batch, data.batch_size)
    found = jax.device_get(jit_gates(program)(*variables, placed))
    each = [np.asarray(x[0, : len(ids)], np.float32) for x in found.values()]
    strings = [text_of(tokenizer, i, inside=place > 0) for place, i in enumerate(ids)]
    gates = np.stack(each) if each else np.zeros((0, len(ids), 1), np.float32)
    return TextGates(strings, gates, tuple(found))
