"""Rows to lookups and gradients to rows over 8 devices, against NumPy indexing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engram_jax.config import MeshConfig
from engram_jax.memory.exchange import LOOKUPS, ROW_SHARDED, Exchange, natural_order, stored_order
from engram_jax.memory.table import TableLayout
from engram_jax.sharding.rules import AXES, P, make_mesh

DIM, SHAPE = 5, (8, 6, 3)  # 18 lookups on every device
LOOKUPS_HERE = 18
MESHES = {
    "fsdp 8": MeshConfig(),
    "data 2 x expert 2 x tensor 2": MeshConfig(data=2, fsdp=1, expert=2, tensor=2),
}
ROWS = 203  # 8 devices of 32 rows: 5 of the last rows each, and more, are padding


def addresses_of(case: str) -> tuple[int, np.ndarray]:
    """(rows of the table, addresses) of a case."""
    rng = np.random.default_rng(7)
    if case == "one row":
        return ROWS, np.full(SHAPE, 17)
    if case == "one owner":  # row a lies on device a mod 8
        return ROWS, rng.integers(0, ROWS // 8, SHAPE) * 8 + 3
    if case == "three rows of the first owner":  # one more than a capacity of 2
        return ROWS, np.resize(np.array([0, 8, 16]), SHAPE)
    if case == "the last row of every device":
        return 256, rng.integers(31 * 8, 256, SHAPE)
    if case == "empty shards":  # of 3 rows, five devices have none
        return 3, rng.integers(0, 3, SHAPE)
    if case == "every row different":
        return ROWS, rng.permutation(ROWS)[: np.prod(SHAPE)].reshape(SHAPE)
    if case == "every device its own row":
        return ROWS, np.broadcast_to(np.arange(8)[:, None, None], SHAPE)
    if case == "one device wants everything":
        wanted = np.zeros(SHAPE, int)
        wanted[3] = rng.permutation(ROWS)[:18].reshape(SHAPE[1:])
        return ROWS, wanted
    assert case == "random"
    return ROWS, rng.integers(0, ROWS, SHAPE)


CASES = (
    "one row",
    "one owner",
    "three rows of the first owner",
    "the last row of every device",
    "empty shards",
    "every row different",
    "every device its own row",
    "one device wants everything",
    "random",
)


def bits(shape):
    """Floats of every kind, denormal ones, infinities and NaNs among them."""
    words = np.random.default_rng(1).integers(0, 2**32, shape, dtype=np.uint32)
    return words.view(np.float32)


def subtract(table, gradients, natural, scale):
    """The simplest of optimizers, on the rows that are there; counts those it changed, if their
    addresses in natural order are told right."""
    at = gradients.addresses
    device = jax.lax.axis_index(AXES)
    right = (natural == at * 8 + device) | (at >= table.shape[0])
    scale = jnp.where(jnp.all(right), scale, jnp.nan)
    new = table.at[at].add(-scale * gradients.values, mode="drop", unique_indices=True)
    return new, jnp.sum(at < table.shape[0], dtype=jnp.int32)


@pytest.fixture(scope="module")
def compiled():
    """(rows, mesh, capacity) -> (exchange, one compiled function of all that an exchange does)."""
    kept = {}

    def build(rows, mesh_name, capacity):
        key = (rows, mesh_name, capacity)
        if key not in kept:
            mesh = make_mesh(MESHES[mesh_name])
            exchange = Exchange(mesh, TableLayout(rows, mesh.size), capacity)

            @jax.jit
            def everything(table, addresses, gradients, apply):
                stored = stored_order(mesh, exchange.layout, table)
                plan = exchange.plan(addresses)
                found = exchange.fetch(stored, addresses, plan, jnp.float32)
                sent = exchange.send(gradients, plan)
                new, changed = exchange.apply(
                    subtract, stored, plan, sent, jnp.float32(0.5), apply, (jnp.float32(4),)
                )
                facts = (plan.rounds, sent.touched, sent.squares, changed)
                return found, natural_order(mesh, exchange.layout, new), facts

            kept[key] = exchange, everything
        return kept[key]

    return build


def placed(exchange, x, spec):
    return jax.device_put(x, NamedSharding(exchange.mesh, spec))


def run(compiled, rows, mesh, capacity, table, addresses, gradients, apply=True):
    exchange, everything = compiled(rows, mesh, capacity)
    padded = np.zeros((exchange.layout.stored, DIM), np.float32)
    padded[:rows] = table
    out = everything(
        placed(exchange, padded, ROW_SHARDED),
        placed(exchange, addresses.astype(np.int32), LOOKUPS),
        placed(exchange, gradients, LOOKUPS),
        placed(exchange, np.bool_(apply), P()),
    )
    return jax.device_get(out)


@pytest.mark.parametrize("capacity", [LOOKUPS_HERE, 2])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_every_input(compiled, case, mesh, capacity):
    rows, addresses = addresses_of(case)
    rng = np.random.default_rng(2)
    table = rng.normal(size=(rows, DIM)).astype(np.float32)
    gradients = rng.normal(size=(*SHAPE, DIM)).astype(np.float32)
    found, new, (rounds, touched, squares, changed) = run(
        compiled, rows, mesh, capacity, table, addresses, gradients
    )
    np.testing.assert_array_equal(found, table[addresses])

    dense = np.zeros((rows, DIM))
    np.add.at(dense, addresses.reshape(-1), gradients.reshape(-1, DIM).astype(np.float64))
    np.testing.assert_allclose(new[:rows], table - 2 * dense, rtol=1e-5, atol=1e-5)
    assert not np.any(new[rows:])
    untouched = np.setdiff1d(np.arange(rows), addresses)
    np.testing.assert_array_equal(new[untouched], table[untouched])
    assert touched == changed == len(np.unique(addresses))
    np.testing.assert_allclose(squares, np.sum(dense**2), rtol=1e-5)

    # Rounds only where some device wants more than `capacity` distinct rows of one owner.
    pieces = 4 if mesh.startswith("data") else 8
    local = addresses.reshape(pieces, -1, *SHAPE[1:])
    parts = [part for piece in local for part in np.split(piece, 8 // pieces, axis=1)]
    most = max(np.bincount(np.unique(part) % 8).max() for part in parts)
    assert (rounds > 1) == (most > capacity)


def test_fetched_rows_are_the_table_s_bit_for_bit(compiled):
    _, addresses = addresses_of("random")
    table = bits((ROWS, DIM))
    gradients = np.zeros((*SHAPE, DIM), np.float32)
    for capacity in (LOOKUPS_HERE, 2):
        found, new, _ = run(
            compiled, ROWS, "fsdp 8", capacity, table, addresses, gradients, apply=False
        )
        np.testing.assert_array_equal(found.view(np.uint32), table[addresses].view(np.uint32))
        np.testing.assert_array_equal(new[:ROWS].view(np.uint32), table.view(np.uint32))


def test_nothing_is_applied_unless_asked(compiled):
    _, addresses = addresses_of("random")
    table = np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32)
    poison = np.full((*SHAPE, DIM), np.nan, np.float32)
    _, new, _ = run(compiled, ROWS, "fsdp 8", 2, table, addresses, poison, apply=False)
    np.testing.assert_array_equal(new[:ROWS], table)


def test_orders_are_each_other_s_inverse():
    mesh = make_mesh(MESHES["fsdp 8"])
    layout = TableLayout(ROWS, mesh.size)
    natural = np.arange(layout.stored * 2, dtype=np.float32).reshape(-1, 2)
    there = jax.device_put(natural, NamedSharding(mesh, ROW_SHARDED))
    stored = stored_order(mesh, layout, there)
    index = np.arange(layout.stored)
    expected = np.empty_like(natural)
    expected[index % 8 * layout.rows_per_device + index // 8] = natural
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(natural_order(mesh, layout, stored), natural)


def parts(exchange, table, addresses, gradients):
    """All that an exchange does, and what lies between: to be looked at without running it."""
    stored = stored_order(exchange.mesh, exchange.layout, table)
    plan = exchange.plan(addresses)
    found = exchange.fetch(stored, addresses, plan, jnp.bfloat16)
    sent = exchange.send(gradients, plan)
    now = jnp.float32(0.5), jnp.bool_(True), (jnp.float32(4),)
    new = exchange.apply(subtract, stored, plan, sent, *now)
    return plan, found, sent, new, natural_order(exchange.mesh, exchange.layout, new[0])


def shapes(exchange):
    rows = jax.ShapeDtypeStruct((exchange.layout.stored, DIM), jnp.float32)
    gradients = jax.ShapeDtypeStruct((*SHAPE, DIM), jnp.bfloat16)
    return rows, jax.ShapeDtypeStruct(SHAPE, jnp.int32), gradients


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
def test_types_do_not_follow_those_of_the_surroundings(devices, x64):
    """Numbers of rows and counts are int32, also where JAX computes in 64 bits; sums are float32
    and what is fetched has the asked type."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    exchange = Exchange(mesh, TableLayout(ROWS, devices), 2)
    with jax.enable_x64(x64):
        plan, found, sent, new, natural = jax.eval_shape(
            lambda *given: parts(exchange, *given), *shapes(exchange)
        )
    whole = [*jax.tree.leaves(plan), sent.arrived.addresses, sent.arrived.count, sent.touched]
    assert {x.dtype.name for x in [*whole, new[1]]} == {"int32"}
    real = [sent.sums, sent.arrived.values, sent.squares, new[0], natural]
    assert {x.dtype.name for x in real} == {"float32"}
    assert (found.dtype, found.shape) == (jnp.bfloat16, (*SHAPE, DIM))
    assert natural.shape == new[0].shape == (exchange.layout.stored, DIM)
    with jax.enable_x64(x64):
        program = str(jax.make_jaxpr(lambda *given: parts(exchange, *given))(*shapes(exchange)))
    sent = [line.split(" = ")[0] for line in program.splitlines() if " = all_to_all" in line]
    assert bool(sent) == (devices > 1)
    assert all(re.search(r":(i32|f32|u16)\[", line) for line in sent), sent  # u16: bits of bfloat16


