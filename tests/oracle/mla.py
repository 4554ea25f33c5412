"""Multi-head latent attention in NumPy, one token and one head at a time."""

import numpy as np


def rotate(x, position, theta, slower=None):
    """Each pair (x[2i], x[2i + 1]) turned by position * theta^(-2i / len(x)), in its place.
    slower: the angles are divided by slower[i]."""
    out = np.empty_like(x)
    for i in range(0, len(x), 2):
        angle = position * theta ** (-i / len(x)) / (1 if slower is None else slower[i // 2])
        cos, sin = np.cos(angle), np.sin(angle)
        out[i] = x[i] * cos - x[i + 1] * sin
        out[i + 1] = x[i] * sin + x[i + 1] * cos
    return out


def attention(
    x,
    positions,
    segments,
    weights,
    *,
    heads,
    nope,
    rope,
    value,
    theta,
    eps,
    slower=None,
    factor=1.0,
):
    """x [T, d] of one sequence -> [T, d]. slower: see `rotate`. factor: of the scores.

    weights: q_proj [d, heads * (nope + rope)], kv_a_proj [d, rank + rope], kv_norm [rank],
      kv_b_proj [rank, heads * (nope + value)], o_proj [heads * value, d].
    """
    tokens = len(x)
    rank = len(weights["kv_norm"])
    query = (x @ weights["q_proj"]).reshape(tokens, heads, nope + rope)
    down = x @ weights["kv_a_proj"]
    latent, key_rope = down[:, :rank], down[:, rank:]
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + eps) * weights["kv_norm"]
    key_value = (latent @ weights["kv_b_proj"]).reshape(tokens, heads, nope + value)

    merged = np.zeros((tokens, heads, value))
    for t in range(tokens):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        for h in range(heads):
            q_rope = rotate(query[t, h, nope:], positions[t], theta, slower)
            scores = np.array(
                [
                    query[t, h, :nope] @ key_value[s, h, :nope]
                    + q_rope @ rotate(key_rope[s], positions[s], theta, slower)
                    for s in seen
                ]
            ) * (factor / np.sqrt(nope + rope))
            p = np.exp(scores - scores.max())
            p = p / p.sum()
            for s, weight in zip(seen, p, strict=True):
                merged[t, h] += weight * key_value[s, h, nope:]
    return merged.reshape(tokens, -1) @ weights["o_proj"]
