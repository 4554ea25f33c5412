"""CKA against its definition, and against what is known of representations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engram_jax.analysis.cka import MinibatchCKA, hsic, soft_alignment


def brute_force(k, m):
    """Unbiased HSIC as a U-statistic: sums over different indices, one by one (Gretton's h)."""
    n = len(k)
    two = sum(k[i, j] * m[i, j] for i, j in itertools.permutations(range(n), 2))
    three = sum(k[i, j] * m[i, q] for i, j, q in itertools.permutations(range(n), 3))
    four = sum(k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(range(n), 4))
    p2 = n * (n - 1)
    p3, p4 = p2 * (n - 2), p2 * (n - 2) * (n - 3)
    return two / p2 + four / p4 - 2 * three / p3


def test_hsic_is_the_u_statistic():
    rng = np.random.default_rng(0)
    k, m = rng.normal(size=(2, 7, 7)), rng.normal(size=(3, 7, 7))
    k, m = k + k.swapaxes(1, 2), m + m.swapaxes(1, 2)
    for kernels in (k, m):
        kernels[:, np.arange(7), np.arange(7)] = 0
    wanted = [[brute_force(a, b) for b in m] for a in k]
    np.testing.assert_allclose(hsic(k, m), wanted, rtol=1e-12, atol=1e-12)


def cka(x, y, batch):
    found = MinibatchCKA()
    for i in range(0, x.shape[1], batch):
        found.add(x[:, i : i + batch], y[:, i : i + batch])
    return found.similarity()


@pytest.mark.parametrize("batch", [8, 64])
def test_of_itself_and_of_its_rotation(batch):
    """1 also far from the origin, in another scale, and of a rotation."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 192, 24))
    rotation = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    for y in (x, x @ rotation, 1e-3 * x @ rotation, x @ rotation + 100):
        np.testing.assert_allclose(cka(x, y, batch), 1, atol=1e-6)


def test_of_independent_gaussians():
    """0 within 3 standard errors of the mean over 200 draws, and not below the biased 0.3."""
    rng = np.random.default_rng(2)
    found = np.array([cka(*rng.normal(size=(2, 1, 96, 24)), batch=32)[0, 0] for _ in range(200)])
    assert abs(found.mean()) < 3 * found.std(ddof=1) / np.sqrt(200)
    assert found.std() < 0.1


def test_batches_and_pairs_of_layers():
    """Every pair is what it is alone; the number of batches changes the estimate little."""
    rng = np.random.default_rng(3)
    common = rng.normal(size=(512, 6))
    x = np.stack([common @ rng.normal(size=(6, 16)) + rng.normal(size=(512, 16)) for _ in range(3)])
    y = np.stack([common @ rng.normal(size=(6, 9)) for _ in range(2)])
    whole = cka(x, y, 64)
    for i, j in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(whole[i, j], cka(x[i : i + 1], y[j : j + 1], 64)[0, 0])
    np.testing.assert_allclose(whole, cka(x, y, 512), atol=0.03)
    assert ((whole > 0.2) & (whole < 0.99)).all()


def test_what_does_not_vary_and_too_few():
    x = np.ones((1, 8, 3))
    assert np.isnan(cka(x, np.random.default_rng(0).normal(size=(1, 8, 3)), 8)).all()
    with pytest.raises(ValueError, match="at least 4"):
        MinibatchCKA().add(x[:, :3], x[:, :3])


def test_soft_alignment_by_hand():
    similarity = np.array([[0.1, 0.0], [0.8, -0.2], [0.4, -0.1], [0.2, 0.5]])
    best = (0.8 * 1 + 0.4 * 2) / 1.2
    np.testing.assert_allclose(soft_alignment(similarity, top=2), [best, 3.0])
    all_ = (0.1 * 0 + 0.8 * 1 + 0.4 * 2 + 0.2 * 3) / 1.5
    np.testing.assert_allclose(soft_alignment(similarity)[0], all_)
