"""Product-key memory in NumPy float64, both passes by hand, one token at a time.

Every one of the keys^2 rows is scored and the best are taken from a full sort: no product of lists.
"""

import numpy as np


def location(i, j, keys, expansion):
    """(block, stored row) of the virtual row of sub-keys (i, j): layers/product_keys.py: locate."""
    across = keys // expansion
    block = (i + j) % expansion
    return block, (i + block * across) % keys * across + (j // expansion + block) % across


def exhaustive(query, sub_keys, top_k):
    """query [key_dim], sub_keys [2, keys, half] -> [(score, i, j)], the best, best first."""
    half = len(query) // 2
    keys = sub_keys.shape[1]
    scored = [
        (query[:half] @ sub_keys[0, i] + query[half:] @ sub_keys[1, j], i, j)
        for i in range(keys)
        for j in range(keys)
    ]
    return sorted(scored, reverse=True)[:top_k]


def forward_backward(streams, params, g_y, *, heads, top_k, eps):
    """One document: streams [T, M, d], g_y [T, d] -> (y [T, d], gradients of sum(g_y * y)).

    params: query_proj, query_norm (gain), sub_keys, values, value_proj. The gradients have the
    same keys, and "streams".
    """
    query_proj, gain, sub_keys, values, maps = (
        params[k] for k in ("query_proj", "query_norm", "sub_keys", "values", "value_proj")
    )
    keys, half = sub_keys.shape[2:]
    expansion, width = len(maps), 2 * half
    grads = {k: np.zeros(v.shape) for k, v in params.items()} | {"streams": np.zeros(streams.shape)}
    out = np.zeros(g_y.shape)
    for t, stream in enumerate(streams):
        x = stream.mean(0)
        g_x = np.zeros(x.shape)
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            raw = x @ query_proj[:, columns]
            scale = 1 / np.sqrt(np.mean(raw * raw) + eps)
            query = raw * scale * gain[h]
            best = exhaustive(query, sub_keys[h], top_k)
            weights = np.exp([score - best[0][0] for score, _, _ in best])
            weights /= weights.sum()
            g_weights = np.zeros(top_k)
            for n, (_, i, j) in enumerate(best):
                block, row = location(i, j, keys, expansion)
                out[t] += weights[n] * values[row] @ maps[block]
                g_weights[n] = values[row] @ maps[block] @ g_y[t]
                grads["values"][row] += weights[n] * maps[block] @ g_y[t]
                grads["value_proj"][block] += weights[n] * np.outer(values[row], g_y[t])
            g_scores = weights * (g_weights - weights @ g_weights)
            g_query = np.zeros(width)
            for g, (_, i, j) in zip(g_scores, best, strict=True):
                grads["sub_keys"][h, 0, i] += g * query[:half]
                grads["sub_keys"][h, 1, j] += g * query[half:]
                g_query += g * np.concatenate([sub_keys[h, 0, i], sub_keys[h, 1, j]])
            grads["query_norm"][h] += g_query * raw * scale
            normed = g_query * gain[h]
            g_raw = scale * normed - scale**3 * raw * (normed @ raw) / width
            grads["query_proj"][:, columns] += np.outer(x, g_raw)
            g_x += query_proj[:, columns] @ g_raw
        grads["streams"][t] += g_x / len(stream)
    return out, grads
