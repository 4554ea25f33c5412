"""Counts the n-grams of the training text and keeps the most frequent ones (f-grams).

Exact and deterministic, a part of the text at a time: memory grows with the distinct n-grams, 16
bytes each (24 where n ids do not fit 63 bits), not with the text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from engram_jax.addressing import Addressing
from engram_jax.addressing.fgrams import FgramAddressing
from engram_jax.config.errors import UserError
from engram_jax.data.array_store import Store

PART = 1 << 22  # tokens


def with_fgrams(
    addressing: Addressing, store: Store, vocab_size: int, log: Callable[[str], None] = print
) -> Addressing:
    """The addressing with the f-grams of the training text in `store`, which is read whole.

    Raises UserError if the text has fewer distinct n-grams than rows.
    """
    layers = dict(addressing.layers)
    for layer_id, layer in addressing.layers.items():
        if isinstance(layer, FgramAddressing):
            tables, least = most_frequent(
                store.tokens, store.starts, layer.orders, layer.count, vocab_size
            )
            each = ", ".join(
                f"{len(t):,} {n}-grams" for n, t in zip(layer.orders, tables, strict=True)
            )
            log(f"f-grams: {each}; each occurs {least:,} times or more in the training text")
            layers[layer_id] = dataclasses.replace(layer, ngrams=tables)
    return dataclasses.replace(addressing, layers=layers)


def most_frequent(
    tokens: np.ndarray,
    starts: np.ndarray,
    orders: Sequence[int],
    count: int,
    vocab_size: int,
    part: int = PART,
) -> tuple[tuple[np.ndarray, ...], int]:
    """(for every order n the chosen n-grams, int32 [K_n, n] ascending; the least one's count).

    The `count` most frequent n-grams of all orders together; of equally frequent ones the shorter,
    then the one whose ids, oldest first, are lower. N-grams do not reach across documents; the
    end-of-document id is the last token of its document.

    Args:
      tokens: ids in [0, vocab_size), all documents one after another.
      starts: int64 [documents + 1], where each starts; the last is the number of tokens.
      part: tokens counted at a time; decides no result.
    """
    found = [_counts(tokens, starts, n, vocab_size, part) for n in orders]
    counts = np.concatenate([c for _, c in found])
    if len(counts) < count:
        raise UserError(
            f"config.model.engram.rows_per_head = {count}: must be at most {len(counts)}, the"
            f" distinct n-grams of orders {tuple(orders)} in the training text"
        )
    chosen = np.argsort(-counts, kind="stable")[:count]  # stable: ties by order, then by ids
    tables, offset = [], 0
    for n, (words, own) in zip(orders, found, strict=True):
        places = np.sort(chosen[(chosen >= offset) & (chosen < offset + len(own))]) - offset
        tables.append(_unpacked(words[:, places], n, vocab_size))
        offset += len(own)
    return tuple(tables), int(counts[chosen[-1]])


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _counts(
    tokens: np.ndarray, starts: np.ndarray, n: int, vocab_size: int, part: int
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams, ascending, packed into int64 words [W, distinct], and their counts."""
    per_word = 63 // _bits(vocab_size)
    words = np.zeros((-(-n // per_word), 0), np.int64)
    counts = np.zeros(0, np.int64)
    for begin in range(0, len(tokens), part):
        end = min(begin + part, len(tokens) - n + 1)  # of the first tokens of n-grams
        if end <= begin:
            break
        ids = np.asarray(tokens[begin : end + n - 1], np.int64)
        first = np.zeros(len(ids), bool)
        low, high = np.searchsorted(starts, (begin, begin + len(ids)))
        first[starts[low:high] - begin] = True
        inside = np.ones(end - begin, bool)
        for k in range(1, n):
            inside &= ~first[k : k + end - begin]
        new = _packed([ids[k : k + end - begin][inside] for k in range(n)], vocab_size)
        both = np.concatenate([words, new], axis=1)
        weights = np.concatenate([counts, np.ones(new.shape[1], np.int64)])
        words, counts = _summed(both, weights)
    return words, counts


def _packed(columns: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """n columns of ids -> int64 [W, grams], in whose order (by the first word, then the second) the
    n-grams are ordered."""
    bits = _bits(vocab_size)
    per_word = 63 // bits
    words = []
    for start in range(0, len(columns), per_word):
        word = np.zeros(len(columns[0]), np.int64)
        for column in columns[start : start + per_word]:
            word = word << bits | column
        words.append(word)
    return np.stack(words)


def _unpacked(words: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """The inverse of `_packed`: int32 [grams, n]."""
    bits = _bits(vocab_size)
    per_word = 63 // bits
    out = np.zeros((words.shape[1], n), np.int32)
    for k in range(n):
        last = min(k // per_word * per_word + per_word, n) - 1  # of the same word
        out[:, k] = words[k // per_word] >> bits * (last - k) & ((1 << bits) - 1)
    return out


def _summed(words: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns of `words` ascending, with the sums of their counts."""
    if not words.shape[1]:
        return words, counts
    order = np.lexsort(words[::-1])
    words, counts = words[:, order], counts[order]
    new = np.ones(len(counts), bool)
    new[1:] = np.any(words[:, 1:] != words[:, :-1], axis=0)
    return words[:, new], np.add.reduceat(counts, np.flatnonzero(new))
