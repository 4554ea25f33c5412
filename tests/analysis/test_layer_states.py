"""LogitLens and the states of layers, against models that end there and NumPy in float64."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from engram_jax.analysis import layer_states
from engram_jax.training.state import build_training
from engram_jax.training.step import score_step
from tests.tiny import random_batch, tiny, tiny_addressing, tiny_config


@pytest.fixture(scope="module")
def given():
    program, state = tiny()
    batch = random_batch(program.config)
    return program, state, (state.params, state.router_bias, state.memory), batch


def cut(state, layers):
    """The parameters of the model's first layers: of the stack that is cut, the first blocks."""
    blocks = {k: x for k, x in state.params["blocks"].items() if int(k) < layers}
    last = max(blocks, key=int)
    count = layers - int(last)
    blocks[last] = jax.tree.map(lambda x: x[:count], blocks[last])
    bias = jax.tree.map(lambda x: x, state.router_bias)
    of = bias.get("blocks", bias)
    for name in [k for k in of if int(k) >= layers]:
        del of[name]
    if last in of:
        of[last] = jax.tree.map(lambda x: x[:count], of[last])
    params = {**state.params, "blocks": blocks}
    if layers <= 1:
        params["engrams"] = {}
    return params, bias


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits_of(program, params, bias, memory, batch):
    hidden = score_step(program, params, bias, memory, batch)[1]
    return program.model(params, bias).logits(hidden)


def test_every_layer_is_the_model_that_ends_there(given, monkeypatch):
    program, state, weights, batch = given
    final = log_softmax(logits_of(program, *weights, batch))
    found = np.asarray(layer_states.jit_lens(program)(*weights, batch))
    assert found.shape == (3, *batch["tokens"].shape)
    for layers in (1, 2, 3):
        engram = (1,) if layers > 1 else ()
        experts = {"model.ffn.routed_experts": 0} if layers == 1 else {}
        keys = {"model.layers": layers, "model.engram.layers": engram, **experts}
        config = tiny_config(**keys)
        short = build_training(config, tiny_addressing(config))
        params, bias = cut(state, layers)
        memory = state.memory if engram else {}
        own = log_softmax(logits_of(short, params, bias, memory, batch))
        wanted = (np.exp(own) * (own - final)).sum(-1)
        np.testing.assert_allclose(found[layers - 1], wanted, atol=3e-5)
    assert np.abs(found[-1]).max() < 1e-6 and found[0].mean() > 0.01
    monkeypatch.setattr(layer_states, "MOST", 5 * program.config.tokenizer.vocab_size)
    pieces = layer_states.jit_lens(program)(*weights, batch)
    np.testing.assert_allclose(pieces, found, atol=3e-6)


def test_states_at_chosen_tokens():
    program, state = tiny(**{"model.layers": 2})
    weights, batch = (state.params, state.router_bias, state.memory), random_batch(program.config)
    rng = np.random.default_rng(0)
    size, length = batch["tokens"].shape
    chosen = rng.integers(0, length, (size, 3)).astype(np.int32)
    found = np.asarray(layer_states.jit_states(program)(*weights, {**batch, "chosen": chosen}))
    every = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
    whole = np.asarray(layer_states.jit_states(program)(*weights, {**batch, "chosen": every}))
    assert whole.shape == (2, size, length, program.config.model.d_model)
    np.testing.assert_array_equal(found, whole[:, np.arange(size)[:, None], chosen])
    model = program.model(*weights[:2])
    hidden = score_step(program, *weights, batch)[1]
    np.testing.assert_allclose(model.norm(whole[-1]), hidden, atol=1e-5)


def test_what_is_switched_off_is_off(given):
    program, _, weights, batch = given
    off = dataclasses.replace(
        program.config, serve=dataclasses.replace(program.config.serve, off_layers=(1,))
    )
    on, other = (
        np.asarray(layer_states.jit_lens(p)(*weights, batch))
        for p in (program, dataclasses.replace(program, config=off))
    )
    assert np.abs(other - on)[0].max() > 1e-4  # its distance to another end
