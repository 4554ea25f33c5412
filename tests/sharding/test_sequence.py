"""Which tokens of a sequence each device of the sequence axis has, by hand and by their work."""

import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.sharding.sequence import device_order, natural_order, tokens_in_device_order


def test_a_device_has_an_early_and_a_late_chunk():
    found = tokens_in_device_order(16, 4).reshape(4, 4).tolist()
    assert found == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert tokens_in_device_order(4, 1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_device_sees_as_many_pairs_of_tokens(shards):
    length = 12 * shards
    pairs = (tokens_in_device_order(length, shards) + 1).reshape(shards, -1).sum(axis=1)
    assert set(pairs) == {length * (length + 1) // 2 // shards}


@pytest.mark.parametrize("axis", [1, 2])
def test_orders_are_each_other_s_inverse(axis):
    x = np.arange(2 * 12 * 12).reshape(2, 12, 12)
    ordered = device_order(jnp.asarray(x), 3, axis)
    np.testing.assert_array_equal(ordered, np.take(x, tokens_in_device_order(12, 3), axis))
    np.testing.assert_array_equal(natural_order(ordered, 3, axis), x)
    assert device_order(x, 1) is x
