"""kNN-LM against sums over all keys in NumPy float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.evaluation import knn_lm
from engram_jax.evaluation.knn_lm import Datastore, choose, mixed_nats, target_probabilities

V, D = 6, 5


@pytest.fixture(scope="module")
def sizes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "keys": rng.normal(size=(300, D)).astype(np.float32),
        "values": rng.integers(0, V, 300).astype(np.int32),
        "queries": rng.normal(size=(40, D)).astype(np.float32),
    }


def brute_force(sizes, query: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """p_kNN of every token: equation 2, over the k nearest of all keys."""
    distances = ((sizes["keys"].astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1)
    p = np.zeros(V)
    for i in np.argsort(distances)[:k]:
        p[sizes["values"][i]] += np.exp(-distances[i] / temperature)
    return p / p.sum()


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("temperature", [0.05, 2.0])
def test_probabilities_are_those_of_every_distance(sizes, k, temperature):
    """Differences are taken in float32: distances of about 10 are off by 1e-6, and p by that over
    the temperature."""
    store = Datastore(sizes["keys"], sizes["values"])
    assert store.bytes == 300 * (4 * D + 4)
    found = np.zeros((len(sizes["queries"]), V))
    for token in range(V):
        targets = np.full(len(found), token, np.int32)
        distances, hits = store.search(sizes["queries"], targets, 300)
        assert (np.diff(distances, axis=1) >= 0).all()
        found[:, token] = target_probabilities(distances, hits, k, temperature)
    expected = [brute_force(sizes, query, k, temperature) for query in sizes["queries"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 / temperature)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-9)


def test_the_mixture_is_a_distribution(sizes):
    """Equation 3 over the whole vocabulary."""
    rng = np.random.default_rng(1)
    model = rng.dirichlet(np.ones(V), len(sizes["queries"]))
    neighbours = np.stack([brute_force(sizes, q, 8, 1.0) for q in sizes["queries"]])
    nats = -np.log(model)
    found = np.exp(-mixed_nats(nats, neighbours, 0.3))
    np.testing.assert_allclose(found, 0.3 * neighbours + 0.7 * model, rtol=1e-12)
    assert mixed_nats(nats, neighbours, 0.0) is nats


def test_queries_in_blocks_and_equal_vectors(sizes, monkeypatch):
    store = Datastore(sizes["keys"], sizes["values"])
    targets = sizes["values"][:50]
    whole = store.search(sizes["keys"][:50], targets, 3)
    monkeypatch.setattr(knn_lm, "_QUERIES", 7)
    parts = store.search(sizes["keys"][:50], targets, 3)
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_array_equal(parts[1], whole[1])
    assert whole[1][:, 0].all() and not whole[0][:, 0].any()  # its own key is the nearest


def test_the_choice_is_the_best_of_the_grid(sizes):
    """By a loop over the grid; the neighbours know the targets better than this model."""
    rng = np.random.default_rng(2)
    queries = sizes["keys"] + rng.normal(0, 0.4, sizes["keys"].shape).astype(np.float32)
    nats = rng.uniform(1, 3, len(queries))
    distances, hits = Datastore(sizes["keys"], sizes["values"]).search(
        queries, sizes["values"], 300
    )
    found = choose(nats, distances, hits)
    scale = float(distances[:, 0].mean())
    losses = {}
    for k, t, w in itertools.product(knn_lm.NEIGHBOURS, knn_lm.TEMPERATURES, knn_lm.WEIGHTS):
        k = min(k, len(sizes["keys"]))
        weights = np.exp(-(distances[:, :k].astype(np.float64)) / (t * scale))
        p = (weights * hits[:, :k]).sum(axis=1) / weights.sum(axis=1)
        losses[k, t * scale, w] = -np.log(w * p + (1 - w) * np.exp(-nats)).mean()
    best = min(losses.values())
    chosen = losses[found.neighbours, found.temperature, found.weight]
    assert chosen == pytest.approx(best, rel=1e-12)
    assert 0 < found.weight < 1 and best < nats.mean() - 0.1


def test_useless_neighbours_get_no_weight(sizes):
    """None has the target: the model's own loss is left."""
    values = np.full(40, V + 1, np.int32)
    distances, hits = Datastore(sizes["keys"], sizes["values"]).search(
        sizes["queries"], values, 300
    )
    assert choose(np.ones(40), distances, hits).weight == 0


def test_an_inverted_file_finds_most_of_the_nearest():
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(4000, D)).astype(np.float32)
    values = np.arange(4000, dtype=np.int32)
    exact, approximate = Datastore(keys, values), Datastore(keys, values, knn_lm.IVF)
    assert approximate.bytes > exact.bytes
    distances, _ = exact.search(keys[:200] + 0.01, values[:200], 8)
    others, hits = approximate.search(keys[:200] + 0.01, values[:200], 8)
    assert (others >= distances - 1e-4).all()
    assert np.isclose(others, distances, atol=1e-4).mean() > 0.9 and hits[:, 0].mean() > 0.9


def test_fewer_found_than_asked_for():
    """A cell of an inverted file may have less: what is missing weighs nothing."""
    distances = np.asarray([[1.0, 2.0, np.inf], [np.inf] * 3], np.float32)
    hits = np.asarray([[False, True, False], [False] * 3])
    expected = np.exp(-2.0) / (np.exp(-1.0) + np.exp(-2.0))
    np.testing.assert_allclose(target_probabilities(distances, hits, 3, 1.0), [expected, 0.0])
