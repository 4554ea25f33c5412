import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import FeedForwardConfig
from engram_jax.layers.moe import MoE, RouterBias, updated_bias
from tests.layers.filled import filled
from tests.oracle.moe import moe

SMALL = FeedForwardConfig(
    routed_experts=7, shared_experts=2, top_k=3, expert_dim=5, routed_scaling=1.7
)


def build(d, config, dtype="float32", seed=0, std=0.5):
    def create():
        return MoE(
            d,
            config,
            init_std=0.02,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype("float64" if dtype == "float64" else "float32"),
            rngs=nnx.Rngs(0),
        )

    module = filled(create, seed, std)
    bias = np.random.default_rng(seed + 1).normal(0, 0.3, config.routed_experts)
    module.router_bias.set_value(jnp.asarray(bias, jnp.float32))
    return module


@jax.jit
def forward(module, x, segments):
    return module(x, segments)


def numbers(variable):
    return np.asarray(variable[...], np.float64)


def test_golden_output_and_every_gradient(golden):
    data = golden("deepseek_v3_moe")
    width = data["param.experts.down_proj"].shape[2]
    config = FeedForwardConfig(
        routed_experts=len(data["correction_bias"]),
        shared_experts=data["param.shared_experts.up_proj.weight"].shape[0] // width,
        top_k=int(data["top_k"]),
        expert_dim=width,
        routed_scaling=float(data["routed_scaling_factor"]),
        normalise_top_k=bool(data["normalise_topk"]),
    )

    def ours(kind):
        """The reference keeps [out, in], and gate above up in one array."""
        both = data[f"{kind}.experts.gate_up_proj"]
        return {
            "router": data[f"{kind}.gate.weight"].T,
            "gate": both[:, :width].swapaxes(1, 2),
            "up": both[:, width:].swapaxes(1, 2),
            "down": data[f"{kind}.experts.down_proj"].swapaxes(1, 2),
            "shared.gate": data[f"{kind}.shared_experts.gate_proj.weight"].T,
            "shared.up": data[f"{kind}.shared_experts.up_proj.weight"].T,
            "shared.down": data[f"{kind}.shared_experts.down_proj.weight"].T,
        }

    with jax.enable_x64():
        x = jnp.asarray(data["x"])
        module = build(x.shape[-1], config, "float64")
        module.router_bias.set_value(jnp.asarray(data["correction_bias"], jnp.float32))
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        flat = {".".join(path): leaf for path, leaf in nnx.to_flat_state(params)}
        assert set(flat) == set(ours("param"))
        for name, value in ours("param").items():
            flat[name].set_value(jnp.asarray(value))
        segments = jnp.ones(x.shape[:2], jnp.int32)

        @jax.jit
        def run(params, x, cotangent):
            def call(params, x):
                return nnx.merge(graphdef, params, rest)(x, segments)

            y, pull, load = jax.vjp(call, params, x, has_aux=True)
            return y, load, *pull(cotangent)

        y, load, grads, grad_x = run(params, x, jnp.asarray(data["cotangent"]))
        chosen, weights = module.route(x.reshape(-1, x.shape[-1]))
        grads = {".".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(grads)}

    order = np.argsort(chosen, axis=1)
    want_order = np.argsort(data["topk_indices"], axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(chosen), order, 1),
        np.take_along_axis(data["topk_indices"], want_order, 1),
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights), order, 1),
        np.take_along_axis(data["topk_weights"], want_order, 1),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(load, np.bincount(data["topk_indices"].ravel(), minlength=8))
    pairs = {name: (grads[name], want) for name, want in ours("grad").items()}
    pairs |= {"output": (y, data["output"]), "x": (grad_x, data["grad_x"])}
    for name, (got, want) in pairs.items():
        # The reference's router runs in float32: 1e-6 of the largest entry.
        atol = 1e-6 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("shared", [0, 2])
def test_matches_the_oracle(normalise, shared):
    config = FeedForwardConfig(
        routed_experts=7,
        shared_experts=shared,
        top_k=3,
        expert_dim=5,
        routed_scaling=1.7,
        normalise_top_k=normalise,
    )
    x = np.random.default_rng(5).normal(size=(2, 9, 6))
    with jax.enable_x64():
        module = build(6, config, "float64")
        y, load = forward(module, jnp.asarray(x), jnp.ones((2, 9), jnp.int32))
        want, chosen = moe(
            x.reshape(-1, 6),
            numbers(module.router),
            numbers(module.router_bias),
            [numbers(m) for m in (module.gate, module.up, module.down)],
            top_k=3,
            normalise=normalise,
            scaling=1.7,
            shared=[numbers(m) for m in (module.shared.gate, module.shared.up, module.shared.down)]
            if shared
            else None,
        )
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 6), want, rtol=0, atol=1e-12)
    assert load.dtype == jnp.float32
    np.testing.assert_array_equal(load, np.bincount(chosen.ravel(), minlength=7))


