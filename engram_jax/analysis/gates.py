"""Computes the gate of every Engram layer of a trained model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engram_jax.addressing.detokenizer import text_of
from engram_jax.analysis.memory_reading import run_document
from engram_jax.model.program import Program, Weights
from engram_jax.sharding.rules import P


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
