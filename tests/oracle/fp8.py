"""FP8 in NumPy, from the formats' definitions: e4m3 by its list of values, scales by their rule."""

import numpy as np

# Every finite e4m3 magnitude: subnormals k 2^-9, then (1 + k / 8) 2^e for e = -6 .. 8, without the
# last (480 would be NaN's place).
MAGNITUDES = np.array(
    [k * 2.0**-9 for k in range(8)]
    + [(1 + k / 8) * 2.0**e for e in range(-6, 9) for k in range(8)][:-1]
)


def e4m3(x):
    """Round float64 to the nearest e4m3 value, ties to the even one."""
    x = np.asarray(x, np.float64)
    above = np.clip(np.searchsorted(MAGNITUDES, np.abs(x)), 1, len(MAGNITUDES) - 1)
    low, high = MAGNITUDES[above - 1], MAGNITUDES[above]
    middle = (low + high) / 2
    up = (np.abs(x) > middle) | ((np.abs(x) == middle) & (above % 2 == 0))
    return np.sign(x) * np.where(up, high, low)


def scale_for(largest, power_of_two):
    """The scale that takes `largest` to 448, or the least power of two that takes it no higher."""
    largest = np.maximum(largest, 2.0**-100)
    return 2.0 ** np.ceil(np.log2(largest / 448)) if power_of_two else largest / 448


def rows(x, recipe):
    """What the rows [T, C] are after FP8."""
    out = np.zeros(x.shape)
    width = {"channel": x.shape[1], "block": 128, "mx": 32}[recipe]
    for start in range(0, x.shape[1], width):
        part = x[:, start : start + width]
        scale = scale_for(np.abs(part).max(axis=1, keepdims=True), recipe == "mx")
        out[:, start : start + width] = e4m3(part / scale) * scale
    return out


def weights(w, recipe):
    """What the weights [C, M + 1, d] are after FP8."""
    out = np.zeros(w.shape)
    depth, branches, columns = w.shape
    width = {"block": 128, "mx": 32}.get(recipe)
    for m in range(branches):
        for column in range(0, columns, width or 1):
            for row in range(0, depth, width or depth):
                at = (slice(row, row + (width or depth)), m, slice(column, column + (width or 1)))
                scale = scale_for(np.abs(w[at]).max(), recipe == "mx")
                out[at] = e4m3(w[at] / scale) * scale
    return out
