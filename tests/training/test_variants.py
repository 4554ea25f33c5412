"""What the lab's switches change in the training step and its state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing import BatchAddresser, build_addressing, hash_numpy
from engram_jax.training.optim import optimizer
from engram_jax.training.state import abstract_state, build_training
from engram_jax.training.step import batch_addresses, train_step, utilisation
from tests.oracle.engram import hash_rows
from tests.tiny import random_batch, tiny_addressing, tiny_config

FROZEN = {"optimizer.memory_optimizer": "frozen"}
OVER = {"model.engram.form": "over_encoding"}
# One dense layer, the memory in front: little to trace.
ONE_LAYER = {
    "model.layers": 1,
    "model.ffn.routed_experts": 0,
    "model.hyper.streams": 2,
    "model.hyper.sinkhorn_iterations": 1,
    "model.engram.layers": (0,),
    "data.seq_len": 12,
}


def built(**overrides):
    config = tiny_config(**ONE_LAYER, **overrides)
    return build_training(config, tiny_addressing(config))


def shapes_after(program):
    """(state, metrics) after a step, as shapes: nothing is compiled."""
    batch = random_batch(program.config)
    return jax.eval_shape(partial(train_step, program), abstract_state(program), batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_frozen_tables_have_no_moments_and_no_gradients(accumulation):
    """The step returns the very table that it was given, and nothing of it was differentiated."""
    overrides = {**FROZEN, "train.accumulation": accumulation}
    program = built(**overrides)
    state = abstract_state(program)
    table = state.memory["0"]
    assert (table.mu, table.nu) == (None, None)
    with_them = abstract_state(built()).memory["0"]
    assert with_them.nu.shape == with_them.rows.shape == table.rows.shape
    step = partial(train_step, program)
    closed = jax.make_jaxpr(step)(state, random_batch(program.config))
    leaves = jax.tree.leaves(state)
    where = [i for i, leaf in enumerate(leaves) if leaf is table.rows]
    given, returned = closed.jaxpr.invars[where[0]], closed.jaxpr.outvars
    assert len(where) == 1 and given in returned  # untouched
    assert not utilisation(program, state.memory)


def test_metrics_that_do_not_apply_are_absent():
    of_rows = {"grad_norm_memory", "rows_touched/0", "hit_rate/0"}
    _, usual = shapes_after(built())
    assert of_rows < set(usual) and usual["gate/0"].shape == (2,)
    _, found = shapes_after(built(**FROZEN))
    assert set(usual) - set(found) == of_rows
    _, found = shapes_after(built(**{"model.engram.gate": "one"}))
    assert set(usual) - set(found) == {"gate/0"}
    _, found = shapes_after(built(**OVER))
    assert set(usual) - set(found) == {"gate/0"}
    _, found = shapes_after(built(**{"model.engram.multi_branch": False}))
    assert found["gate/0"].shape == (1,)


@pytest.mark.parametrize("where", ["device", "host"])
def test_shuffled_addresses_are_those_of_the_other_half_of_the_batch(where):
    """By the oracle's hash, one document at a time; every row is read as often as before."""
    program = built(**{"model.engram.lookup": "shuffled", "data.batch_size": 6})
    batch = random_batch(program.config)
    addressing, layer = program.addressing, program.addressing.layers[0]
    if where == "host":
        found = BatchAddresser(addressing)(batch["tokens"], batch["segments"])
        batch = {**batch, "addresses": {k: jnp.asarray(v) for k, v in found.items()}}
    found = np.asarray(jax.jit(partial(batch_addresses, program))(batch)["0"])
    own = np.zeros(found.shape, int)
    for b, (tokens, segments) in enumerate(zip(batch["tokens"], batch["segments"], strict=True)):
        for document in np.unique(segments):
            ids = addressing.compression[tokens[segments == document]]
            own[b, segments == document] = hash_rows(ids, layer, layer.fill_id)
    for b in range(6):
        np.testing.assert_array_equal(found[b], own[(b + 3) % 6])
        assert (found[b] != own[b]).any(axis=-1).all()
    np.testing.assert_array_equal(np.sort(found, axis=None), np.sort(own, axis=None))
    with pytest.raises(ValueError, match="no two halves"):
        batch_addresses(program, {"tokens": batch["tokens"][:3], "segments": batch["segments"][:3]})


def test_one_row_per_head_is_all_there_is():
    program = built(**{"model.engram.lookup": "one_row"})
    batch = random_batch(program.config)
    found = jax.jit(partial(batch_addresses, program))(batch)["0"]
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(4), found.shape))
    assert abstract_state(program).memory["0"].rows.shape == (4, 4)


def test_without_compression_raw_ids_are_hashed():
    overrides = {"model.engram.compression": False, "tokenizer.canonical_vocab_size": 0}
    config = tiny_config(**ONE_LAYER, **overrides)
    program = build_training(config, build_addressing(config))
    batch = random_batch(config)
    layer = program.addressing.layers[0]
    expected = hash_numpy.addresses(batch["tokens"], layer, batch["segments"])
    found = jax.jit(partial(batch_addresses, program))(batch)["0"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("overrides", "path", "label"),
    [
        ({"model.engram.gate": "learned"}, ("engrams", "0", "gate_logit"), "adamw_no_decay"),
        ({"model.engram.case": True}, ("engram_case", "0", "case"), "adamw_no_decay"),
        (OVER, ("engrams", "0", "order_projections"), "muon"),
    ],
)
def test_optimizers_of_the_variants_parameters(overrides, path, label):
    found = optimizer.labels(abstract_state(built(**overrides)).params)
    for name in path:
        found = found[name]
    assert found == label
