"""Row gradients and row-wise Adam against NumPy loops over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import MAX_LOOKUPS, MAX_TABLE_ROWS, OptimizerConfig
from engram_jax.memory import table
from engram_jax.memory.row_gradients import (
    LARGEST,
    deduplicate,
    find_distinct,
    out_of_range,
    squared_norm,
    sum_equal,
)
from engram_jax.memory.table import TableLayout
from engram_jax.training.optim import rowwise_adam
from tests.oracle import released_fp8

ROWS, DIM = 50, 4


def _cases():
    rng = np.random.default_rng(0)
    yield "random", rng.integers(0, ROWS, (2, 7, 3))
    yield "one row repeated", np.full((40,), 17)
    yield "all distinct", rng.permutation(ROWS)
    yield "a single lookup", np.array([ROWS - 1])
    yield "first and last row", np.array([0, ROWS - 1] * 9)


CASES = list(_cases())


@pytest.mark.parametrize(("name", "addresses"), CASES, ids=[n for n, _ in CASES])
def test_duplicates_are_summed_into_distinct_ascending_rows(name, addresses):
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(*addresses.shape, DIM)).astype(np.float32)
    dense = np.zeros((ROWS, DIM))
    for row, g in zip(addresses.reshape(-1), gradients.reshape(-1, DIM), strict=True):
        dense[row] += g
    ours = jax.jit(deduplicate)(jnp.asarray(addresses, jnp.int32), gradients)
    touched = np.unique(addresses)
    count = int(ours.count)
    assert count == len(touched)
    np.testing.assert_array_equal(ours.addresses[:count], touched)
    np.testing.assert_allclose(ours.values[:count], dense[touched], rtol=1e-5, atol=1e-5)
    assert not np.any(ours.values[count:])
    everything = np.asarray(ours.addresses, np.int64)
    assert np.all(np.diff(everything) > 0)  # distinct, so `unique_indices` is the truth
    assert np.all(everything[count:] > 2**30)
    np.testing.assert_allclose(squared_norm(ours), np.sum(dense**2), rtol=1e-5)


def test_types_do_not_follow_those_of_the_surroundings():
    """Numbers of rows are int32 and sums at least float32, also where JAX computes in 64 bits."""
    addresses = np.array([7, 3, 7], np.int32)
    with jax.enable_x64(True):
        distinct = find_distinct(jnp.asarray(addresses))
        assert {x.dtype.name for x in jax.tree.leaves(distinct)} == {"int32"}
        wanted = {"bfloat16": "float32", "float32": "float32", "float64": "float64"}
        for given, kept in wanted.items():
            found = deduplicate(jnp.asarray(addresses), jnp.ones((3, DIM), given))
            assert found.values.dtype == kept
            assert {found.addresses.dtype.name, found.count.dtype.name} == {"int32"}
            half = found.scaled(jnp.float64(0.5))
            assert half.values.dtype == kept
            np.testing.assert_array_equal(half.values[:, 0], [0.5, 1, 0])
            np.testing.assert_array_equal(half.addresses, found.addresses)


def test_equal_rows_are_added_in_the_order_of_their_lookups():
    """float32: 1 + 2**25 - 2**25 is 0 in this order, and 1 in others. A sort that need not keep the
    order may do so here and not on a TPU, so the program is looked at, too."""
    parts = jnp.array([[1.0], [2.0**25], [5.0], [-(2.0**25)]])
    distinct = find_distinct(jnp.array([9, 9, 4, 9], jnp.int32))
    assert distinct.order.tolist() == [2, 0, 1, 3] and distinct.slot.tolist() == [0, 1, 1, 1]
    assert sum_equal(parts, distinct)[:, 0].tolist() == [5, 0, 0, 0]
    program = str(jax.make_jaxpr(find_distinct)(jnp.zeros(4, jnp.int32)))
    assert "is_stable=True" in program and "is_stable=False" not in program


@pytest.mark.parametrize("below", [9, LARGEST // 300, LARGEST // 300 + 1])
@pytest.mark.parametrize("x64", [False, True])
def test_any_bound_of_the_rows_finds_the_same(below, x64):
    """Up to LARGEST // N one sort of unique keys does it; the largest key of all is used."""
    rng = np.random.default_rng(below)
    addresses = np.concatenate([rng.integers(0, below, 150), rng.integers(below - 5, below, 150)])
    addresses = np.append(addresses[:-1], below - 1).astype(np.int32)
    with jax.enable_x64(x64):
        found = find_distinct(jnp.asarray(addresses), below)
        sorts = str(jax.make_jaxpr(find_distinct, static_argnums=1)(addresses, below))
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"int32"}
    assert ("num_keys=1" in sorts) and ("argsort" in sorts) == (below * 300 > LARGEST)
    rows, slot = np.unique(addresses, return_inverse=True)
    order = np.argsort(addresses, kind="stable")
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.slot, slot[order])
    np.testing.assert_array_equal(found.rows[: len(rows)], rows)
    assert int(found.count) == len(rows)


