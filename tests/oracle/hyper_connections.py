"""mHC in NumPy, one token at a time: the paper's equations with eps where DeepSeek-V4 adds it."""

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def sinkhorn(logits, iterations, eps):
    """exp(logits) made doubly stochastic; the second axis ends up summing to one exactly."""
    m = np.exp(logits - logits.max())
    for i in range(iterations):
        columns = m.sum(axis=0, keepdims=True)
        m = m / columns + eps if i == 0 else m / (columns + eps)
        m = m / (m.sum(axis=1, keepdims=True) + eps)
    return m


def coefficients(streams, fn, base, scale, gain, *, iterations, eps, transpose):
    """streams [n, d] of one token -> (pre [n], post [n], mixing [target n, source n]).

    fn [n * d, n + n + n * n], base [n + n + n * n], scale (pre, post, res), gain [n * d] or 1.
    """
    n = len(streams)
    v = streams.reshape(-1)
    v = v / np.sqrt((v**2).mean() + eps) * gain
    h_pre, h_post, h_res = np.split(v @ fn, [n, 2 * n])
    b_pre, b_post, b_res = np.split(base, [n, 2 * n])
    pre = sigmoid(scale[0] * h_pre + b_pre) + eps
    post = 2 * sigmoid(scale[1] * h_post + b_post)
    logits = (scale[2] * h_res + b_res).reshape(n, n)
    return pre, post, sinkhorn(logits.T if transpose else logits, iterations, eps)
