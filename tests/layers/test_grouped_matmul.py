import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.layers import grouped_matmul, grouped_routing
from engram_jax.layers.grouped_matmul import CHUNKED, RAGGED, TILED, routed_swiglu
from engram_jax.layers.grouped_routing import sort_by_expert
from tests.oracle.moe import swiglu

T, K, D, F, E = 50, 3, 6, 4, 5
ROUTINGS = {
    "random": lambda rng: np.argsort(rng.random((T, E)), axis=1)[:, :K],
    "one expert gets a choice of every token": lambda rng: np.tile([4, 0, 1], (T, 1)),
    "all on one expert": lambda rng: np.full((T, K), 2),
    "all on the last expert": lambda rng: np.full((T, K), E - 1),
    "most experts empty": lambda rng: rng.choice([1, 3], (T, K)),
    "skewed": lambda rng: np.minimum(rng.geometric(0.6, (T, K)) - 1, E - 1),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (T, D), "weights": (T, K), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}, rng


def oracle(experts, x, weights, gate, up, down):
    y = np.zeros_like(x)
    for t in range(T):
        for j, e in enumerate(experts[t]):
            y[t] += weights[t, j] * swiglu(x[t], gate[e], up[e], down[e])
    return y


def dense(experts, x, weights, gate, up, down):
    """Every expert on every token, then a masked sum: its autodiff is compared with ours."""
    h = jax.nn.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
    mask = jax.nn.one_hot(experts, E, dtype=x.dtype)
    return jnp.einsum("tk,tke,tef,efd->td", weights, mask, h, down)


@pytest.mark.parametrize("case", ROUTINGS)
def test_sorting_groups_the_slots_by_expert_and_inverts(case):
    _, rng = arrays()
    experts = ROUTINGS[case](rng)
    routing = jax.tree.map(np.asarray, sort_by_expert(jnp.asarray(experts, jnp.int32), E))
    np.testing.assert_array_equal(routing.order, np.argsort(experts.ravel(), kind="stable"))
    np.testing.assert_array_equal(routing.order[routing.slots.ravel()], np.arange(T * K))
    np.testing.assert_array_equal(routing.sizes, np.bincount(experts.ravel(), minlength=E))


PATHS = {  # path and chunk of routed_swiglu
    "tiled": (TILED, None),
    "ragged": (RAGGED, None),
    "chunked": (CHUNKED, 7),
    "one chunk": (CHUNKED, T * K),
    "tiled, keeping nothing": (TILED, 7),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ROUTINGS)
@pytest.mark.parametrize("first", [0, 3], ids=["all experts", "experts 3 and 4 only"])
def test_every_routing_is_exact_forward_and_backward(case, path, first):
    """first: the experts from there on are this device's; what the others get belongs to none."""
    check(case, first, *PATHS[path])


def check(case, first, path, chunk):
    values, rng = arrays()
    experts = ROUTINGS[case](rng)
    with jax.enable_x64():
        inputs = {name: jnp.asarray(v) for name, v in values.items()}
        cotangent = jnp.asarray(rng.normal(size=(T, D)))
        ids = jnp.asarray(experts, jnp.int32)

        @jax.jit
        def run(inputs, ids, cotangent):
            count = E - first
            routing = sort_by_expert(jnp.where(ids < first, count, ids - first), count + 1)
            routing = routing.first(count) if first else sort_by_expert(ids, E)

            def ours(a):
                matrices = (a[name][first:] for name in ("gate", "up", "down"))
                return routed_swiglu(a["x"], a["weights"], routing, *matrices, path, chunk)

            def plain(a):
                return dense(ids, **{**a, "weights": jnp.where(ids < first, 0, a["weights"])})

            y, pull = jax.vjp(ours, inputs)
            _, pull_dense = jax.vjp(plain, inputs)
            return y, pull(cotangent)[0], pull_dense(cotangent)[0]

        y, grads, want = run(inputs, ids, cotangent)
    here = {**values, "weights": np.where(experts < first, 0, values["weights"])}
    np.testing.assert_allclose(y, oracle(experts, **here), rtol=0, atol=1e-12)
    for name in values:
        np.testing.assert_allclose(grads[name], want[name], rtol=0, atol=1e-12, err_msg=name)


UNDEFINED = {n: PATHS[n] for n in ("ragged", "chunked", "one chunk")}
UNDEFINED["ragged, keeping nothing"] = (RAGGED, 7)


