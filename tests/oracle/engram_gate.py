"""The gate of Engram in NumPy float64, both passes by hand, one token and branch at a time.

Equations 3, 4 and 6 of the paper. Backward, with r(x) = 1 / sqrt(mean(x^2) + eps):

    s = r(h) r(key) <h, gain key> / sqrt(d)
    d s / d key = r(h) r(key) gain h / sqrt(d) - s r(key)^2 key / d, and the same for h
"""

import numpy as np

SMALLEST_SCORE = 1e-6


def reciprocal_rms(x, eps):
    return 1 / np.sqrt(np.mean(x * x) + eps)


def gate_of(score):
    """(gate, its derivative); the derivative is 0 where the magnitude is held at 1e-6."""
    held = abs(score) <= SMALLEST_SCORE
    root = np.sign(score) * np.sqrt(SMALLEST_SCORE if held else abs(score))
    gate = 1 / (1 + np.exp(-root))
    return gate, 0.0 if held else gate * (1 - gate) * 0.5 / np.sqrt(abs(score))


def forward(rows, weights, streams, gain, bias, mask, eps):
    """rows [T, C], weights [C, M + 1, d], streams [T, M, d] -> (out [T, M, d], gates [T, M])."""
    tokens, branches, width = streams.shape
    out, gates = np.zeros(streams.shape), np.zeros((tokens, branches))
    for t in range(tokens):
        value = rows[t] @ weights[:, branches] + bias[branches]
        for m in range(branches):
            if mask[t]:
                key, h = rows[t] @ weights[:, m] + bias[m], streams[t, m]
                query = h * reciprocal_rms(h, eps) * gain[m]
                score = query @ (key * reciprocal_rms(key, eps)) / np.sqrt(width)
                gates[t, m] = gate_of(score)[0]
                out[t, m] = gates[t, m] * value
    return out, gates


def backward(rows, weights, streams, gain, bias, mask, eps, g_out, g_gates):
    """Gradients of sum(g_out * out) + sum(g_gates * gates): rows, weights, streams, gain, bias."""
    tokens, branches, width = streams.shape
    d_rows, d_weights, d_streams = (np.zeros(x.shape) for x in (rows, weights, streams))
    d_gain, d_bias = np.zeros(gain.shape), np.zeros(bias.shape)
    for t in range(tokens):
        if not mask[t]:
            continue
        value = rows[t] @ weights[:, branches] + bias[branches]
        d_value = np.zeros(width)
        for m in range(branches):
            key, h = rows[t] @ weights[:, m] + bias[m], streams[t, m]
            r_key, r_h = reciprocal_rms(key, eps), reciprocal_rms(h, eps)
            both = r_h * r_key / np.sqrt(width)
            score = both * np.sum(h * gain[m] * key)
            gate, slope = gate_of(score)
            d_value += gate * g_out[t, m]
            d_score = (g_out[t, m] @ value + g_gates[t, m]) * slope
            d_key = d_score * (both * gain[m] * h - score * r_key**2 * key / width)
            d_streams[t, m] = d_score * (both * gain[m] * key - score * r_h**2 * h / width)
            d_gain[m] += d_score * both * h * key
            d_bias[m] += d_key
            d_rows[t] += weights[:, m] @ d_key
            d_weights[:, m] += np.outer(rows[t], d_key)
        d_bias[branches] += d_value
        d_rows[t] += weights[:, branches] @ d_value
        d_weights[:, branches] += np.outer(rows[t], d_value)
    return d_rows, d_weights, d_streams, d_gain, d_bias
