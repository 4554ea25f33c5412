"""LogitLens and CKA over batches of a text: padding counts nowhere, minibatches are whole."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from engram_jax.analysis.cka import MinibatchCKA
from engram_jax.analysis.depth import log_lens, similarity
from engram_jax.analysis.layer_states import jit_lens, jit_states
from tests.tiny import random_batch, tiny


@pytest.fixture(scope="module")
def given():
    """(program, variables, batches), the last of them with padding and a sequence of nothing."""
    program, state = tiny()
    batches = [random_batch(program.config, i, accumulate_padding=i == 1) for i in range(2)]
    batches[1]["segments"][2], batches[1]["loss_mask"][2] = 0, 0
    return program, (state.params, state.router_bias, state.memory), batches


def test_the_lens_is_the_mean_over_real_tokens(given):
    program, variables, batches = given
    lens, values, by_sequence = jit_lens(program), [], []
    for batch in batches:
        kl = np.asarray(lens(*variables, batch), np.float64)
        for b in range(kl.shape[1]):
            real = batch["segments"][b] > 0
            values.append(kl[:, b, real])
            if real.any():
                by_sequence.append((kl[:, b, real].sum(axis=1), real.sum()))
    found = log_lens(program, variables, batches)
    every = np.concatenate(values, axis=1)
    assert found.tokens == every.shape[1] == 8 * 20 - 20 - 5
    np.testing.assert_allclose(found.mean, every.mean(axis=1), rtol=1e-12)
    assert abs(found.mean[-1]) < 1e-6 < found.mean[0]
    # Against the jackknife over sequences, which is the same to first order.
    sums, counts = (np.asarray(x) for x in zip(*by_sequence, strict=True))
    n = len(counts)
    without = (sums.sum(axis=0) - sums) / (counts.sum() - counts)[:, None]
    jackknife = np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(found.error[:-1], jackknife[:-1], rtol=0.1)


def test_similarity_is_that_of_the_states_at_the_places(given):
    program, variables, batches = given
    rng = np.random.default_rng(0)
    places = [
        [np.sort(rng.choice(15, n, replace=False)) for n in counts]
        for counts in ((5, 0, 8, 3), (4, 2, 0, 1))
    ]
    texts = list(zip(batches, places, strict=True))
    size, length = batches[0]["tokens"].shape
    every = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
    states = jit_states(program)
    rows = []
    for batch, at in texts:
        whole = np.asarray(states(*variables, {**batch, "chosen": every}))
        rows += [whole[:, b, t] for b in range(size) for t in at[b]]
    rows = np.stack(rows, axis=1)
    assert rows.shape[1] == 23
    wanted = MinibatchCKA()
    for start in (0, 10):
        wanted.add(rows[:, start : start + 10], rows[:, start : start + 10])
    found = similarity([(program, variables)], texts, minibatch=10)
    assert (found.tokens, found.batches) == (20, 2)  # 3 are left, no minibatch
    np.testing.assert_allclose(found.cka, wanted.similarity(), rtol=1e-5)
    np.testing.assert_allclose(np.diag(found.cka), 1, atol=1e-9)
    alone = similarity([(program, variables)], texts)
    assert (alone.tokens, alone.batches) == (23, 1)
    # A second model is the second: here one with other parameters.
    other = jax.tree.map(
        lambda x: x * (1 + 0.5 * np.sin(np.arange(x.size)).reshape(x.shape)), variables[0]
    )
    both = similarity([(program, variables), (program, (other, *variables[1:]))], texts, 10)
    moved = similarity([(program, (other, *variables[1:])), (program, variables)], texts, 10)
    np.testing.assert_allclose(both.cka, moved.cka.T, rtol=1e-6)
    assert np.abs(both.cka - both.cka.T).max() > 1e-3


def test_more_places_than_an_eighth_are_spread(given):
    program, variables, batches = given
    texts = [(batches[0], [np.arange(20)] * 4)]
    assert similarity([(program, variables)], texts).tokens == 4 * 8


def test_too_few_places(given):
    program, variables, batches = given
    few = [(batches[0], [np.array([1, 2]), *[np.zeros(0, int)] * 2, np.array([3])])]
    with pytest.raises(ValueError, match="3 tokens"):
        similarity([(program, variables)], few)
    with pytest.raises(ValueError, match="0 tokens"):
        similarity([(program, variables)], [(batches[0], [np.zeros(0, int)] * 4)])


def test_one_sequence_has_no_standard_error(given):
    program, variables, batches = given
    one = {k: np.where(np.arange(4)[:, None] == 0, x, 0) for k, x in batches[0].items()}
    one = {k: x.astype(batches[0][k].dtype) for k, x in one.items()}
    found = log_lens(program, variables, [one])
    assert found.tokens == 20 and np.isnan(found.error).all()
    assert found.mean.shape == (program.config.model.layers,)
