"""XXH64 against published vectors: the sanity buffer of xxHash's own tests, and well-known strings.

Compared once with PyPI's xxhash on random bytes of every length to 200, and of whole blocks.
"""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.memory.store.xxh64 import block_checksums, xxh64


def sanity_buffer(size: int) -> bytes:
    """The generator of github.com/Cyan4973/xxHash, tests/sanity_test.c."""
    state, out = 2654435761, bytearray()
    for _ in range(size):
        out.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    return bytes(out)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
        (sanity_buffer(1), 0xE934A84ADB052768),
        (sanity_buffer(4), 0x9136A0DCA57457EE),
        (sanity_buffer(14), 0x8282DCC4994E35C8),
        (sanity_buffer(222), 0xB641AE8CB691C174),
    ],
)
def test_published_vectors(data, want):
    assert xxh64(data) == want


def test_blocks_are_hashed_one_by_one_and_the_last_may_be_short():
    data = np.frombuffer(sanity_buffer(222), np.uint8)
    got = block_checksums(data, 100)
    assert got.dtype == np.uint64
    assert list(got) == [
        xxh64(data[:100].tobytes()),
        xxh64(data[100:200].tobytes()),
        xxh64(data[200:].tobytes()),
    ]
    assert xxh64(data) == 0xB641AE8CB691C174
    assert block_checksums(data[:0], 8).size == 0
