"""Count models against dictionary-based ones written from the definitions, term by term."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.evaluation import count_models
from engram_jax.evaluation.count_models import (
    Bigram,
    Events,
    KneserNey,
    Unigram,
    choose_pseudo_counts,
    discounts,
    events,
    fit_and_score,
)

V = 11


def make_batch(seed: int, rows: int = 6, length: int = 40) -> dict[str, np.ndarray]:
    """Batches of short documents of a skewed random chain, as the pipeline lays them out."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, V + 1)
    tokens = rng.choice(V, size=(rows, length), p=weights / weights.sum())
    tokens[:, 1::2] = (tokens[:, 0::2] * 3 + tokens[:, 1::2] % 3) % V
    segments = 1 + np.cumsum(rng.random((rows, length)) < 0.1, axis=1)
    segments[:, 0] = 1
    segments[-1, length // 2 :] = 0
    after = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    mask = np.zeros((rows, length), np.float32)
    mask[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    mask[:-1, -1] = 1  # the last target of a row may belong to its document, too
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.where(mask > 0, after, 0).astype(np.int32),
        "loss_mask": mask,
        "segments": segments.astype(np.int32),
    }


def triples(batch: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """(before, last, target), position by position."""
    found = []
    for row in range(len(batch["tokens"])):
        for t in range(batch["tokens"].shape[1]):
            if batch["loss_mask"][row, t]:
                follows = t > 0 and batch["segments"][row, t - 1] == batch["segments"][row, t]
                before = int(batch["tokens"][row, t - 1]) if follows else V
                found.append((before, int(batch["tokens"][row, t]), int(batch["targets"][row, t])))
    return found


class SlowKneserNey:
    """Chen & Goodman's definition with dictionaries."""

    def __init__(self, train: list[tuple[int, int, int]]) -> None:
        third = Counter(train)
        second = Counter((v, y) for _, v, y in third)
        first = Counter(y for _, y in second)
        self.levels = [
            self.level({((), y): c for y, c in first.items()}),
            self.level({((v,), y): c for (v, y), c in second.items()}),
            self.level({((u, v), y): c for (u, v, y), c in third.items()}),
        ]

    @staticmethod
    def level(counts):
        n = Counter(min(c, 5) for c in counts.values())
        single = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
        discount = {}
        for k in (1, 2, 3):
            value = k - (k + 1) * single * n[k + 1] / n[k] if n[k] else single
            # for k = 3 the numerator is n4, everything above it shares D3
            discount[k] = value if 0 < value <= k else single
        by_context = defaultdict(dict)
        for (context, y), c in counts.items():
            by_context[context][y] = c
        return by_context, discount

    def prob(self, before: int, last: int, target: int) -> float:
        p = 1.0 / V
        for (by_context, discount), context in zip(
            self.levels, [(), (last,), (before, last)], strict=True
        ):
            if context in by_context:
                counts = by_context[context]
                total = sum(counts.values())
                taken = sum(discount[min(c, 3)] for c in counts.values())
                c = counts.get(target, 0)
                kept = c - discount[min(c, 3)] if c else 0.0
                p = kept / total + taken / total * p
        return p


def as_events(found: list[tuple[int, int, int]]) -> Events:
    return Events(*np.asarray(found, np.int64).T)


def every_target(before: int, last: int) -> Events:
    return Events(np.full(V, before), np.full(V, last), np.arange(V))


def test_events_keep_to_the_document_and_the_mask():
    batch = make_batch(0)
    found = events(batch, V)
    assert list(zip(found.before, found.last, found.target, strict=True)) == triples(batch)
    assert (found.before == V).any()
    both = events([batch, make_batch(1)], V)
    assert len(both) == len(found) + len(triples(make_batch(1)))


def test_discounts_of_chen_and_goodman():
    # n1 = 8, n2 = 4, n3 = 2, n4 = 1: Y = 1/2; D = 1 - 1/2, 2 - 3/4, 3 - 1
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 5])
    assert np.allclose(discounts(counts), [0.0, 0.5, 1.25, 2.0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_against_the_dictionaries(seed):
    train, valid = triples(make_batch(seed, rows=10)), triples(make_batch(seed + 50))
    at = as_events(valid)

    counts = Counter(y for _, _, y in train)
    slow = [(counts[y] + 0.3) / (len(train) + 0.3 * V) for _, _, y in valid]
    unigram = Unigram(as_events(train), V, 0.3)
    np.testing.assert_allclose(unigram.prob(at), slow, rtol=1e-13)

    pairs, firsts = Counter((v, y) for _, v, y in train), Counter(v for _, v, _ in train)
    slow = [
        (pairs[v, y] + 2.5 * p) / (firsts[v] + 2.5)
        for (_, v, y), p in zip(valid, slow, strict=True)
    ]
    np.testing.assert_allclose(Bigram(as_events(train), V, unigram, 2.5).prob(at), slow, rtol=1e-13)

    oracle = SlowKneserNey(train)
    fast = KneserNey(as_events(train), V).prob(at)
    np.testing.assert_allclose(fast, [oracle.prob(*event) for event in valid], rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 10])
def test_probabilities_sum_to_one_after_any_context(rows):
    train = events(make_batch(3, rows=rows), V)
    unigram = Unigram(train, V, 0.5)
    models = (unigram, Bigram(train, V, unigram, 3.0), KneserNey(train, V))
    for before in range(V + 1):
        for last in range(V):
            for model in models:
                p = model.prob(every_target(before, last))
                assert (p > 0).all()
                assert p.sum() == pytest.approx(1.0, abs=1e-12)


def test_fit_and_score():
    train, valid = [make_batch(seed, 30) for seed in (0, 1)], make_batch(2, 20)
    scores = fit_and_score(train, valid, V)
    assert list(scores) == ["unigram", "bigram", "kneser_ney_3gram"]
    assert scores["bigram"].mean() < scores["unigram"].mean() < math.log(V)
    oracle = SlowKneserNey([event for batch in train for event in triples(batch)])
    slow = [-math.log(oracle.prob(*event)) for event in triples(valid)]
    np.testing.assert_allclose(scores["kneser_ney_3gram"], slow, rtol=1e-12)


def test_pseudo_counts_are_chosen_on_training_targets_alone():
    train = events(make_batch(0, 40), V)
    a, b = choose_pseudo_counts(train, V)
    split = int(len(train) * 0.9)
    inner, check = train[:split], train[split:]

    def nats(model) -> float:
        return -np.log(model.prob(check)).mean()

    best_a = min(nats(Unigram(inner, V, c)) for c in count_models.PSEUDO_COUNTS)
    assert nats(Unigram(inner, V, a)) == best_a
    unigram = Unigram(inner, V, a)
    best_b = min(nats(Bigram(inner, V, unigram, c)) for c in count_models.PSEUDO_COUNTS)
    assert nats(Bigram(inner, V, unigram, b)) == best_b


def test_nothing_to_fit_or_score_is_refused():
    batch = make_batch(0)
    empty = {**batch, "loss_mask": batch["loss_mask"] * 0}
    for train, valid in ((empty, batch), (batch, empty), ([], batch)):
        with pytest.raises(UserError, match="count models"):
            fit_and_score(train, valid, V)
    one = {key: array[:1, :1] for key, array in batch.items()}
    assert np.isfinite(fit_and_score(one, batch, V)["kneser_ney_3gram"]).all()