@pytest.mark.parametrize("path", UNDEFINED)
@pytest.mark.parametrize("case", ["random", "all on one expert"])
@pytest.mark.parametrize("first", [0, 3], ids=["all experts", "experts 3 and 4 only"])
def test_what_ragged_dot_leaves_undefined_reaches_nothing(case, path, first, monkeypatch):
    """On a CPU it leaves zeros; here NaN, as memory that nobody wrote may hold: behind the last
    group, in sums over no rows, and in every sum if what was left behind the last group gets into
    one."""
    product, general = jax.lax.ragged_dot, jax.lax.ragged_dot_general

    def behind(rows, sizes):
        return (jnp.arange(len(rows)) >= jnp.sum(sizes))[:, None]

    def poisoned(rows, matrices, sizes):
        return jnp.where(behind(rows, sizes), jnp.nan, product(rows, matrices, sizes))

    def poisoned_sums(rows, drows, sizes, dimensions):
        sums = general(rows, drows, sizes, dimensions)
        for x in (rows, drows):
            sums = sums + 0 * jnp.sum(jnp.where(behind(x, sizes), x, 0))
        return jnp.where(sizes[:, None, None] > 0, sums, jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", poisoned)
    monkeypatch.setattr(jax.lax, "ragged_dot_general", poisoned_sums)
    check(case, first, *UNDEFINED[path])


@pytest.mark.parametrize("tokens", [1, 2, 31, 130])
def test_any_number_of_tokens(tokens):
    """Decoding has fewer slots than a tile; 130 x 3 slots end inside one."""
    values, rng = arrays()
    x, weights = rng.normal(size=(tokens, D)), rng.normal(size=(tokens, K))
    experts = rng.integers(0, E, (tokens, K))
    with jax.enable_x64():
        matrices = [jnp.asarray(values[name]) for name in ("gate", "up", "down")]
        routing = sort_by_expert(jnp.asarray(experts, jnp.int32), E)
        run = jax.jit(routed_swiglu, static_argnums=6)
        y = run(jnp.asarray(x), jnp.asarray(weights), routing, *matrices, TILED)
    want = sum(
        weights[:, j, None]
        * np.stack(
            [
                swiglu(x[t], *(values[name][experts[t, j]] for name in ("gate", "up", "down")))
                for t in range(tokens)
            ]
        )
        for j in range(K)
    )
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_bfloat16_sums_weight_gradients_in_float32():
    """One expert, many tiles: in bfloat16 a sum stops growing after 256 equal terms."""
    tokens = 4096
    x = jnp.ones((tokens, 2), jnp.bfloat16)
    one = jnp.ones((1, 2, 2), jnp.bfloat16)
    routing = sort_by_expert(jnp.zeros((tokens, 1), jnp.int32), 1)
    weights = jnp.ones((tokens, 1), jnp.float32)

    def total(down):
        return jnp.sum(routed_swiglu(x, weights, routing, one, one, down, TILED), dtype=jnp.float32)

    h = float(jnp.bfloat16(float(jax.nn.silu(jnp.bfloat16(2.0))) * 2.0))
    grad = np.float32(jax.jit(jax.grad(total))(one))
    np.testing.assert_allclose(grad, tokens * h, rtol=2**-7)


def test_the_path_follows_the_platform_it_is_lowered_for():
    values, rng = arrays()
    args = [jnp.asarray(values[n], jnp.float32) for n in ("x", "weights", "gate", "up", "down")]
    experts = jnp.asarray(rng.integers(0, E, (T, K)), jnp.int32)

    def loss(x, weights, gate, up, down):
        return jnp.sum(routed_swiglu(x, weights, sort_by_expert(experts, E), gate, up, down))

    def text(platform):
        traced = jax.jit(jax.grad(loss, argnums=(0, 2, 3, 4))).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "ragged" in text("tpu")
    assert "while" not in text("tpu")
    assert "ragged" not in text("cpu")
    assert "while" in text("cpu")


def test_large_key_space_falls_back_to_a_stable_argsort(monkeypatch):
    """Where count * N does not fit into an int32 key; the limit is lowered to see that branch."""
    _, rng = arrays()
    experts = jnp.asarray(ROUTINGS["random"](rng), jnp.int32)
    want = sort_by_expert(experts, E)
    monkeypatch.setattr(grouped_routing, "LARGEST_KEY", E * T * K - 1)
    jaxpr = str(jax.make_jaxpr(lambda e: sort_by_expert(e, E))(experts))
    assert "argsort" in jaxpr
    for a, b in zip(*map(jax.tree.leaves, (sort_by_expert(experts, E), want)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_token_s_gradient_is_rounded_once():
    """1 + 2^-7 and seven times 2^-8: a sum in bfloat16 would lose or double each of the latter."""
    k, d = 8, 4
    routing = sort_by_expert(jnp.arange(k, dtype=jnp.int32)[None], k)
    parts = np.array([1 + 2**-7] + [2**-8] * (k - 1), np.float32)
    dx = jnp.broadcast_to(jnp.asarray(parts, jnp.bfloat16)[:, None], (k, d))
    found, *_ = grouped_matmul._by_slots_backward(
        lambda *_: (dx, jnp.zeros(k)), None, None, routing, None
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.full((1, d), parts.sum(), jnp.bfloat16))
