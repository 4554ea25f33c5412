"""The Engram module's variants in NumPy float64, one document, one token and branch at a time.

Gradients are central differences of these functions (`gradients`): independent of any rule of
differentiation, and exact to about 1e-9 of the largest entry in float64.
"""

import numpy as np

from tests.oracle.engram import rms_norm, sigmoid


def engram(rows, streams, params, mask, *, gate, multi_branch, dilation, gate_eps, conv_eps):
    """rows [T, d_mem], streams [T, M, d], mask [T] -> (what the streams gain [T, M, d], gates
    [T, branches], all 1 where there is no gate)."""
    length, count, width = streams.shape
    branches = count if multi_branch else 1
    weights = params["projection"]  # [d_mem, keys + 1, d], the value last
    bias = params.get("bias", np.zeros(weights.shape[1:]))
    u, gates = np.zeros((length, branches, width)), np.zeros((length, branches))
    for t in range(length):
        if not mask[t]:
            continue
        value = rows[t] @ weights[:, -1] + bias[-1]
        for m in range(branches):
            if gate == "one":
                gates[t, m] = 1.0
            elif gate == "learned":
                gates[t, m] = sigmoid(params["gate_logit"][m])
            else:
                query = streams[t, m] if multi_branch else sum(streams[t]) / count
                key = rows[t] @ weights[:, m] + bias[m]
                s = rms_norm(query, params["query_norm"]["gain"][m], gate_eps) @ rms_norm(
                    key, params["key_norm"]["gain"][m], gate_eps
                )
                s /= np.sqrt(width)
                gates[t, m] = sigmoid(np.sign(s) * np.sqrt(max(abs(s), 1e-6)))
            u[t, m] = gates[t, m] * value
    out = u.copy()
    if "conv" in params:
        taps, gain = params["conv"]["taps"], params["conv"]["norm"]["gain"]
        for t in range(length):
            for m in range(branches):
                convolved = np.zeros(width)
                for j in range(len(taps)):
                    back = (len(taps) - 1 - j) * dilation
                    if t >= back:
                        convolved += taps[j, m] * rms_norm(u[t - back, m], gain[m], conv_eps)
                out[t, m] += convolved * sigmoid(convolved)
    out[~mask] = 0.0
    return (out if multi_branch else np.repeat(out, count, axis=1)), gates


def over_encoding(rows, streams, weights, mask):
    """rows [T, d_mem], streams [T, M, d] all equal to x, weights [orders, d_mem / orders, d] ->
    mean(x, W_2 e_2, ...) - x for every stream [T, M, d]."""
    out = np.zeros(streams.shape)
    for t in range(len(rows)):
        if not mask[t]:
            continue
        for m, x in enumerate(streams[t]):
            parts = np.split(rows[t], len(weights))
            embeddings = [x] + [e @ w for e, w in zip(parts, weights, strict=True)]
            out[t, m] = np.mean(embeddings, axis=0) - x
    return out


def gradients(function, values, cotangent, step=1e-6):
    """d sum(cotangent * function(values)) / d values, by central differences; values: a list of
    float64 arrays."""
    found = []
    for i, x in enumerate(values):
        g = np.zeros(x.shape)
        for at in np.ndindex(x.shape):

            def moved(by, i=i, at=at, x=x):
                changed = x.copy()
                changed[at] += by
                return np.sum(cotangent * function([*values[:i], changed, *values[i + 1 :]]))

            g[at] = (moved(step) - moved(-step)) / (2 * step)
        found.append(g)
    return found
