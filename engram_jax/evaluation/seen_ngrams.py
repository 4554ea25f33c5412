"""Which n-grams of a text occur in another text, exactly, by sorted integer keys.

The n-gram of a position is the n tokens that end there, raw ids, within the document and the
sequence; before their start stands a start symbol, as the hash reads its fill id there. So it is
what an Engram of order n looks up at that position: an n-gram that was seen has had its row
trained, and an unseen one has a row that was never trained, or only by other n-grams.

Keys. An n-gram is its first n - 1 tokens' number and its last token:

    key = number of the (n - 1)-gram that ends one position earlier * V + token

Numbers are those of the wanted n-grams in ascending order of key, so a key stays below (wanted
n-grams + 1) * V whatever n is. The searched text is read in blocks; memory is that of the wanted
text and one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

ABSENT = -1


def seen(
    tokens: np.ndarray,
    positions: np.ndarray,
    searched: Iterable[tuple[np.ndarray, np.ndarray]],
    orders: Sequence[int],
    vocab_size: int,
) -> np.ndarray:
    """Whether the n-gram of every position occurs in the searched text: bool [rows, T, K].

    tokens, positions: int [rows, T], positions counted from 0 at every start of a document or a
      sequence, as in data/packing.py.
    searched: pairs like (tokens, positions).
    orders: K lengths, at least 1.
    """
    lengths = range(1, max(orders, default=0) + 1)
    keys: list[np.ndarray] = []  # of the wanted n-grams, each once, ascending, by n
    numbers: list[np.ndarray] = []  # of every position, by n
    for _ in lengths:
        key = _keys(tokens, positions, numbers[-1] if keys else None, keys, vocab_size)
        distinct, inverse = np.unique(key, return_inverse=True)
        keys.append(distinct)
        numbers.append(inverse.reshape(key.shape))
    found = [np.zeros(len(distinct), bool) for distinct in keys]
    for other_tokens, other_positions in searched:
        number: np.ndarray | None = None
        for n in lengths:
            key = _keys(other_tokens, other_positions, number, keys[: n - 1], vocab_size)
            number = _look_up(keys[n - 1], key)
            found[n - 1][number[number != ABSENT]] = True
    flags = [found[n - 1][numbers[n - 1]] for n in orders]
    return np.stack(flags, axis=-1) if flags else np.zeros((*tokens.shape, 0), bool)


def _keys(
    tokens: np.ndarray,
    positions: np.ndarray,
    shorter: np.ndarray | None,
    keys: Sequence[np.ndarray],
    vocab_size: int,
) -> np.ndarray:
    """The keys of all positions' n-grams, int64 [rows, T]; ABSENT where the first n - 1 tokens are
    no wanted (n - 1)-gram.

    shorter: numbers of all positions' (n - 1)-grams; None for n = 1.
    keys: of the wanted n-grams, up to n - 1.
    """
    tokens = tokens.astype(np.int64)
    if shorter is None:
        return tokens
    before = np.empty_like(shorter)
    before[:, 1:] = shorter[:, :-1]
    before[positions == 0] = len(keys[-1])  # nothing but start symbols
    return np.where(before == ABSENT, ABSENT, before * vocab_size + tokens)


def _look_up(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where `wanted` stands in the ascending `keys`, ABSENT where it does not."""
    if not len(keys):
        return np.full(wanted.shape, ABSENT)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, ABSENT)