def wide(jaxpr):
    """What is 64 bits wide in a program, besides the inside of JAX's argsort and single numbers."""
    for equation in jaxpr.eqns:
        if equation.params.get("name") == "argsort":
            continue
        for out in equation.outvars:
            if out.aval.shape and out.aval.dtype.itemsize == 8:
                yield f"{equation.primitive} -> {out.aval}"
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)  # open, or closed over constants
            if hasattr(inner, "eqns"):
                yield from wide(inner)


def test_nothing_is_computed_in_64_bits():
    """Where JAX would by default: a TPU has no 64-bit integers."""
    exchange = Exchange(make_mesh(MeshConfig()), TableLayout(ROWS, 8), 2)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(lambda *given: parts(exchange, *given))(*shapes(exchange))
        assert list(wide(jax.make_jaxpr(lambda: jnp.arange(3) + 1)().jaxpr))  # it is seen
    assert list(wide(program.jaxpr)) == []


def fetched(table, addresses, dtype):
    """Rows of a table [ROWS, DIM] as 8 devices get them in `dtype`."""
    mesh = make_mesh(MeshConfig())
    exchange = Exchange(mesh, TableLayout(ROWS, 8), 2)
    padded = np.zeros((exchange.layout.stored, DIM), np.float32)
    padded[:ROWS] = table
    ids = placed(exchange, addresses.astype(np.int32), LOOKUPS)

    @jax.jit
    def fetch(table, ids):
        stored = stored_order(mesh, exchange.layout, table)
        return exchange.fetch(stored, ids, exchange.plan(ids), dtype)

    return np.asarray(fetch(placed(exchange, padded, ROW_SHARDED), ids))


