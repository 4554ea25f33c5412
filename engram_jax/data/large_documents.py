"""Cuts documents that are a large part of the text, so that a share of each can be held out.

Whole documents are held out by a hash of their content (split.py). One that is half of the text
would then put half of it, or nothing, on the held-out side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from engram_jax.data.documents import Spool, split_text

# A document is cut if it is longer than LARGE bytes and more than the share MOST of the text: the
# default text has none (the longest is 2 % of it), nor has a folder of documents of a few kB.
LARGE = 1 << 16
MOST = 0.1
_BLOCKS = 4  # of a document that are held out, about: from different places in it
_SMALLEST = 1 << 10  # bytes of a block


def large_documents(spool: Spool) -> np.ndarray:
    """The numbers (origins) of the documents to be cut; none if there is only one document."""
    numbers, group = np.unique(spool.origins, return_inverse=True)
    sizes = np.bincount(group, weights=spool.sizes)
    large = numbers[(sizes > LARGE) & (sizes > MOST * sizes.sum())]
    return large if len(numbers) > 1 else large[:0]


def cut_large(
    spool: Spool, into: Spool, large: np.ndarray, fraction: float, most: int
) -> np.ndarray:
    """Copy `spool` to `into`, of every document in `large` a share `fraction` in blocks of its own.

    The blocks whose digests are lowest are held out; what lies between two of them stays together,
    up to `most` bytes. Every piece is a document of its own.

    Returns int8 [documents of `into`]: 1 = held out, 0 = for training, -1 = not cut.
    """
    origins, sides = spool.origins, []
    parts_of = {number: np.flatnonzero(origins == number) for number in large.tolist()}
    first = {int(parts[0]): parts for parts in parts_of.values()}

    def add(text: bytes, number: int, side: int) -> None:
        before = len(into)
        if not text:
            return
        into.add("a piece of a document that was cut", text, number)
        if len(into) > before:
            sides.append(side)

    number = 0
    for at in range(len(spool)):
        if int(origins[at]) not in parts_of:
            (text,) = spool.read(np.array([at]))
            add(text, -1 - int(origins[at]), -1)  # parts of a document stay on one side
        elif at in first:
            for text, side in _pieces(spool, first[at], fraction, most):
                add(text, number, side)
                number += 1
    return np.asarray(sides, np.int8)


def _pieces(
    spool: Spool, parts: np.ndarray, fraction: float, most: int
) -> Iterator[tuple[bytes, int]]:
    """(text, 1 = held out or 0) of the pieces of the document with these parts, in order."""
    size = int(spool.sizes[parts].sum())
    block = min(most, max(_SMALLEST, int(fraction * size / _BLOCKS)))
    digests, sizes = [], []
    for part in spool.read(parts):
        for text in split_text(part, block):
            digests.append(hashlib.sha256(text).digest())
            sizes.append(len(text))
    order = sorted(range(len(digests)), key=lambda i: (digests[i], i))
    so_far = np.cumsum([sizes[i] for i in order])
    held = set(order[: 1 + int(np.argmin(np.abs(so_far - fraction * size)))])
    number = 0
    for part in spool.read(parts):
        between = b""
        for text in split_text(part, block):
            if number not in held:
                between += text
            else:
                yield from ((between, 0), (text, 1))
                between = b""
            number += 1
        yield between, 0
