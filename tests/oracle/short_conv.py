"""The short convolution in NumPy float64, forward and backward by hand, one token at a time.

Equation 5 of the paper with its residual: out = u + SiLU(y), y the causal convolution of n =
RMSNorm(u) * gain. With r = 1 / sqrt(mean(u^2) + eps), x = u r:

    d y / d n[t - back] = taps,  SiLU'(y) = s (1 + y (1 - s)),  s = sigmoid(y)
    d u = r (d x - x mean(d x x)) for d x = gain d n
"""

import numpy as np

from tests.oracle.engram import sigmoid
from tests.oracle.engram_gate import reciprocal_rms


def reached(t, taps, dilation, segments):
    """(tap, position it reads) for the open taps of position t; segments [T] or None."""
    for j in range(len(taps)):
        s = t - (len(taps) - 1 - j) * dilation
        if s >= 0 and (segments is None or segments[s] == segments[t]):
            yield j, s


def normalised(u, gain, eps):
    """u [T, M, d] -> [T, M, d]."""
    out = np.zeros(u.shape)
    for t in range(len(u)):
        for m in range(u.shape[1]):
            out[t, m] = u[t, m] * reciprocal_rms(u[t, m], eps) * gain[m]
    return out


def convolved(n, taps, dilation, segments):
    """y [T, M, d] before SiLU."""
    y = np.zeros(n.shape)
    for t in range(len(n)):
        for j, s in reached(t, taps, dilation, segments):
            y[t] += taps[j] * n[s]
    return y


def forward(u, gain, taps, segments, mask, dilation, eps):
    """One sequence: u [T, M, d], gain [M, d], taps [K, M, d], segments and mask [T] or None."""
    y = convolved(normalised(u, gain, eps), taps, dilation, segments)
    out = u + y * sigmoid(y)
    if mask is not None:
        out[~mask] = 0
    return out


def backward(u, gain, taps, segments, mask, dilation, eps, g):
    """Gradients of sum(g * out): (u [T, M, d], gain [M, d], taps [K, M, d])."""
    n = normalised(u, gain, eps)
    y = convolved(n, taps, dilation, segments)
    g = g if mask is None else np.where(mask[:, None, None], g, 0)
    s = sigmoid(y)
    d_y = g * s * (1 + y * (1 - s))
    d_n, d_taps, d_gain = np.zeros(u.shape), np.zeros(taps.shape), np.zeros(gain.shape)
    for t in range(len(u)):
        for j, position in reached(t, taps, dilation, segments):
            d_n[position] += taps[j] * d_y[t]
            d_taps[j] += n[position] * d_y[t]
    d_u = np.array(g)
    for t in range(len(u)):
        for m in range(u.shape[1]):
            r = reciprocal_rms(u[t, m], eps)
            x, d_x = u[t, m] * r, gain[m] * d_n[t, m]
            d_gain[m] += d_n[t, m] * x
            d_u[t, m] += r * (d_x - x * np.mean(d_x * x))
    return d_u, d_gain, d_taps


def continued(u, tail, valid, gain, taps, mask, dilation, eps):
    """Tokens after a tail [L, M, d] of normalised ones: (out [S, M, d], the new tail [L, M, d])."""
    every = np.concatenate([tail, normalised(u, gain, eps)])
    y = convolved(every, taps, dilation, None)[len(tail) :]
    out = u + y * sigmoid(y)
    if mask is not None:
        out[~mask] = 0
    return out, every[valid : valid + len(tail)]
