"""Centred kernel alignment of two models' layers: which layer of one is like which of the other.

Linear kernel, the unbiased estimator of HSIC (Song et al., JMLR 2012) averaged over minibatches
(Nguyen, Raghu and Kornblith, ICLR 2021), as in the paper's section on depth. Memory does not
depend on the number of batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SMALLEST = 4  # rows of a batch: the unbiased estimator divides by n - 3


@dataclass
class MinibatchCKA:
    """Sums over batches of HSIC between the layers of two models, Lx and Ly.

    cross: float64 [Lx, Ly]. own_x: [Lx]. own_y: [Ly]. batches: how many have been added.
    """

    cross: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    own_x: np.ndarray = field(default_factory=lambda: np.zeros(0))
    own_y: np.ndarray = field(default_factory=lambda: np.zeros(0))
    batches: int = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """One batch: representations of the same n inputs, [Lx, n, d] and [Ly, n, d'].

        Raises ValueError for other numbers of inputs, or fewer than 4.
        """
        if x.shape[1] != y.shape[1] or x.shape[1] < SMALLEST:
            raise ValueError(f"{x.shape[1]} and {y.shape[1]} rows: must be equal, at least 4")
        kernels_x, kernels_y = _kernels(x), _kernels(y)
        cross = hsic(kernels_x, kernels_y)
        own_x = np.array([hsic(k[None], k[None])[0, 0] for k in kernels_x])
        own_y = np.array([hsic(k[None], k[None])[0, 0] for k in kernels_y])
        if self.batches:
            cross, own_x, own_y = cross + self.cross, own_x + self.own_x, own_y + self.own_y
        self.cross, self.own_x, self.own_y = cross, own_x, own_y
        self.batches += 1

    def similarity(self) -> np.ndarray:
        """CKA [Lx, Ly], float64: 1 of equal representations up to rotation and scale, about 0 of
        independent ones (an unbiased estimate can be below). NaN where a layer does not vary."""
        scale = np.sqrt(np.maximum(self.own_x, 0))[:, None] * np.sqrt(np.maximum(self.own_y, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(scale > 0, self.cross / scale, np.nan)


def _kernels(x: np.ndarray) -> np.ndarray:
    """[L, n, d] -> the linear kernels' off-diagonal parts, float64 [L, n, n].

    Inputs are centred first: HSIC does not change by it, and digits are not lost to a mean.
    """
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    kernels = x @ x.swapaxes(1, 2)
    index = np.arange(x.shape[1])
    kernels[:, index, index] = 0
    return kernels


def hsic(k: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Unbiased HSIC of every pair of kernels whose diagonals are zero: [A, n, n] and [B, n, n] ->
    float64 [A, B].

    (tr(K M) + 1'K1 1'M1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KM1) / (n (n - 3))
    """
    n = k.shape[1]
    trace = k.reshape(len(k), -1) @ m.reshape(len(m), -1).T
    row_k, row_m = k.sum(axis=2), m.sum(axis=2)
    whole = np.outer(row_k.sum(axis=1), row_m.sum(axis=1)) / ((n - 1) * (n - 2))
    return (trace + whole - 2 / (n - 2) * (row_k @ row_m.T)) / (n * (n - 3))


def soft_alignment(similarity: np.ndarray, top: int = 5) -> np.ndarray:
    """a_j of each layer j of the second model: the mean of the `top` most similar layers of the
    first, weighted by their similarity. [Lx, Ly] -> float64 [Ly], in layers of the first (0-based);
    negative similarities weigh nothing, NaN where all do."""
    top = min(top, len(similarity))
    best = np.argsort(similarity, axis=0)[::-1][:top]
    weights = np.maximum(np.take_along_axis(similarity, best, axis=0), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights * best).sum(axis=0) / weights.sum(axis=0)
