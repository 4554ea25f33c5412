"""The signs of a count sketch: both implementations against Python's integers, and their law."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from engram_jax.addressing import hash_jax, hash_numpy
from engram_jax.addressing.artifact import Addressing
from engram_jax.addressing.hash_tokens import Hasher
from tests.addressing.cases import planned

device = jax.jit(hash_jax.signs, static_argnums=1)


def finalised(x: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def by_python(ids: list[int], layer) -> list[list[int]]:
    """The signs of one document, token by token."""
    found = []
    for t in range(len(ids)):
        signs = []
        for order in layer.orders:
            mixed = 0
            for back in range(order):
                token = ids[t - back] if t >= back else layer.fill_id
                mixed ^= token * layer.multipliers[back] % 2**64
            word = finalised(mixed % 2**32 ^ finalised(mixed >> 32))
            signs += [-1 if word >> head & 1 else 1 for head in range(layer.heads_per_order)]
        found.append(signs)
    return found


@pytest.mark.parametrize("name", ["v41", "smallest"])
def test_signs_equal_pythons_integers(name):
    """NumPy, the device and serving; a masked id (negative) is hashed as the number it is."""
    layer = next(iter(planned(name).values()))
    ids = np.random.default_rng(0).integers(0, 11, 40).astype(np.int32)
    ids[7] = -3
    expected = np.array(by_python([int(x) for x in ids], layer))
    for form in (hash_numpy.signs, device):
        found = form(ids, layer)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, expected)
    hasher = Hasher(Addressing(None, 11, 0, {layer.layer_id: layer}, "paper", -1, "", signs=True))
    past = layer.max_ngram - 1
    padded = np.concatenate([hasher.empty(), ids])[None]
    np.testing.assert_array_equal(hasher.signs(str(layer.layer_id), padded)[0], expected)
    for later in (hash_numpy.signs, device):  # with a history, as tokens are decoded
        continued = later(ids[past + 3 :], layer, history=ids[3 : past + 3])
        np.testing.assert_array_equal(continued, expected[past + 3 :])


def test_signs_stop_at_documents_as_addresses_do():
    layer = planned("demo")[1]
    ids = np.random.default_rng(1).integers(0, 90_000, (2, 30)).astype(np.int32)
    segments = np.sort(np.random.default_rng(2).integers(1, 4, (2, 30)), axis=1).astype(np.int32)
    for form in (hash_numpy.signs, device):
        found = np.asarray(form(ids, layer, segments))
        for b in range(2):
            for document in np.unique(segments[b]):
                where = segments[b] == document
                expected = by_python([int(x) for x in ids[b, where]], layer)
                np.testing.assert_array_equal(found[b, where], expected)


def distinct_ngrams(order: int, highest: int, count: int) -> np.ndarray:
    """[about count, order], each an n-gram of random ids below `highest`."""
    drawn = np.random.default_rng(order).integers(0, highest, (count, order))
    return np.unique(drawn, axis=0)


@pytest.mark.parametrize("highest", [98_627, 500])
def test_signs_are_balanced_and_independent_of_addresses_and_of_each_other(highest):
    """On distinct random n-grams, within 5 standard deviations, also for the small ids of frequent
    words, whose hashes have few high bits."""
    layer = planned("27b")[1]
    for order, heads in ((2, slice(0, 8)), (3, slice(8, 16))):
        ids = distinct_ngrams(order, highest, 150_000)
        signs = hash_numpy.signs(ids, layer)[:, -1, heads].astype(np.float64)
        addresses = hash_numpy.addresses(ids, layer)[:, -1, heads] - layer.offsets[heads.start]
        n, bound = len(ids), 5 / np.sqrt(len(ids))
        assert n > 80_000 and np.abs(signs.mean(0)).max() < bound
        assert np.abs(signs.T @ signs / n - np.eye(8)).max() < bound
        for bit in range(12):  # of the address
            parity = 1 - 2.0 * (addresses >> bit & 1)
            assert np.abs(parity.T @ signs / n).max() < bound
        place = addresses - addresses.mean(0)  # and its size
        assert np.abs((place / place.std(0)).T @ signs / n).max() < bound


def test_n_grams_that_share_a_row_have_equal_signs_half_of_the_time():
    """The point of a count sketch, on the n-grams that really collide in a small head."""
    layer = planned("smallest")[0]
    ids = np.random.default_rng(4).integers(0, 11, 60_000)
    signs, addresses = hash_numpy.signs(ids, layer), hash_numpy.addresses(ids, layer)
    head = layer.heads_per_order  # the first of the 3-grams: a handful of rows
    trigrams = ids[2:] + 11 * ids[1:-1] + 121 * ids[:-2]
    _, first = np.unique(trigrams, return_index=True)
    row, sign = addresses[2:, head][first], signs[2:, head][first].astype(np.float64)
    same = np.equal.outer(row, row) & ~np.eye(len(row), dtype=bool)
    assert same.sum() > 50_000
    agreement = np.outer(sign, sign)[same].mean()
    assert abs(agreement) < 5 * sign.size**-0.5
