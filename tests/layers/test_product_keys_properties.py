"""The search in two halves finds what an exhaustive one finds, for any keys and queries."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.layers.product_keys import search
from tests.properties import examples

KEYS, TOP_K, HALF = 7, 5, 3
run = jax.jit(search, static_argnums=2)
small = st.integers(-3, 3)  # exact in float32: equal scores are equal, and ties are frequent
numbers = st.one_of(small.map(float), st.floats(-100, 100, width=16))


@examples(150)
@given(
    st.lists(numbers, min_size=2 * HALF, max_size=2 * HALF),
    st.lists(numbers, min_size=2 * KEYS * HALF, max_size=2 * KEYS * HALF),
)
def test_top_k_equals_exhaustive_search(query, keys):
    query = np.array(query, np.float32)
    keys = np.array(keys, np.float32).reshape(1, 2, KEYS, HALF)
    scores, first, second = (np.asarray(x[0]) for x in run(jnp.asarray(query)[None], keys, TOP_K))
    halves = query.reshape(2, HALF).astype(np.float64)
    one, two = (np.float64(keys[0, c]) @ halves[c] for c in (0, 1))
    every = one[:, None] + two[None]
    best = np.sort(every.ravel())[::-1][:TOP_K]
    # float32 sums of at most 6 products of numbers up to 100
    bound = 6e4 * 6 * np.finfo(np.float32).eps
    np.testing.assert_allclose(scores, best, rtol=0, atol=bound)
    np.testing.assert_allclose(every[first, second], best, rtol=0, atol=2 * bound)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == TOP_K  # no row twice
