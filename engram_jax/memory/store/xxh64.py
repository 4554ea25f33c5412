"""XXH64 (Yann Collet's xxHash, 64 bits, seed 0) of blocks: the checksum of stored rows.

Written from the published description, github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from engram_jax.hardware.numba_internals import host_jit, load_1, load_4, load_8

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_START_1 = np.uint64((0x9E3779B185EBCA87 + 0xC2B2AE3D27D4EB4F) % 2**64)
_START_4 = np.uint64(2**64 - 0x9E3779B185EBCA87)


@host_jit
def _rotate(x, left):  # type: ignore[no-untyped-def]
    return (x << uint64(left)) | (x >> uint64(64 - left))


@host_jit
def _round(lane, word):  # type: ignore[no-untyped-def]
    return _rotate(lane + word * _P2, 31) * _P1


@host_jit
def _merge(total, lane):  # type: ignore[no-untyped-def]
    return (total ^ _round(uint64(0), lane)) * _P1 + _P4


@host_jit
def xxh64_at(address, size):  # type: ignore[no-untyped-def]
    """XXH64 of `size` bytes at a memory address (both uint64), for use in compiled loops."""
    here, end = uint64(address), uint64(address) + uint64(size)
    if size >= 32:
        a, b, c, d = _START_1, _P2, uint64(0), _START_4
        while here + uint64(32) <= end:
            a = _round(a, load_8(here))
            b = _round(b, load_8(here + uint64(8)))
            c = _round(c, load_8(here + uint64(16)))
            d = _round(d, load_8(here + uint64(24)))
            here += uint64(32)
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        total = _merge(_merge(_merge(_merge(total, a), b), c), d)
    else:
        total = _P5
    total += uint64(size)
    while here + uint64(8) <= end:
        total = _rotate(total ^ _round(uint64(0), load_8(here)), 27) * _P1 + _P4
        here += uint64(8)
    if here + uint64(4) <= end:
        total = _rotate(total ^ (load_4(here) * _P1), 23) * _P2 + _P3
        here += uint64(4)
    while here < end:
        total = _rotate(total ^ (load_1(here) * _P5), 11) * _P1
        here += uint64(1)
    total = (total ^ (total >> uint64(33))) * _P2
    total = (total ^ (total >> uint64(29))) * _P3
    return total ^ (total >> uint64(32))


@host_jit
def _blocks(address, size, block_bytes, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        start = i * block_bytes
        out[i] = xxh64_at(uint64(address + start), uint64(min(block_bytes, size - start)))


def block_checksums(data: np.ndarray, block_bytes: int) -> np.ndarray:
    """XXH64 of each block of `block_bytes` bytes of `data`, uint8 and C-contiguous; the last block
    may be shorter -> uint64 [ceil(bytes / block_bytes)]."""
    assert data.dtype == np.uint8 and data.flags.c_contiguous
    out = np.empty(-(-data.size // block_bytes), np.uint64)
    _blocks(data.ctypes.data, data.size, block_bytes, out)
    return out


def xxh64(data: bytes | np.ndarray) -> int:
    """XXH64 of all bytes, seed 0."""
    flat = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
    return int(xxh64_at(np.uint64(flat.ctypes.data), np.uint64(flat.size)))
