"""Runs that update a part of their parameters and tables, average them, and measure more.

The oracle of a part is the whole: with one clipping factor for both, what is updated must go as it
goes when everything is.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from engram_jax.config.errors import UserError
from engram_jax.model.program import Weights
from engram_jax.sharding.parameters import group_of
from engram_jax.sharding.rules import names
from engram_jax.training.loss import cross_entropy, cross_entropy_and_z
from engram_jax.training.state import build_training, create_state, state_from
from engram_jax.training.step import (
    batch_addresses,
    fetch_rows,
    jit_train_step,
    touched_rows,
    utilisation,
)
from tests.tiny import random_batch, tiny, tiny_addressing, tiny_config

# Little to compile; clipping by a norm of less would be another step.
SMALL = {
    "optimizer.clip_norm": float("inf"),
    "model.layers": 2,
    "model.hyper.streams": 1,
    "model.attention.heads": 1,
}


@lru_cache
def stepping(**overrides):
    """(program, state before the first step, its compiled step); all start from the same values."""
    _, state = tiny(**SMALL)
    config = tiny_config(**{**SMALL, **overrides})
    program = build_training(config, tiny_addressing(config))
    rows = dict.fromkeys(program.table_rows, state.memory["1"].rows)
    weights = Weights(state.params, state.router_bias, rows)
    weights = jax.tree.map(jnp.copy, weights)  # which are donated
    return program, state_from(program, weights), jit_train_step(program)


# Every switch at once, which are told apart by what they change.
MEASURED = {
    "train.ema_decay": 0.75,
    "train.trainable": ("!embedding",),
    "train.z_loss": 0.01,
    "train.log_norms": True,
    "train.log_activations": True,
}


def run(steps=2, **overrides):
    """(program, first state, last state, metrics of each step)."""
    program, start, step = stepping(**overrides)
    state, found = jax.tree.map(jnp.copy, start), []
    for number in range(steps):
        state, metrics = step(state, random_batch(program.config, seed=number))
        found.append(metrics)
    return program, start, state, found


def flat(tree):
    return {"/".join(names(p)): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def bits(x):
    return np.asarray(x).tobytes()


CHOICES = {
    "the memory alone": (("engrams", "memory"), ("engrams/",), ("1",)),
    "the tables alone": (("memory/1",), (), ("1",)),
    "all but the tables": (("!memory",), ("",), ()),
    "all but the experts' routers": (("!*/router",), ("",), ("1",)),
}


@pytest.mark.parametrize(
    "choice",
    [next(iter(CHOICES)), *(pytest.param(c, marks=pytest.mark.slow) for c in [*CHOICES][1:])],
)
def test_what_is_not_trained_keeps_its_bits_and_has_no_state(choice):
    patterns, prefixes, tables = CHOICES[choice]
    program, start, state, metrics = run(**{"train.trainable": patterns})
    assert program.trained_tables == tables
    before, after = flat(start.params), flat(state.params)
    trained = {
        name
        for name in before
        if name.startswith(prefixes or "nothing") and not name.endswith("/router")
    }
    if choice == "all but the tables":
        trained |= {name for name in before if name.endswith("/router")}
    assert trained == program.trained & set(before)
    moments = [name.split("/mu/", 1) for name in flat(state.opt_state)]
    assert {found[1] for found in moments if found[1:]} == trained
    for name, x in before.items():
        assert (bits(x) == bits(after[name])) == (name not in trained), name
    (table,) = state.memory.values()
    assert (table.mu is None) == (not tables)
    assert (bits(table.rows) == bits(start.memory["1"].rows)) == (not tables)
    assert ("grad_norm_memory" in metrics[0]) == bool(tables)
    router = "blocks/1/blocks/ffn/router" in trained
    changed = bits(jax.tree.leaves(state.router_bias)[0]) != bits(
        jax.tree.leaves(start.router_bias)[0]
    )
    assert changed == router
    assert (
        bool(utilisation(program, state.memory)) == bool(tables) == bool(touched_rows(state.memory))
    )
    # The first step of what is trained is the whole model's.
    _, _, whole, theirs = run(1)
    _, _, one, ours = run(1, **{"train.trainable": patterns})
    np.testing.assert_array_equal(ours[0]["loss"], theirs[0]["loss"])
    assert float(ours[0]["grad_norm"]) < float(theirs[0]["grad_norm"])
    mine, wanted = flat(one.params), flat(whole.params)
    for name in trained:
        np.testing.assert_allclose(mine[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
    if tables:
        np.testing.assert_allclose(one.memory["1"].rows, whole.memory["1"].rows, atol=1e-6)


@pytest.mark.slow
def test_one_table_of_two_and_accumulation():
    """The other one keeps rows without moments, and neither it nor the rest sends gradients."""
    two = {"model.engram.layers": (0, 1), "train.trainable": ("memory/1", "norm")}
    config = tiny_config(**{**SMALL, **two, "train.accumulation": 2})
    program = build_training(config, tiny_addressing(config))
    start = create_state(program)
    state, metrics = jit_train_step(program)(jax.tree.map(jnp.copy, start), random_batch(config))
    assert program.trained_tables == ("1",)
    assert state.memory["0"].mu is None and state.memory["1"].mu is not None
    assert bits(state.memory["0"].rows) == bits(start.memory["0"].rows)
    assert bits(state.memory["1"].rows) != bits(start.memory["1"].rows)
    assert "rows_touched/1" in metrics and "rows_touched/0" not in metrics
    assert "distinct/0" in metrics


def test_frozen_tables_cannot_be_chosen():
    keys = {"optimizer.memory_optimizer": "frozen", "train.trainable": ("engrams", "memory")}
    config = tiny_config(**keys)
    with pytest.raises(UserError, match="'memory' matches no parameter and no table that is trai"):
        build_training(config, tiny_addressing(config))


def test_the_average_is_the_recursion_in_float64():
    """And of what is trained alone; a step that is not finite leaves it as it is."""
    decay = MEASURED["train.ema_decay"]
    program, start, step = stepping(**MEASURED)
    state = jax.tree.map(jnp.copy, start)
    expected = {k: np.asarray(x, np.float64) for k, x in flat(state.params).items()}
    for number in range(3):
        state, _ = step(state, random_batch(program.config, seed=number))
        for name, x in flat(state.params).items():
            expected[name] = decay * expected[name] + (1 - decay) * np.asarray(x, np.float64)
    found = flat(state.average)
    assert set(found) == set(flat(start.params)) - {"embedding"}
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    averaged = program.averaged(state)
    assert bits(averaged.params["embedding"]) == bits(state.params["embedding"])
    assert bits(averaged.params["norm"]["gain"]) == bits(found["norm/gain"])
    before = {name: bits(x) for name, x in found.items()}
    batch = random_batch(program.config)
    bad = {**batch, "loss_mask": np.full_like(batch["loss_mask"], np.inf)}
    state, metrics = step(state, bad)
    assert not metrics["finite"] and {k: bits(x) for k, x in flat(state.average).items()} == before


def test_without_an_average_there_is_none_to_use():
    program, start, _ = stepping()  # compiled for other tests
    with pytest.raises(ValueError, match="no average"):
        program.averaged(start)


@pytest.mark.parametrize("chunk", [4, 100])
def test_z_loss_and_its_gradient_in_float64(chunk):
    """PaLM's: the coefficient times the square of log Z of every target, by finite formula:
    d/dlogits = (1 + 2 z log Z) softmax - one-hot."""
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(2, 7, 5)), rng.normal(size=(11, 5))
    targets = rng.integers(0, 11, (2, 7)).astype(np.int32)
    mask, z = (rng.random((2, 7)) < 0.7).astype(np.float64), 0.3
    logits = hidden @ matrix.T
    log_z = logsumexp(logits, axis=-1)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    alone = ((log_z - picked) * mask).sum()
    softmax = np.exp(logits - log_z[..., None])
    d_logits = softmax * (1 + 2 * z * log_z)[..., None] - np.eye(11)[targets]
    d_logits *= mask[..., None]
    with jax.enable_x64(True):
        inputs = tuple(map(jnp.asarray, (hidden, matrix, targets, mask)))

        def loss(hidden, matrix):
            return cross_entropy_and_z(hidden, matrix, *inputs[2:], z_loss=z, chunk=chunk)

        (total, found), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            *inputs[:2]
        )
        plain = cross_entropy(*inputs, chunk=chunk)
    np.testing.assert_allclose(found, alone, rtol=1e-12)
    np.testing.assert_allclose(plain, alone, rtol=1e-12)
    np.testing.assert_allclose(total, alone + z * (log_z**2 * mask).sum(), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], d_logits @ matrix, rtol=1e-10, atol=1e-12)
    expected = np.einsum("btv,btd->vd", d_logits, hidden)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-10, atol=1e-12)


def test_what_a_step_measures_is_told_from_the_same_step():
    """The reported loss is without z-loss, which moves the parameters; norms by part add up to the
    whole; activations are those of the network."""
    _, start, state, (first, _) = run(**MEASURED)
    _, _, plain, (alone, _) = run()
    np.testing.assert_allclose(first["loss"], alone["loss"], rtol=1e-6)
    assert float(first["z_loss"]) > 0
    assert not [k for k in alone if k.split("/")[0] in ("z_loss", "param_norm", "stream_rms")]
    assert bits(state.params["norm"]["gain"]) != bits(plain.params["norm"]["gain"])
    by_part: dict[str, float] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(start.params):
        group = group_of(names(path), x.ndim)
        by_part[group] = by_part.get(group, 0.0) + float((np.asarray(x, np.float64) ** 2).sum())
    found = {k.partition("/")[2]: v for k, v in first.items() if k.startswith("param_norm/")}
    assert set(found) == set(by_part) >= {"experts", "attention", "engrams", "norms", "embedding"}
    for group, squares in by_part.items():
        np.testing.assert_allclose(found[group], squares**0.5, rtol=1e-5)
    squares = sum(float(v) ** 2 for k, v in first.items() if k.startswith("grad_norm/"))
    whole = float(first["grad_norm"]) ** 2 - float(first["grad_norm_memory"]) ** 2
    assert squares == pytest.approx(whole, rel=1e-4)
    layers = {k.partition("/")[2] for k in first if k.startswith("stream_rms/")}
    assert layers == {"0", "1"} and "grad_norm/embedding" not in first
    assert {k for k in first if k.startswith("memory_")} == {"memory_rms/1", "memory_kurtosis/1"}


def test_activations_are_those_of_the_streams():
    """The last layer's, from the states before the last norm; padding does not count."""
    program, start, step = stepping(**MEASURED)
    batch = random_batch(program.config, accumulate_padding=True)
    rows, _ = fetch_rows(program, start.memory, batch_addresses(program, batch))
    _, metrics = step(jax.tree.map(jnp.copy, start), batch)

    def streams(params, rows):
        network = program.model(params, start.router_bias)
        x, added = network.embed(batch["tokens"]), None
        for stage in network.stage_list:
            if stage.name in network.engrams:
                added, _ = network.engrams[stage.name](rows[stage.name], x, batch["segments"], None)
                x = x + added
            x, _ = network.blocks[stage.name](x, batch["positions"], batch["segments"])
        return x, added

    found = jax.jit(streams)(start.params, rows)
    for name, x in zip(("stream", "memory"), found, strict=True):
        x = np.asarray(x, np.float64)[batch["segments"] > 0]
        square, fourth = (x**2).mean(), (x**4).mean()
        np.testing.assert_allclose(metrics[f"{name}_rms/1"], square**0.5, rtol=1e-4)
        np.testing.assert_allclose(metrics[f"{name}_kurtosis/1"], fourth / square**2, rtol=1e-3)
