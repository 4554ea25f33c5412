"""Paired intervals and a fitted line: what differences between runs mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_jax.checkpoint.workdir import HELD_OUT_DOCUMENTS

RESAMPLES = 10_000
_CHUNK = 1 << 24  # numbers drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; low and high are NaN where there are too few values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x by least squares. r2: the share of y's variance it explains."""

    intercept: float
    slope: float
    r2: float


@dataclass(frozen=True)
class Documents:
    """Held-out nats of one run by document; arrays [n], and [n, K] of K lengths of n-grams.

    document: int, ascending. nats: float64, the sum over the document's targets. targets: their
    number. orders: [K], lengths of the n-grams of context. seen_nats, seen_targets: [n, K], those
    of targets whose n-gram of that length was seen in training.
    """

    document: np.ndarray
    nats: np.ndarray
    targets: np.ndarray
    orders: np.ndarray
    seen_nats: np.ndarray
    seen_targets: np.ndarray

    def loss(self) -> float:
        return float(self.nats.sum() / self.targets.sum())

    def losses_by_seen(self) -> dict[int, tuple[float | None, float | None]]:
        """By order: nats per target whose n-gram was seen in training, and of the others; None of
        no target."""
        found = {}
        for k, order in enumerate(self.orders.tolist()):
            nats, targets = self.seen_nats[:, k].sum(), self.seen_targets[:, k].sum()
            unseen = _ratio(self.nats.sum() - nats, self.targets.sum() - targets)
            found[order] = _ratio(nats, targets), unseen
        return found


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of `values` and its 95 % interval by Student's t distribution."""
    from scipy import stats

    found = np.asarray(values, np.float64)
    mean = float(found.mean()) if len(found) else float("nan")
    if len(found) < 2:
        return Interval(mean, float("nan"), float("nan"), len(found))
    half = float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(mean, mean - half, mean + half, len(found))


def read_documents(workdir: Path) -> Documents | None:
    """What a run's end wrote about its held-out documents; None if it wrote nothing."""
    path = workdir / HELD_OUT_DOCUMENTS
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        order = np.argsort(archive["document"], kind="stable")
        found = {name: archive[name] for name in archive.files if name != "step"}
        orders = found.pop("orders")
        return Documents(orders=orders, **{name: array[order] for name, array in found.items()})


def paired_bootstrap(
    base: Sequence[Documents],
    variant: Sequence[Documents],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The difference of held-out losses, variant - base, and its 95 % percentile interval over
    resamples of the documents (with replacement, the same ones on both sides).

    base, variant: the runs of the same seeds, whose nats are summed by document.
    Raises ValueError where the runs have other documents or targets.
    """
    first = base[0]
    for run in (*base, *variant):
        same = np.array_equal(run.document, first.document)
        if not same or not np.array_equal(run.targets, first.targets):
            raise ValueError("the runs were evaluated on different documents")
    difference = np.mean([run.nats for run in variant], axis=0)
    difference = difference - np.mean([run.nats for run in base], axis=0)
    count, targets = len(first.document), first.targets.astype(np.float64)
    rng, found = np.random.default_rng(seed), []
    chunk = max(1, _CHUNK // count)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, count, (min(chunk, resamples - start), count))
        found.append(difference[drawn].sum(axis=1) / targets[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    mean = float(difference.sum() / targets.sum())
    return Interval(mean, float(low), float(high), count)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares; x has two different values at least."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    slope, intercept = np.polyfit(xs, ys, 1)
    left = ((ys - intercept - slope * xs) ** 2).sum()
    spread = ((ys - ys.mean()) ** 2).sum()
    return Line(float(intercept), float(slope), float(1 - left / spread) if spread else 1.0)


def _ratio(nats: float, targets: float) -> float | None:
    return float(nats / targets) if targets else None
