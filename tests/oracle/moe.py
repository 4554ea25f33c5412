"""SwiGLU and DeepSeekMoE in NumPy, one token and one expert at a time."""

import numpy as np


def swiglu(x, gate, up, down):
    """(SiLU(x W_gate) * (x W_up)) W_down."""
    a = x @ gate
    return (a / (1.0 + np.exp(-a)) * (x @ up)) @ down


def moe(x, router, bias, experts, *, top_k, normalise, scaling, shared=None):
    """x [T, d] -> (y [T, d], the experts each token chose [T, k]).

    experts: gate and up [E, d, f], down [E, f, d]; shared: the same of one SwiGLU, or None.
    """
    gate, up, down = experts
    out, chosen = np.zeros_like(x), []
    for t, token in enumerate(x):
        scores = 1.0 / (1.0 + np.exp(-(token @ router)))
        selected = np.argsort(-(scores + bias), kind="stable")[:top_k]
        weights = scores[selected]
        if normalise:
            weights = weights / (weights.sum() + 1e-20)
        for e, weight in zip(selected, weights * scaling, strict=True):
            out[t] += weight * swiglu(token, gate[e], up[e], down[e])
        if shared is not None:
            out[t] += swiglu(token, *shared)
        chosen.append(selected)
    return out, np.array(chosen)
