"""N-gram baselines (count models) for a model's loss: unigram, bigram, Kneser-Ney trigram.

All are proper distributions over the vocabulary, fitted on the same targets that the model trains
on and scored on the same targets that it is evaluated on. A context does not cross the start of the
document or the sequence, as in the model. N-grams are packed into int64 keys and counted by
sorting.

Kneser-Ney is the interpolated, modified form of Chen & Goodman, "An Empirical Study of Smoothing
Techniques for Language Modeling" (1998), section 3, on top of the uniform distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from engram_jax.config.errors import UserError

Arrays = Mapping[str, np.ndarray]

# Pseudo-counts that the unigram and bigram models choose from, on the last tenth of the training
# targets (at most _MAX_CHECKED of them).
PSEUDO_COUNTS = tuple(float(x) for x in np.logspace(-2, 4, 19))
_HELD_OUT = 0.1
_MAX_CHECKED = 100_000


@dataclass(frozen=True)
class Events:
    """Targets and their contexts: int64 [n] each. `before` is the token before `last`, or V where
    the document or the sequence starts with `last`."""

    before: np.ndarray
    last: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, part: slice) -> Events:
        return Events(self.before[part], self.last[part], self.target[part])


def events(batches: Arrays | Iterable[Arrays], vocab_size: int) -> Events:
    """The targets with loss_mask 1 and their contexts.

    batches: one batch, or any number: tokens, targets, loss_mask, segments, each [B, T].
    """
    parts = []
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segments"])
        before = np.full(tokens.shape, vocab_size, np.int64)
        same = segments[:, 1:] == segments[:, :-1]
        before[:, 1:] = np.where(same, tokens[:, :-1], vocab_size)
        counts = np.asarray(batch["loss_mask"]) > 0
        parts.append((before[counts], tokens[counts], np.asarray(batch["targets"])[counts]))
    columns = zip(*parts, strict=True) if parts else ([], [], [])
    return Events(*(np.concatenate([*column, []]).astype(np.int64) for column in columns))


class Unigram:
    """p(y) = (c(y) + a) / (n + a V)."""

    def __init__(self, train: Events, vocab_size: int, pseudo_count: float) -> None:
        counts = np.bincount(train.target, minlength=vocab_size) + pseudo_count
        self._probabilities = counts / counts.sum()

    def prob(self, at: Events) -> np.ndarray:
        """float64 [n]: p(target)."""
        return self._probabilities[at.target]


class Bigram:
    """p(y | x) = (c(x, y) + b p(y)) / (c(x) + b), over a unigram model; b = `pseudo_count`."""

    def __init__(
        self, train: Events, vocab_size: int, unigram: Unigram, pseudo_count: float
    ) -> None:
        self.pseudo_count = pseudo_count
        self._vocab_size = vocab_size
        self._unigram = unigram
        self._totals = np.bincount(train.last, minlength=vocab_size)
        self._keys, self._counts = np.unique(self._key(train), return_counts=True)

    def prob(self, at: Events) -> np.ndarray:
        """float64 [n]: p(target | last)."""
        count = _look_up(self._keys, self._counts, self._key(at))
        prior = self.pseudo_count * self._unigram.prob(at)
        return (count + prior) / (self._totals[at.last] + self.pseudo_count)

    def _key(self, at: Events) -> np.ndarray:
        return at.last * self._vocab_size + at.target


class KneserNey:
    """Interpolated modified Kneser-Ney trigram.

    Order 3 uses counts; in lower orders an n-gram's count is the number of different tokens that
    have preceded it.
    """

    def __init__(self, train: Events, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._base = base = vocab_size + 1  # one more symbol: the start of a document or sequence
        trigrams, counts = np.unique(self._key(train), return_counts=True)
        bigrams, after = np.unique(trigrams % base**2, return_counts=True)
        unigrams, after_any = np.unique(bigrams % base, return_counts=True)
        self._orders = (
            _Order(unigrams, unigrams * 0, after_any),
            _Order(bigrams, bigrams // base, after),
            _Order(trigrams, trigrams // base, counts),
        )

    def prob(self, at: Events) -> np.ndarray:
        """float64 [n]: p(target | before, last)."""
        base, key = self._base, self._key(at)
        unigram, bigram, trigram = self._orders
        p = np.full(len(at), 1.0 / self._vocab_size)
        p = unigram.prob(at.target, at.target * 0, p)
        p = bigram.prob(key % base**2, at.last, p)
        return trigram.prob(key, key // base, p)

    def _key(self, at: Events) -> np.ndarray:
        return (at.before * self._base + at.last) * self._base + at.target


class _Order:
    """One order: p(y | c) = (count - D(count)) / total(c) + weight(c) * p_lower(y)."""

    def __init__(self, keys: np.ndarray, contexts: np.ndarray, counts: np.ndarray) -> None:
        discount = discounts(counts)[np.minimum(counts, 3)]
        self._keys = keys  # ascending; so are the contexts, their leading digits
        self._kept = counts - discount
        self._contexts, first = np.unique(contexts, return_index=True)
        self._totals = np.add.reduceat(counts, first)
        self._weights = np.add.reduceat(discount, first) / self._totals

    def prob(self, keys: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        kept = _look_up(self._keys, self._kept, keys)
        total = _look_up(self._contexts, self._totals, contexts)
        weight = _look_up(self._contexts, self._weights, contexts)
        return np.where(total > 0, kept / np.maximum(total, 1) + weight * lower, lower)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3 and more) from the counts of counts n1..n4 (Chen & Goodman, eq.
    17).

    Where a count of counts is zero (tiny data), or a discount is outside (0, k], the single
    discount n1 / (n1 + 2 n2), or 1/2, is used instead.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    single = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    result = [0.0]
    for k in (1, 2, 3):
        value = k - (k + 1) * single * n[k + 1] / n[k] if n[k] else single
        result.append(value if 0 < value <= k else single)
    return np.asarray(result)


def fit_and_score(
    train: Arrays | Iterable[Arrays], valid: Arrays | Iterable[Arrays], vocab_size: int
) -> dict[str, np.ndarray]:
    """Nats of every target of `valid`, float64 [n] in order, for each model fitted on `train`.

    Both are batches as the data pipeline makes them (one, or any number). The keys of the result
    are "unigram", "bigram" and "kneser_ney_3gram". Raises UserError when either side has no target.
    """
    fit_on, score_on = events(train, vocab_size), events(valid, vocab_size)
    if not len(fit_on) or not len(score_on):
        raise UserError(
            f"count models: {len(fit_on):,} training targets and {len(score_on):,} held-out ones; "
            "both need some"
        )
    a, b = choose_pseudo_counts(fit_on, vocab_size)
    unigram = Unigram(fit_on, vocab_size, a)
    return {
        "unigram": _nats(unigram, score_on),
        "bigram": _nats(Bigram(fit_on, vocab_size, unigram, b), score_on),
        "kneser_ney_3gram": _nats(KneserNey(fit_on, vocab_size), score_on),
    }


def choose_pseudo_counts(train: Events, vocab_size: int) -> tuple[float, float]:
    """(unigram's, bigram's) pseudo-count: the best on the end of `train`, fitted on the rest."""
    split = min(int(len(train) * (1 - _HELD_OUT)), len(train) - 1)
    inner, check = train[:split], train[split : split + _MAX_CHECKED]
    a = min(PSEUDO_COUNTS, key=lambda c: _nats(Unigram(inner, vocab_size, c), check).mean())
    bigram = Bigram(inner, vocab_size, Unigram(inner, vocab_size, a), 1.0)

    def nats(pseudo_count: float) -> float:
        bigram.pseudo_count = pseudo_count
        return float(_nats(bigram, check).mean())

    return a, min(PSEUDO_COUNTS, key=nats)


def _nats(model: Unigram | Bigram | KneserNey, at: Events) -> np.ndarray:
    return -np.log(model.prob(at))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == wanted (keys ascending), else 0."""
    if not len(keys):
        return np.zeros(len(wanted))
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
