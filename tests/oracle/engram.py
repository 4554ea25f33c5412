"""An Engram layer in NumPy, one token at a time, written for reading; float64, int64 throughout."""

import numpy as np


def hash_rows(canonical, layer, fill_id):
    """Flat rows of every head at every position of one document: canonical [T] -> [T, H]."""
    out = []
    for t in range(len(canonical)):
        rows, head = [], 0
        for order in layer.orders:
            mixed = 0
            for back in range(order):
                token = int(canonical[t - back]) if t >= back else fill_id
                mixed ^= token * layer.multipliers[back]
            for _ in range(layer.heads_per_order):
                offset = sum(layer.head_sizes[:head])
                rows.append(offset + mixed % layer.head_sizes[head])
                head += 1
        out.append(rows)
    return np.array(out)


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x * x) + eps) * gain


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate(row, stream, params, m, *, gate_eps, gain_offset=0.0):
    """Of branch m: row [d_mem], stream [d] -> a number."""
    branches, width = params["query_norm"]["gain"].shape
    bias = params.get("bias", np.zeros((branches + 1, width)))
    key = row @ params["projection"][:, m] + bias[m]
    query_gain = params["query_norm"]["gain"][m] + gain_offset
    key_gain = params["key_norm"]["gain"][m] + gain_offset
    s = rms_norm(stream, query_gain, gate_eps) @ rms_norm(key, key_gain, gate_eps)
    s /= np.sqrt(width)
    return sigmoid(np.sign(s) * np.sqrt(max(abs(s), 1e-6)))


def engram(rows, streams, params, *, dilation, gate_eps, conv_eps, gain_offset=0.0):
    """One document: rows [T, d_mem], streams [T, M, d] -> what the streams gain [T, M, d]."""
    length, branches, width = streams.shape
    bias = params.get("bias", np.zeros((branches + 1, width)))
    normed = np.zeros(streams.shape)
    out = np.zeros(streams.shape)
    for t in range(length):
        value = rows[t] @ params["projection"][:, branches] + bias[branches]
        for m in range(branches):
            how = {"gate_eps": gate_eps, "gain_offset": gain_offset}
            out[t, m] = gate(rows[t], streams[t, m], params, m, **how) * value
            if "conv" in params:
                conv_gain = params["conv"]["norm"]["gain"][m] + gain_offset
                normed[t, m] = rms_norm(out[t, m], conv_gain, conv_eps)
    if "conv" in params:
        taps = params["conv"]["taps"]
        convolved = np.zeros(streams.shape)
        for t in range(length):
            for j in range(len(taps)):
                back = (len(taps) - 1 - j) * dilation
                if t >= back:
                    convolved[t] += taps[j] * normed[t - back]
        out += convolved * sigmoid(convolved)
    return out
