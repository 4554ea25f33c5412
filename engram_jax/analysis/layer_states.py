"""What a model holds after each layer: LogitLens, and the states at chosen tokens.

Layer l's state is the streams after block l as the last norm takes them; the final one's logits are
the model's. Both run on the model's mesh, a batch of training's form at a time. A batch's states of
all layers are held, [layers, B, T, d] (texts.py chooses B and T by that), and `MOST` logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from engram_jax.config import ServeConfig
from engram_jax.model.program import Program
from engram_jax.model.switches import switched
from engram_jax.model.transformer import Output, Transformer
from engram_jax.sharding.rules import BATCH, P
from engram_jax.training.step import batch_addresses, fetch_rows, run_network

MOST = 1 << 23  # logits computed at a time, on a device


def jit_lens(program: Program) -> jax.stages.Wrapped:
    """(params, router bias, memory, batch) -> float32 [layers, B, T]: at every token the divergence
    KL(softmax of layer l's logits || the model's), nats (the paper's LogitLens), compiled."""

    def result(model: Transformer, output: Output, batch: Any) -> jax.Array:
        assert output.layers is not None
        found = lens(model, output.layers, output.hidden)
        return program.shard_view.whole_sequences(found, axis=2)

    return _jit(program, result, P(None, BATCH))


def lens(model: Transformer, layers: jax.Array, hidden: jax.Array) -> jax.Array:
    """layers [L, B, T, d], states; hidden [B, T, d], after the last norm -> float32 [L, B, T]."""
    count, batch, length, width = layers.shape
    vocab = model.unembedding().shape[0]
    tokens = batch * length
    size = next(n for n in range(max(1, min(tokens, MOST // vocab)), 0, -1) if tokens % n == 0)
    parts = layers.reshape(count, tokens // size, size, width).swapaxes(0, 1)

    def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, final = inputs
        last = jax.nn.log_softmax(model.logits(final))

        def of_layer(state: jax.Array) -> jax.Array:
            own = jax.nn.log_softmax(model.logits(model.norm(state)))
            return jnp.sum(jnp.exp(own) * (own - last), axis=-1)

        return jax.lax.map(of_layer, states)

    found = jax.lax.map(part, (parts, hidden.reshape(tokens // size, size, width)))
    return found.swapaxes(0, 1).reshape(count, batch, length)


def jit_states(program: Program) -> jax.stages.Wrapped:
    """(params, router bias, memory, batch with "chosen" int32 [B, K], places in the sequences) ->
    float32 [layers, B, K, d], the states there, compiled."""

    def result(model: Transformer, output: Output, batch: Any) -> jax.Array:
        assert output.layers is not None
        places = batch["chosen"][None, :, :, None]
        layers = program.shard_view.whole_sequences(output.layers, axis=2)
        return jnp.take_along_axis(layers, places, axis=2).astype(jnp.float32)

    return _jit(program, result, P(None, BATCH), "chosen")


def _jit(program: Program, result: Any, out_specs: Any, *extra: str) -> jax.stages.Wrapped:
    off: ServeConfig = program.config.serve

    def run(params: Any, bias: Any, memory: Any, batch: Any) -> jax.Array:
        rows: Any = fetch_rows(program, memory, batch_addresses(program, batch))[0]
        rows = switched(program.config.model.engram, off, rows)
        return run_network(
            program, params, rows, bias, batch, result, out_specs, keep=True, extra=extra
        )

    return program.jit(run)