def test_padding_is_computed_but_not_counted():
    module = build(6, SMALL)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6)), jnp.float32)
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    y_all, load_all = forward(module, x, jnp.ones_like(segments))
    y, load = forward(module, x, segments)
    np.testing.assert_array_equal(y, y_all)
    assert float(jnp.sum(load_all)) == 12 * 3
    assert float(jnp.sum(load)) == 6 * 3
    real = x.reshape(-1, 6)[np.flatnonzero(np.asarray(segments))]
    chosen, _ = module.route(real)
    np.testing.assert_array_equal(load, np.bincount(np.ravel(chosen), minlength=7))


def test_the_bias_selects_without_weighting():
    module = build(6, SMALL)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 6)), jnp.float32)
    module.router_bias.set_value(jnp.zeros(7).at[jnp.asarray([1, 4, 6])].set(10.0))
    chosen, weights = module.route(x)
    np.testing.assert_array_equal(np.sort(chosen, axis=1), np.tile([1, 4, 6], (20, 1)))
    scores = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(module.router[...])))
    want = np.take_along_axis(scores, np.asarray(chosen), 1)
    np.testing.assert_allclose(weights, 1.7 * want / want.sum(1, keepdims=True), rtol=1e-5)


def test_bias_update_moves_by_the_sign_of_the_error_and_balances():
    np.testing.assert_array_equal(
        updated_bias(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.0, 4.0, 2.0]), 0.5),
        [1.5, 1.5, 3.0],
    )
    stacked = updated_bias(jnp.zeros((2, 2)), jnp.asarray([[1.0, 3.0], [5.0, 1.0]]), 0.1)
    np.testing.assert_allclose(stacked, [[0.1, -0.1], [-0.1, 0.1]])

    module = build(16, SMALL)
    module.router_bias.set_value(jnp.asarray([0.4, 0, 0, 0, 0, 0, -0.4], jnp.float32))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 512, 16)), jnp.float32)
    ones = jnp.ones((1, 512), jnp.int32)

    spread = []
    for _ in range(150):
        load = forward(module, x, ones)[1]
        spread.append(float(jnp.max(load) / jnp.mean(load)))
        bias = updated_bias(module.router_bias[...], load, 0.01)
        module.router_bias.set_value(bias)
    assert spread[0] > 1.5
    assert spread[-1] < 1.1


def test_the_bias_is_no_parameter_and_gets_no_gradient():
    module = build(6, SMALL)
    params, bias = nnx.state(module, nnx.Param), nnx.state(module, RouterBias)
    assert len(jax.tree.leaves(bias)) == 1
    assert len(jax.tree.leaves(params)) == 7
    graphdef, state = nnx.split(module)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 8, 6)), jnp.float32)

    def loss(state):
        return jnp.sum(nnx.merge(graphdef, state)(x, jnp.ones((1, 8), jnp.int32))[0])

    grads = jax.jit(jax.grad(loss))(state)
    assert not np.any(grads["router_bias"].get_value())
    assert np.all(np.any(np.asarray(grads["router"].get_value()), axis=0))


@pytest.mark.parametrize("remat", [None, "everything", "dots"])
def test_stacked_layers_scan_differentiate_and_rematerialise(remat):
    """As the model runs it: stacked by vmap, run by scan, with and without rematerialisation."""

    @nnx.vmap(in_axes=0)
    def create(rngs):
        kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        return MoE(6, SMALL, init_std=0.5, rngs=rngs, **kinds)

    stack = create(nnx.Rngs(0).split(3))
    graphdef, state = nnx.split(stack)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 8, 6)), jnp.float32)
    ones = jnp.ones((2, 8), jnp.int32)

    def layer(x, state):
        y, load = nnx.merge(graphdef, state)(x, ones)
        return x + y, load

    def unrolled(state, x):
        loads = []
        for i in range(3):
            x, load = layer(x, jax.tree.map(lambda a, i=i: a[i], state))
            loads.append(load)
        return jnp.sum(x**2), jnp.stack(loads)

    body = layer
    if remat:
        policy = jax.checkpoint_policies.dots_saveable if remat == "dots" else None
        body = jax.checkpoint(layer, policy=policy)

    def scanned(state, x):
        y, loads = jax.lax.scan(body, x, state)
        return jnp.sum(y**2), loads

    want, got = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(state, x) for f in (unrolled, scanned)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
