"""Primes and multipliers against the golden files, a sieve and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.addressing import LayerAddressing, hash_numpy, plan_layer
from engram_jax.addressing.hash_plan import MAX_HEAD_SIZE, MAX_TABLE_ROWS, is_prime
from engram_jax.config import EngramConfig
from engram_jax.config.errors import UserError
from tests.addressing.cases import QWEN_GOLDEN, planned


def sieve(limit: int) -> np.ndarray:
    """All primes below `limit` (Eratosthenes)."""
    prime = np.ones(limit, bool)
    prime[:2] = False
    for n in range(2, int(limit**0.5) + 1):
        if prime[n]:
            prime[n * n :: n] = False
    return np.flatnonzero(prime)


@pytest.mark.parametrize("name", ["demo", "v41"])
def test_paper_dialect_gives_the_golden_multipliers_and_primes(golden, name):
    expected, layers = golden(f"addressing_{name}"), planned(name)
    assert list(layers) == list(expected["layer_ids"])
    for layer_id, layer in layers.items():
        np.testing.assert_array_equal(layer.multipliers, expected[f"multipliers_{layer_id}"])
        np.testing.assert_array_equal(layer.head_sizes, expected[f"primes_{layer_id}"].ravel())


def test_v41_tables_have_the_released_row_counts():
    layers = planned("v41")
    assert {i: layer.rows for i, layer in layers.items()} == {1: 384_006_168, 14: 384_016_682}
    assert layers[1].padded_rows == layers[1].rows


def test_qwen_dialect_gives_the_golden_multipliers_sizes_and_offsets(golden):
    expected, layer = golden("module_qwen_ple"), planned("qwen_golden")[1]
    np.testing.assert_array_equal(layer.multipliers, expected["multipliers"])
    np.testing.assert_array_equal(layer.head_sizes, expected["head_sizes"])
    np.testing.assert_array_equal(layer.offsets, expected["head_offsets"])
    assert layer.rows == sum(expected["head_sizes"])
    assert layer.padded_rows == len(expected["param.ple_embedding.ngram_embedding.weight"])


def test_qwen_released_geometry_has_about_320_million_rows():
    layer = planned("qwen")[1]
    assert 320_000_000 < layer.rows <= layer.padded_rows < 320_010_000
    assert layer.padded_rows % 128 == 0


def test_qwen_counts_primes_and_multipliers_over_the_memory_layers():
    """The layers' ids do not matter, their rank does; layer 0 of one alone is layer 0 of three."""
    three = EngramConfig(
        layers=(2, 5, 9), heads_per_order=4, rows_per_head=(101,), seed=1234, hash_dialect="qwen"
    )
    layers = plan_layer(three, 997)
    expected = sieve(1000)[np.searchsorted(sieve(1000), 101) :][:24]
    found = [size for layer in layers.values() for size in layer.head_sizes]
    np.testing.assert_array_equal(found, expected)
    assert layers[2].multipliers == plan_layer(QWEN_GOLDEN, 997)[1].multipliers
    assert len({m for layer in layers.values() for m in layer.multipliers}) == 9


def test_each_order_takes_the_next_free_primes_from_its_own_base():
    config = EngramConfig(layers=(0, 3), heads_per_order=3, rows_per_head=(100, 90), d_mem=60)
    layers = plan_layer(config, 50)
    # From 100: 101 103 107; from 90: 97, then past those taken. Then the second layer.
    assert layers[0].head_sizes == (101, 103, 107, 97, 109, 113)
    assert layers[3].head_sizes == (127, 131, 137, 139, 149, 151)
    assert layers[0].offsets == (0, 101, 204, 311, 408, 517)


def test_no_prime_serves_twice_and_all_are_prime(geometry):
    layers, vocab = geometry
    sizes = [size for layer in layers for size in layer.head_sizes]
    if set(sizes) != {1}:  # lookup "one_row" has no primes
        assert len(set(sizes)) == len(sizes)
    small = sieve(2**15 + 1)
    assert all((size % small[small * small <= size] != 0).all() for size in sizes)
    for layer in layers:
        assert all(m % 2 == 1 and m > 0 and m * (vocab - 1) < 2**63 for m in layer.multipliers)


@pytest.mark.parametrize("dialect", ["paper", "qwen"])
def test_one_row_per_head_leaves_as_many_rows_as_heads(dialect):
    """The same n-grams hashed by the same multipliers; no padding, in the dialect that has it."""
    fields = {"layers": (1, 4), "heads_per_order": 3, "d_mem": 60, "hash_dialect": dialect}
    layers = plan_layer(EngramConfig(**fields, lookup="one_row"), 997)
    for layer_id, hashed in plan_layer(EngramConfig(**fields), 997).items():
        layer = layers[layer_id]
        assert layer.head_sizes == (1,) * 6 and layer.rows == layer.padded_rows == 6
        assert layer.multipliers == hashed.multipliers
        ids = np.random.default_rng(0).integers(0, 997, (3, 20))
        rows = hash_numpy.addresses(ids, layer)
        np.testing.assert_array_equal(rows, np.broadcast_to(np.arange(6), (3, 20, 6)))


def test_is_prime():
    found = [n for n in range(100_000) if is_prime(n)]
    np.testing.assert_array_equal(found, sieve(100_000))
    # Strong pseudoprimes to base 2; to 2 and 3; to 2, 3 and 5.
    assert not any(map(is_prime, (2047, 3277, 1_373_653, 25_326_001, 1_157_839_381)))
    assert is_prime(2**31 - 1)
    assert not is_prime(46_337 * 46_349)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (EngramConfig(layers=(4,), rows_per_head=(2**27,)), f"at most {MAX_TABLE_ROWS}"),
        (
            EngramConfig(layers=(4,), orders=(2,), heads_per_order=1, rows_per_head=(2**30,)),
            f"2 to {MAX_HEAD_SIZE}",
        ),
        (
            EngramConfig(layers=(4,), rows_per_head=(100, 200), hash_dialect="qwen"),
            r"\(100, 200\): must be one number",
        ),
    ],
)
def test_geometries_that_cannot_be_addressed_are_refused(config, told):
    with pytest.raises(UserError, match=rf"config\.model\.engram\.rows_per_head.*{told}"):
        plan_layer(config, 1000)


def test_a_layer_that_contradicts_itself_is_refused():
    fields = {"layer_id": 0, "orders": (2, 3), "heads_per_order": 1, "head_sizes": (5, 7)}
    LayerAddressing(**fields, multipliers=(1, 3, 5))
    for wrong in [{"multipliers": (1, 3)}, {"multipliers": (1, 3, -5)}, {"head_sizes": (5,)}]:
        with pytest.raises(ValueError, match="layer 0"):
            LayerAddressing(**{"multipliers": (1, 3, 5), **fields, **wrong})


def test_no_layers_is_an_empty_plan():
    assert plan_layer(EngramConfig(layers=()), 100) == {}