def numpy_sparse_adam(rows, mu, nu, dense, touched, rate, step, config):
    """Adam written out for the touched rows, float64."""
    for r in touched:
        mu[r] = config.adam_b1 * mu[r] + (1 - config.adam_b1) * dense[r]
        nu[r] = config.adam_b2 * nu[r] + (1 - config.adam_b2) * dense[r] ** 2
        m = mu[r] / (1 - config.adam_b1 ** (step + 1))
        v = nu[r] / (1 - config.adam_b2 ** (step + 1))
        rows[r] -= rate * m / (np.sqrt(v) + config.adam_eps)


def test_rowwise_adam_over_steps_moves_only_the_rows_it_touches():
    config, rng = OptimizerConfig(), np.random.default_rng(2)
    memory = table.init_table(jax.random.key(0), TableLayout(ROWS), DIM, 1.0, jnp.float32)
    rows, mu, nu = (np.array(x, np.float64) for x in (memory.rows, memory.mu, memory.nu))
    step_fn = jax.jit(
        lambda t, g, step: rowwise_adam.update(
            t, g, g.addresses, rate=jnp.float32(0.01), step=step, config=config
        )
    )
    ever = set()
    for step in range(6):
        addresses = rng.integers(0, ROWS, 12)
        gradients = rng.normal(size=(12, DIM))
        dense = np.zeros((ROWS, DIM))
        np.add.at(dense, addresses, gradients)
        touched = np.unique(addresses)
        before = np.asarray(memory.rows)
        grads = deduplicate(jnp.asarray(addresses), jnp.asarray(gradients, jnp.float32))
        memory, seen = step_fn(memory, grads, jnp.int32(step))
        numpy_sparse_adam(rows, mu, nu, dense, touched, 0.01, step, config)
        assert int(seen) == len(ever & set(touched))
        ever |= set(touched)
        untouched = np.setdiff1d(np.arange(ROWS), touched)
        np.testing.assert_array_equal(np.asarray(memory.rows)[untouched], before[untouched])
    for ours, theirs in ((memory.rows, rows), (memory.mu, mu), (memory.nu, nu)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 0 < len(ever) < ROWS


def test_dense_adam_is_the_textbook_and_moves_untouched_rows():
    config, rng = OptimizerConfig(), np.random.default_rng(3)
    memory = table.init_table(jax.random.key(0), TableLayout(ROWS), DIM, 1.0, jnp.float32)
    rows, mu, nu = (np.array(x, np.float64) for x in (memory.rows, memory.mu, memory.nu))
    for step in range(3):
        addresses = rng.integers(0, ROWS // 2, 9) if step else np.array([ROWS - 1] * 9)
        gradients = rng.normal(size=(9, DIM))
        dense = np.zeros((ROWS, DIM))
        np.add.at(dense, addresses, gradients)
        grads = deduplicate(jnp.asarray(addresses), jnp.asarray(gradients, jnp.float32))
        memory, _ = rowwise_adam.update_dense(
            memory,
            grads,
            grads.addresses,
            rate=jnp.float32(0.01),
            step=jnp.int32(step),
            config=config,
        )
        numpy_sparse_adam(rows, mu, nu, dense, range(ROWS), 0.01, step, config)
    np.testing.assert_allclose(memory.rows, rows, rtol=1e-5, atol=1e-6)


def test_dropped_gradients_change_nothing():
    config = OptimizerConfig()
    memory = table.init_table(jax.random.key(0), TableLayout(ROWS), DIM, 1.0, jnp.float32)
    grads = deduplicate(jnp.arange(9), jnp.full((9, DIM), jnp.nan))
    after, _ = rowwise_adam.update(
        memory,
        grads.only_if(jnp.asarray(False)),
        grads.addresses,
        rate=jnp.float32(1),
        step=jnp.int32(0),
        config=config,
    )
    jax.tree.map(np.testing.assert_array_equal, after, memory)


def test_bfloat16_rows_are_rounded_to_a_neighbour_and_right_on_average():
    steps, rng = 4096, np.random.default_rng(4)
    x = np.concatenate([rng.normal(size=20), [0.0, -0.0, 1.5, -2.0, 1 + 2**-8 * 0.37]])
    x = jnp.asarray(x[None], jnp.float32)
    every = jax.jit(jax.vmap(lambda step: rowwise_adam.rounded(x, jnp.array([7]), step, 1)))
    drawn = np.asarray(every(jnp.arange(steps)), np.float64)[:, 0]
    exact = np.asarray(x, np.float64)[0]
    # The neighbours, by cutting float32's bits: toward zero, and one step further.
    bits = np.asarray(x[0]).view(np.uint32) & np.uint32(0xFFFF0000)
    below = bits.view(np.float32).astype(np.float64)
    above = np.where(below == exact, below, (bits + np.uint32(0x10000)).view(np.float32))
    assert np.all((drawn == below) | (drawn == above))
    gap = np.abs(above - below)
    np.testing.assert_array_less(np.abs(drawn.mean(0) - exact), 4 * gap / np.sqrt(steps) + 1e-30)
    two = [rowwise_adam.rounded(x, jnp.array([7]), jnp.int32(3), seed) for seed in (1, 2)]
    assert not np.array_equal(*two)
    np.testing.assert_array_equal(two[0][0], drawn[3])
    # No table is rounded as another one was some steps before.
    x, ids = jnp.full((64, 4), 1.001), jnp.arange(64)
    pairs = [(jnp.int32(step), seed) for step in range(8) for seed in range(8)]
    ways = {np.asarray(rowwise_adam.rounded(x, ids, *pair)).tobytes() for pair in pairs}
    assert len(ways) == len(pairs)


def test_bfloat16_rows_learn_steps_too_small_for_them():
    config = OptimizerConfig()
    ones = jnp.ones((64, 32))
    memory = table.Table(ones.astype(jnp.bfloat16), 0 * ones, 0 * ones)
    grads = deduplicate(jnp.arange(64), ones)
    ids = grads.addresses
    step = jax.jit(
        lambda t, n: rowwise_adam.update(t, grads, ids, jnp.float32(1e-4), n, config=config)
    )
    for number in range(100):
        memory, _ = step(memory, jnp.int32(number))
    assert memory.rows.dtype == jnp.bfloat16 and memory.mu.dtype == jnp.float32
    # 100 steps of 1e-4, each a fortieth of the distance to the next bfloat16 below 1
    np.testing.assert_allclose(jnp.mean(memory.rows.astype(jnp.float32)), 0.99, atol=2e-4)


def test_update_is_in_place():
    """Donated tables: compiled code holds no second table and aliases all three buffers."""
    rows, dim, lookups = 200_000, 8, 64
    shape = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    memory = table.Table(shape, shape, shape)

    def step(memory, addresses, gradients):
        grads = deduplicate(addresses, gradients)
        read = table.lookup(memory.rows, addresses)  # as the forward pass does
        return rowwise_adam.update(
            memory,
            grads.scaled(jnp.sum(read)),
            grads.addresses,
            rate=jnp.float32(1),
            step=jnp.int32(0),
            config=OptimizerConfig(),
        )

    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(
            memory,
            jax.ShapeDtypeStruct((lookups,), jnp.int32),
            jax.ShapeDtypeStruct((lookups, dim), jnp.float32),
        )
        .compile()
    )
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes == 3 * rows * dim * 4
    assert stats.temp_size_in_bytes < rows * dim * 4 / 10
    assert f"f32[{rows},{dim}]{{1,0}} copy(" not in compiled.as_text()


def test_lookup_is_the_exact_gather():
    layouts = {"1": TableLayout(30), "4": TableLayout(20)}
    memory = table.init_memory(jax.random.key(1), layouts, DIM, 0.02)
    addresses = {
        k: np.random.default_rng(0).integers(0, n, (2, 3, 5)) for k, n in (("1", 30), ("4", 20))
    }
    for k, a in addresses.items():
        rows = table.lookup(memory[k].rows, jnp.asarray(a))
        np.testing.assert_array_equal(rows, np.asarray(memory[k].rows)[a])
    assert abs(float(jnp.std(memory["1"].rows)) - 0.02) < 0.005


def test_a_table_starts_as_itself_whatever_others_there_are():
    alone = table.init_memory(jax.random.key(1), {"4": TableLayout(20)}, DIM, 0.02)
    layouts = {"1": TableLayout(20), "4": TableLayout(20)}
    memory = table.init_memory(jax.random.key(1), layouts, DIM, 0.02)
    np.testing.assert_array_equal(memory["4"].rows, alone["4"].rows)
    assert not np.array_equal(memory["1"].rows, memory["4"].rows)


def test_a_large_table_is_drawn_in_pieces(monkeypatch):
    """Normal with the asked deviation, no column a copy of another, and no second table's worth of
    temporary memory."""
    rows, dim, std = 4000, 40, 0.02

    def create(key):
        return table.init_table(key, TableLayout(rows), dim, std, jnp.float32)

    monkeypatch.setattr(table, "ONE_DRAW", rows * dim - 1)
    compiled = jax.jit(create).lower(jax.random.key(3)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * dim * 4
    values = np.asarray(compiled(jax.random.key(3)).rows, np.float64) / std
    correlation = values.T @ values / rows  # [dim, dim]: identity, entries off by 1 / sqrt(rows)
    np.testing.assert_allclose(correlation, np.eye(dim), atol=6 * np.sqrt(2 / rows))
    assert abs(values.mean()) < 6 / np.sqrt(values.size)
    assert abs((values**4).mean() - 3) < 6 * np.sqrt(96 / values.size)


def test_e8m0_and_e4m3_against_their_definitions():
    """Every byte: 2 ** (b - 127), NaN for 255; E4M3 by sign, exponent and mantissa."""
    codes = np.arange(256, dtype=np.uint8)
    powers = np.array([np.ldexp(1.0, b - 127) for b in range(255)] + [np.nan])
    np.testing.assert_array_equal(
        np.asarray(released_fp8.e8m0_to_float32(codes), np.float64), powers
    )

    def e4m3(code):
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
        if exponent == 15 and mantissa == 7:
            return np.nan
        if exponent == 0:
            return sign * mantissa / 8 * 2.0**-6
        return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)

    ours = np.asarray(released_fp8.e4m3_to_float32(codes), np.float64)
    np.testing.assert_array_equal(ours, [e4m3(int(c)) for c in codes])


def test_unused_entries_lie_beyond_the_largest_table():
    """Of the most lookups that a configuration may have in a step."""
    assert int(out_of_range(1000)[0]) == 2**31 - 1000
    assert 2**31 - MAX_LOOKUPS >= MAX_TABLE_ROWS