def test_rows_are_rounded_to_bfloat16_at_any_magnitude():
    """To nearest, ties to even, as ml_dtypes does; normal numbers of every exponent."""
    rng = np.random.default_rng(5)
    exponents = np.resize(np.arange(-126, 128), (ROWS, DIM))
    table = np.ldexp(rng.uniform(1, 2, (ROWS, DIM)), exponents).astype(np.float32)
    table *= rng.choice([-1, 1], table.shape)
    addresses = np.resize(rng.permutation(ROWS), SHAPE)
    expected = table.astype(jnp.bfloat16)[addresses]
    found = fetched(table, addresses, jnp.bfloat16)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_rows_for_a_network_in_float64():
    _, addresses = addresses_of("random")
    table = np.random.default_rng(6).normal(size=(ROWS, DIM)).astype(np.float32)
    with jax.enable_x64(True):
        found = fetched(table, addresses, jnp.float64)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, table.astype(np.float64)[addresses])


def test_one_device_exchanges_nothing():
    """No collective in the program, no round but one, and a table is in its order already."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    exchange = Exchange(mesh, TableLayout(ROWS, 1), 2)
    program = str(jax.make_jaxpr(lambda *given: parts(exchange, *given))(*shapes(exchange)))
    assert not [word for word in ("all_to_all", "psum", "pmax", "while") if word in program]
    assert int(exchange.plan(jnp.zeros(SHAPE, jnp.int32)).rounds) == 1
    table = jnp.zeros((ROWS, DIM))
    assert natural_order(mesh, exchange.layout, table) is table
    assert stored_order(mesh, exchange.layout, table) is table
    eight = Exchange(make_mesh(MeshConfig()), TableLayout(ROWS, 8), 2)
    program = str(jax.make_jaxpr(lambda *given: parts(eight, *given))(*shapes(eight)))
    assert all(word in program for word in ("all_to_all", "psum", "pmax", "while"))
