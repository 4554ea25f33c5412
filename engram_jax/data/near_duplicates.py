"""Finds training documents that nearly are held-out ones: MinHash and LSH (datasketch), then exact.

Documents are compared as sets of shingles, five consecutive words each, by their Jaccard similarity
|A and B| / |A or B|. LSH over the held-out documents' MinHash signatures proposes pairs, of which
it misses fewer than one in a thousand at the threshold; the similarity of a proposed pair is
computed from the shingles themselves, so none is left out by mistake.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

SHINGLE = 5  # words
_PERMUTATIONS = 128
_MISSED = 1e-3  # of pairs at the threshold, at most
_SEED = 1
_KEPT_TEXTS = 256  # held-out documents whose shingles are kept in memory


def shingles(text: bytes) -> set[bytes]:
    """Every five consecutive words, joined by spaces; one of all words where there are fewer."""
    words = text.split()
    count = max(1, len(words) - SHINGLE + 1)
    return {b" ".join(words[i : i + SHINGLE]) for i in range(count)}


def jaccard(a: set[bytes], b: set[bytes]) -> float:
    """The share of the shingles of either that both have."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of each) of LSH: as many rows, so as few useless proposals, as leave at least
    1 - _MISSED of the pairs at the threshold proposed, 1 - (1 - s^rows)^bands of those with
    similarity s."""
    found = (_PERMUTATIONS, 1)
    for rows in range(1, _PERMUTATIONS + 1):
        count = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** count <= _MISSED:
            found = (count, rows)
    return found


def resembling(
    read: Callable[[np.ndarray], Iterator[bytes]], held: np.ndarray, threshold: float
) -> np.ndarray:
    """Which training documents have at least this similarity to some held-out one: bool
    [documents].

    read: texts of the documents of these numbers, in their order (`Spool.read`). held: bool
    [documents]. Needs the extra `lab`.
    """
    from datasketch import MinHash, MinHashLSH

    def signature(found: set[bytes]) -> Any:
        made = MinHash(_PERMUTATIONS, seed=_SEED, hashfunc=_hash)
        made.update_batch(sorted(found))
        return made

    index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands(threshold))
    held_out, training = np.flatnonzero(held), np.flatnonzero(~held)
    for number, text in zip(held_out.tolist(), read(held_out), strict=True):
        index.insert(number, signature(shingles(text)))

    @lru_cache(_KEPT_TEXTS)
    def of_held_out(number: int) -> set[bytes]:
        return shingles(next(read(np.array([number]))))

    similar = np.zeros(len(held), bool)
    proposals: dict[int, list[int]] = {}
    for number, text in zip(training.tolist(), read(training), strict=True):
        if proposed := index.query(signature(shingles(text))):
            proposals[number] = sorted(proposed)
    for number, proposed in proposals.items():
        mine = shingles(next(read(np.array([number]))))
        similar[number] = any(jaccard(mine, of_held_out(n)) >= threshold for n in proposed)
    return similar


def _hash(shingle: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(shingle, digest_size=4).digest(), "big")
