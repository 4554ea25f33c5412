"""Intervals, the paired bootstrap and the fitted line against SciPy and against brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from engram_jax.lab.statistics import (
    Documents,
    fit_line,
    paired_bootstrap,
    read_documents,
    t_interval,
)
from tests.lab.experiments import write_documents


def documents(nats, targets) -> Documents:
    nats, targets = np.asarray(nats, np.float64), np.asarray(targets, np.int64)
    none = np.zeros((len(nats), 0))
    return Documents(np.arange(len(nats)), nats, targets, np.zeros(0, int), none, none)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_t_interval_is_scipys(count):
    values = np.random.default_rng(count).normal(0.3, 2, count)
    found = t_interval(list(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.mean, found.count) == (pytest.approx(values.mean(), rel=1e-12), count)


def test_one_seed_has_no_interval():
    found = t_interval([0.25])
    assert found.mean == 0.25 and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(t_interval([]).mean)


def test_bootstrap_of_four_documents_equals_all_resamples():
    """4^4 resamples are equally likely; 10,000 draws find their 2.5 % and 97.5 % quantiles."""
    targets = [10, 20, 30, 5]
    base, variant = documents([21, 44, 60, 12], targets), documents([20, 45, 57, 11], targets)
    every = sorted(
        sum(variant.nats[i] - base.nats[i] for i in drawn) / sum(targets[i] for i in drawn)
        for drawn in itertools.product(range(4), repeat=4)
    )
    found = paired_bootstrap([base], [variant])
    assert found.mean == pytest.approx((133 - 137) / 65, rel=1e-12)
    # The quantiles of so few values are steps; 10,000 draws lie within half a percent of the rank.
    assert every[round(256 * 0.02)] <= found.low <= every[round(256 * 0.03)]
    assert every[round(256 * 0.97)] <= found.high <= every[round(256 * 0.98)]


def test_bootstrap_is_scipys():
    rng = np.random.default_rng(5)
    targets = rng.integers(50, 400, 60)
    base = documents(rng.normal(3, 0.5, 60) * targets, targets)
    variant = documents(base.nats - rng.normal(0.05, 0.1, 60) * targets, targets)
    found = paired_bootstrap([base], [variant])

    def difference(nats, base_nats, targets, axis=-1):
        return (nats - base_nats).sum(axis=axis) / targets.sum(axis=axis)

    expected = stats.bootstrap(
        (variant.nats, base.nats, targets.astype(float)), difference, paired=True, vectorized=True,
        n_resamples=10_000, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    interval, error = expected.confidence_interval, expected.standard_error
    # Quantiles of 10,000 draws vary by about 0.03 standard errors from one seed to another.
    assert found.low == pytest.approx(interval.low, abs=0.12 * error)
    assert found.high == pytest.approx(interval.high, abs=0.12 * error)
    again = paired_bootstrap([base], [variant])
    assert found == again != paired_bootstrap([base], [variant], seed=1)


def test_bootstrap_takes_the_mean_over_seeds():
    rng, targets = np.random.default_rng(0), np.full(7, 10)
    runs = [documents(rng.normal(30, 3, 7), targets) for _ in range(4)]
    means = [documents((runs[i].nats + runs[i + 1].nats) / 2, targets) for i in (0, 2)]
    found = paired_bootstrap(runs[:2], runs[2:], resamples=500)
    expected = paired_bootstrap(means[:1], means[1:], resamples=500)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-12)


def test_other_documents_are_not_paired():
    one = documents([1, 2], [10, 20])
    with pytest.raises(ValueError, match="different documents"):
        paired_bootstrap([one], [documents([1, 2], [10, 21])])
    with pytest.raises(ValueError, match="different documents"):
        paired_bootstrap([one], [documents([1, 2, 3], [10, 20, 3])])


def test_the_file_of_a_run_is_read_by_document(tmp_path):
    assert read_documents(tmp_path) is None
    nats, targets = np.array([8.0, 16.0, 24.0]), np.array([4, 8, 12])
    write_documents(tmp_path, nats, targets)
    found = read_documents(tmp_path)
    assert found is not None
    assert found.document.tolist() == [0, 1, 2]
    assert (found.nats.tolist(), found.targets.tolist()) == (nats.tolist(), targets.tolist())
    # 48 nats on 24 targets. Order 2: 12 of them, a nat each; order 3: 6 of those; order 4: none.
    assert found.loss() == 2.0
    assert found.losses_by_seen() == {2: (1.0, 3.0), 3: (1.0, (48 - 6) / 18), 4: (None, 2.0)}


def test_a_run_that_searched_nothing_has_no_losses_by_context(tmp_path):
    write_documents(tmp_path, np.array([8.0]), np.array([4]), orders=())
    found = read_documents(tmp_path)
    assert found is not None and (found.loss(), found.losses_by_seen()) == (2.0, {})


def test_the_line_is_scipys():
    rng = np.random.default_rng(2)
    x = np.log10([64, 256, 1024, 4096, 16384])
    y = 3 - 0.1 * x + rng.normal(0, 0.02, 5)
    found, expected = fit_line(list(x), list(y)), stats.linregress(x, y)
    assert found.slope == pytest.approx(expected.slope, rel=1e-10)
    assert found.intercept == pytest.approx(expected.intercept, rel=1e-10)
    assert found.r2 == pytest.approx(expected.rvalue**2, rel=1e-10)
