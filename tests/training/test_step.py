"""The training step against plain differentiation through the tables, and itself in parts."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from engram_jax.config import DENSE_ADAM, ROWWISE_ADAM
from engram_jax.sharding.rules import names
from engram_jax.training.loss import token_losses
from engram_jax.training.optim import optimizer
from engram_jax.training.state import abstract_state, build_training, init_state
from engram_jax.training.step import (
    batch_addresses,
    eval_step,
    fetch_rows,
    jit_train_step,
    score_step,
    touched_rows,
    train_step,
    utilisation,
)
from engram_jax.training.updates import update_memory
from tests.tiny import NEIGHBOURS, random_batch, tiny, tiny_addressing, tiny_config

CLIPPED = {"optimizer.clip_norm": 0.05}


@lru_cache
def stepping(**overrides):
    """`tiny`, and its step, compiled once for all tests of the same overrides."""
    program, state = tiny(**overrides)
    return program, state, jit_train_step(program)


def copy(state):
    return jax.tree.map(jnp.copy, state)


def dense_gradients(program, state, batch):
    """d loss / d (params, whole tables), by differentiating through the gather."""
    addresses = batch_addresses(program, batch)

    def loss(params, tables):
        rows = {k: tables[k][a] for k, a in addresses.items()}
        model = program.model(params, state.router_bias)
        out = model(batch["tokens"], rows, batch["positions"], batch["segments"])
        losses = token_losses(model.logits(out.hidden), batch["targets"])
        return jnp.sum(losses * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    tables = {k: t.rows for k, t in state.memory.items()}
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state.params, tables)


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b)))


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_step_equals_differentiation_through_the_tables(accumulation):
    """Loss, clipped global norm, moments, rows after one step of Adam, all from dense gradients."""
    program, state, step = stepping(**{"train.accumulation": accumulation, **CLIPPED})
    config, batch = program.config.optimizer, random_batch(program.config)
    loss, (grad_params, grad_tables) = dense_gradients(program, state, batch)
    norm = float(jax.jit(optax.tree.norm)((grad_params, grad_tables)))
    assert norm > config.clip_norm  # clipping takes part
    new, metrics = step(copy(state), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    of_tables = float(jax.jit(optax.tree.norm)(grad_tables))
    np.testing.assert_allclose(metrics["grad_norm_memory"], of_tables, rtol=1e-4)
    factor = config.clip_norm / norm
    rate = float(program.rate(jnp.int32(0))) * config.memory_lr_multiplier
    for k, table in new.memory.items():
        g = np.asarray(grad_tables[k], np.float64) * factor
        addresses = np.asarray(batch_addresses(program, batch)[k])
        touched = np.unique(addresses)
        assert int(metrics[f"rows_touched/{k}"]) == len(touched)
        assert float(metrics[f"distinct/{k}"]) == np.float32(len(touched) / addresses.size)
        assert int(metrics[f"extra_rounds/{k}"]) == 0
        assert relative(table.mu, (1 - config.adam_b1) * g) < 1e-4
        assert relative(table.nu, (1 - config.adam_b2) * g * g) < 1e-4
        expected = np.asarray(state.memory[k].rows, np.float64)
        expected[touched] -= (rate * g / (np.abs(g) + config.adam_eps))[touched]
        np.testing.assert_allclose(table.rows, expected, atol=rate * 2e-2)
    expected_updates, _ = jax.jit(program.tx.update)(
        jax.tree.map(lambda g: g * factor, grad_params), state.opt_state, state.params
    )
    moved = jax.tree.map(lambda a, b: a - b, new.params, state.params)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(expected_updates), strict=True
    ):
        assert relative(ours, theirs) < 2e-2, jax.tree_util.keystr(path)
    assert int(new.step) == 1 and not new.halted


@pytest.mark.slow
def test_memories_with_other_addresses_train_as_adam():
    """Product-key values: dense Adam at the tables' rate, no decay. F-grams: rows of the batch, and
    the spare row, which every token without one reads, stays zero."""
    program, state, step = stepping(**NEIGHBOURS)
    config, batch = program.config.optimizer, random_batch(program.config)
    _, (grad_params, grad_tables) = dense_gradients(program, state, batch)
    norm = float(jax.jit(optax.tree.norm)((grad_params, grad_tables)))
    factor = min(1.0, config.clip_norm / norm)
    new, metrics = step(copy(state), batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert not [name for name in metrics if name.startswith("gate/")]
    rate = float(program.rate(jnp.int32(0))) * config.memory_lr_multiplier

    def adam(g):
        return rate * g / (np.abs(g) + config.adam_eps)

    before, after = (s.params["product_keys"]["1"]["values"] for s in (state, new))
    g = np.asarray(grad_params["product_keys"]["1"]["values"], np.float64) * factor
    assert 0 < np.count_nonzero(g.any(axis=1)) <= len(g) == 18
    np.testing.assert_allclose(after, np.asarray(before, np.float64) - adam(g), atol=rate * 2e-2)

    addresses = np.asarray(batch_addresses(program, batch)["0"])
    used = np.unique(addresses)
    assert used[-1] == 50 and len(used) > 10  # tokens without an f-gram, and with one
    g = np.asarray(grad_tables["0"], np.float64) * factor
    old = np.asarray(state.memory["0"].rows, np.float64)
    np.testing.assert_allclose(new.memory["0"].rows, old - adam(g), atol=rate * 2e-2)
    for seed in range(1, 5):
        new, _ = step(new, random_batch(program.config, seed))
    spare = jax.tree.map(lambda x: np.asarray(x[50]), new.memory["0"])
    assert not np.any(spare.rows) and not np.any(spare.mu) and not np.any(spare.nu)


def test_accumulation_trains_as_the_whole_batch():
    whole, state, step_one = stepping(**{"train.accumulation": 1, **CLIPPED})
    _, _, step_many = stepping(**{"train.accumulation": 2, **CLIPPED})
    one, many = copy(state), copy(state)
    for i in range(3):  # not until the roundings differ enough to decide a tie of experts
        batch = random_batch(whole.config, seed=i)
        one, a = step_one(one, batch)
        many, b = step_many(many, batch)
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-6)
        np.testing.assert_allclose(a["load"], b["load"])
        assert int(a["rows_touched/1"]) == int(b["rows_touched/1"])


def test_it_learns_a_repeated_batch():
    program, state, step = stepping()
    state = copy(state)
    batch, losses = random_batch(program.config), []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("memory", [ROWWISE_ADAM, pytest.param(DENSE_ADAM, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_and_halts(memory):
    keys = {} if memory == ROWWISE_ADAM else {"optimizer.memory_optimizer": memory}
    program, state, step = stepping(**keys)
    batch = random_batch(program.config)
    good, metrics = step(copy(state), batch)
    assert metrics["finite"] and not good.halted
    assert np.any(np.asarray(good.memory["1"].rows) != np.asarray(state.memory["1"].rows))
    poisoned = {**batch, "loss_mask": np.full_like(batch["loss_mask"], np.inf)}
    after, metrics = step(copy(state), poisoned)
    assert not metrics["finite"] and bool(after.halted)
    later, metrics = step(after, batch)  # already dispatched when the host notices
    assert not metrics["finite"] and int(later.step) == 0
    kept = dataclasses.replace(later, halted=state.halted)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_hit_rate_and_utilisation_count_trained_rows():
    """A row counts as trained once a gradient has reached it (a masked target sends none)."""
    program, state, step = stepping()
    batch = random_batch(program.config)
    state, first = step(copy(state), batch)
    assert float(first["hit_rate/1"]) == 0
    trained = np.count_nonzero(np.any(np.asarray(state.memory["1"].nu) > 0, axis=1))
    used = utilisation(program, state.memory)["1"]
    assert float(used) == pytest.approx(trained / program.table_rows["1"])
    assert int(touched_rows(state.memory)["1"]) == trained
    touched = int(first["rows_touched/1"])
    assert 0.7 * touched < trained <= touched
    _, again = step(state, batch)
    assert float(again["hit_rate/1"]) == pytest.approx(trained / touched)


def test_gates_are_means_over_real_tokens():
    program, state, step = stepping()
    batch = random_batch(program.config, accumulate_padding=True)
    one, none = np.zeros_like(batch["segments"]), np.zeros_like(batch["segments"])
    one[2, 7] = 1

    @jax.jit
    def gates_of(batch):
        rows, _ = fetch_rows(program, state.memory, batch_addresses(program, batch))
        model = program.model(state.params, state.router_bias)
        return model(batch["tokens"], rows, batch["positions"], batch["segments"]).gates["1"]

    for segments in (batch["segments"], one, none):
        given = {**batch, "segments": segments}
        _, metrics = step(copy(state), given)
        gates = np.asarray(gates_of(given), np.float64)[segments > 0]  # [tokens, M]
        expected = gates.sum(0) / max(len(gates), 1)
        np.testing.assert_allclose(metrics["gate/1"], expected, rtol=1e-5)


def test_loads_count_real_tokens_and_move_the_bias():
    program, state, step = stepping()
    ffn = program.config.model.ffn
    batch = random_batch(program.config, accumulate_padding=True)
    after, metrics = step(copy(state), batch)
    load = np.asarray(metrics["load"])
    real = np.count_nonzero(batch["segments"])
    np.testing.assert_array_equal(load.sum(1), np.full(2, real * ffn.top_k))
    before = np.concatenate([np.asarray(b) for b in jax.tree.leaves(state.router_bias)])
    now = np.concatenate([np.asarray(b) for b in jax.tree.leaves(after.router_bias)])
    moved = ffn.bias_update_rate * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_allclose(now - before, moved, atol=1e-6)


def test_host_addresses_train_the_same():
    program, state, step = stepping()
    batch = random_batch(program.config)
    from engram_jax.addressing import BatchAddresser

    addresses = BatchAddresser(program.addressing)(batch["tokens"], batch["segments"])
    _, device = step(copy(state), batch)
    _, host = step(copy(state), {**batch, "addresses": addresses})
    assert float(device["loss"]) == float(host["loss"])


def test_tables_are_updated_in_place():
    """No copy of a table in the compiled step, every state buffer aliased."""
    rows = 300_007
    config = tiny_config(**{"model.engram.rows_per_head": (rows,)})
    from engram_jax.training.state import build_training

    program = build_training(config, tiny_addressing(config))
    state = abstract_state(program)
    compiled = jit_train_step(program).lower(state, random_batch(config)).compile()
    stats = compiled.memory_analysis()
    table_bytes = program.table_rows["1"] * config.model.engram.dim * 4
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size > 3 * table_bytes
    assert stats.alias_size_in_bytes >= size
    assert stats.temp_size_in_bytes < table_bytes / 4


@pytest.mark.parametrize("wide", [False, True])
def test_the_state_keeps_its_types(wide):
    """Else the second step compiles again. wide: where JAX allows numbers of 64 bits."""
    program, _ = tiny()
    batch = random_batch(program.config)

    def types(tree):
        return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.weak_type), tree)

    with jax.enable_x64(wide):
        state = abstract_state(program)
        after, _ = jax.eval_shape(partial(train_step, program), state, batch)
    assert types(after) == types(state)


def test_metrics_of_a_model_without_memory_have_the_same_types():
    memory, _ = tiny()
    config = tiny_config(**{"model.engram.layers": ()})
    found = []
    for program in (memory, build_training(config, None)):
        batch = random_batch(program.config)
        _, metrics = jax.eval_shape(partial(train_step, program), abstract_state(program), batch)
        found.append({k: str(x.dtype) for k, x in metrics.items() if not k.endswith("/1")})
    assert found[0] == found[1]
    assert found[0]["grad_norm_memory"] == "float32"


def test_evaluation_is_the_training_loss_before_the_step():
    program, state, step = stepping()
    batch = random_batch(program.config)
    total, count = jax.jit(partial(eval_step, program))(
        state.params, state.router_bias, state.memory, batch
    )
    _, metrics = step(copy(state), batch)
    np.testing.assert_allclose(total / count, metrics["loss"], rtol=1e-6)
    assert float(count) == batch["loss_mask"].sum()


def test_losses_of_targets_are_those_of_the_whole_logits():
    """Against the plain model without chunks; they add up to the evaluation's sum."""
    program, state = tiny()
    batch = random_batch(program.config, accumulate_padding=True)
    inputs = state.params, state.router_bias, state.memory, batch
    nats, hidden = jax.jit(partial(score_step, program))(*inputs)
    rows, _ = fetch_rows(program, state.memory, batch_addresses(program, batch))

    @jax.jit
    def plain(params, rows):
        model = program.model(params, state.router_bias)
        out = model(batch["tokens"], rows, batch["positions"], batch["segments"])
        return token_losses(model.logits(out.hidden), batch["targets"]), out.hidden

    losses, expected = plain(state.params, rows)
    np.testing.assert_allclose(nats, losses * batch["loss_mask"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(np.asarray(nats)[batch["loss_mask"] == 0])
    total, _ = jax.jit(partial(eval_step, program))(*inputs)
    np.testing.assert_allclose(np.asarray(nats, np.float64).sum(), total, rtol=1e-6)


def test_a_table_changes_no_other_parameters_start():
    program, _ = tiny()
    bigger, _ = tiny(**{"model.engram.rows_per_head": (71,)})
    ours, theirs = (jax.jit(partial(init_state, p))().params for p in (program, bigger))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


EXPECTED_OPTIMIZERS = {
    "embedding": "adamw",
    "norm/gain": "adamw_no_decay",
    "engrams/*/projection": "muon",
    "engrams/*/bias": "adamw_no_decay",
    "engrams/*/query_norm/gain": "adamw_no_decay",
    "engrams/*/key_norm/gain": "adamw_no_decay",
    "engrams/*/conv/norm/gain": "adamw_no_decay",
    "engrams/*/conv/taps": "adamw_no_decay",
    "blocks/*/blocks/attention/q_proj": "muon",
    "blocks/*/blocks/attention/kv_a_proj": "muon",
    "blocks/*/blocks/attention/kv_b_proj": "muon",
    "blocks/*/blocks/attention/o_proj": "muon",
    "blocks/*/blocks/attention/kv_norm/gain": "adamw_no_decay",
    "blocks/*/blocks/attention_norm/gain": "adamw_no_decay",
    "blocks/*/blocks/ffn_norm/gain": "adamw_no_decay",
    "blocks/*/blocks/attention_hyper/fn": "adamw",
    "blocks/*/blocks/attention_hyper/base": "adamw_no_decay",
    "blocks/*/blocks/attention_hyper/scale": "adamw_no_decay",
    "blocks/*/blocks/attention_hyper/norm_gain": "adamw_no_decay",
    "blocks/*/blocks/ffn_hyper/fn": "adamw",
    "blocks/*/blocks/ffn_hyper/base": "adamw_no_decay",
    "blocks/*/blocks/ffn_hyper/scale": "adamw_no_decay",
    "blocks/*/blocks/ffn_hyper/norm_gain": "adamw_no_decay",
    "blocks/*/blocks/ffn/router": "adamw",
    "blocks/*/blocks/ffn/gate": "muon",
    "blocks/*/blocks/ffn/up": "muon",
    "blocks/*/blocks/ffn/down": "muon",
    "blocks/*/blocks/ffn/shared/gate": "muon",
    "blocks/*/blocks/ffn/shared/up": "muon",
    "blocks/*/blocks/ffn/shared/down": "muon",
}


def optimizers(program):
    """Parameter name, numbers as "*" -> the label of its optimizer."""
    found = {}
    for path, label in jax.tree_util.tree_leaves_with_path(
        optimizer.labels(abstract_state(program).params)
    ):
        name = "/".join("*" if part.isdigit() else part for part in names(path))
        assert found.setdefault(name, label) == label
    return found


def test_every_parameter_has_the_expected_optimizer():
    assert optimizers(tiny()[0]) == EXPECTED_OPTIMIZERS


def test_an_untied_head_has_the_embeddings_optimizer():
    config = tiny_config(**{"model.tie_embeddings": False})
    program = build_training(config, tiny_addressing(config))
    assert optimizers(program) == EXPECTED_OPTIMIZERS | {"head": "adamw"}


def newton_schulz(g):
    """Five quintic steps towards the nearest orthogonal matrix, float64."""
    x = np.asarray(g, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_takes_stacks_matrix_by_matrix():
    """Every expert of every scanned layer, every key: -lr 0.2 sqrt(max(in, out)) NS(g)."""
    program, state = tiny()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), state.params)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = jax.jit(program.tx.update)(grads, program.tx.init(zero), zero)
    rate = float(program.rate(jnp.int32(0)))

    def experts(tree):  # [layers, E, d, f]
        return np.asarray(tree["blocks"]["1"]["blocks"]["ffn"]["gate"]).reshape(-1, 16, 12)

    def keys_and_value(tree):  # [d_mem, M + 1, d]
        return np.asarray(tree["engrams"]["1"]["projection"]).transpose(1, 0, 2)

    for matrices in (experts, keys_and_value):
        for g, update in zip(matrices(grads), matrices(updates), strict=True):
            expected = -rate * 0.2 * np.sqrt(max(g.shape)) * newton_schulz(g)
            np.testing.assert_allclose(update, expected, atol=1e-3 * np.abs(expected).max())


def test_rows_in_bfloat16_are_rounded_by_the_run_s_seed():
    """Same rows, same gradients: another seed makes another table, the same seed the same."""
    program, state = tiny(**{"model.engram.table_dtype": "bfloat16"})
    batch = random_batch(program.config)

    def updated(seed):
        train = dataclasses.replace(program.config.train, seed=seed)
        own = dataclasses.replace(program, config=dataclasses.replace(program.config, train=train))

        @jax.jit
        def update(memory, batch):
            rows, plans = fetch_rows(own, memory, batch_addresses(own, batch))
            exchanges = own.exchanges()
            sent = {k: exchanges[k].send(x.astype(jnp.float32), plans[k]) for k, x in rows.items()}
            now = jnp.float32(1), jnp.int32(5), jnp.bool_(True)
            return update_memory(own, memory, plans, sent, *now)[0]

        return np.asarray(update(state.memory, batch)["1"].rows)

    first, again, other = updated(0), updated(0), updated(1)
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != np.asarray(state.memory["1"].rows)) > 0.1
    assert np.mean(first != other) > 0.1
