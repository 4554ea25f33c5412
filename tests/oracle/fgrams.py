"""F-gram embeddings with a Python dict, one token at a time; NumPy float64."""

import numpy as np


def longest(tokens, layer):
    """One document's tokens -> the row of the longest f-gram that ends at each, None without."""
    grams = [tuple(map(int, gram)) for table in layer.ngrams for gram in table]
    rows = {gram: row for row, gram in enumerate(grams)}
    found = []
    for t in range(len(tokens)):
        ending = [tuple(map(int, tokens[t - n + 1 : t + 1])) for n in layer.orders if t + 1 >= n]
        found.append(next((rows[gram] for gram in reversed(ending) if gram in rows), None))
    return found


def added(tokens, streams, layer, table, matrix):
    """What replaces the embedding in every stream by that of an f-gram: [T, M, d]."""
    out = np.zeros(streams.shape)
    for t, row in enumerate(longest(tokens, layer)):
        if row is not None:
            out[t] = table[row] @ matrix - streams[t]
    return out
