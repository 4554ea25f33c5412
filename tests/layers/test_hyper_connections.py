import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import HyperConnectionConfig
from engram_jax.layers.hyper_connections import HyperConnection, collapse, expand
from tests.layers.filled import filled
from tests.oracle import hyper_connections as oracle

PAPER = HyperConnectionConfig()
V4 = HyperConnectionConfig(transpose=True, norm_gain=False, start="uniform", scale_init=1.0)


def build(d, config, home=0, dtype="float32"):
    return HyperConnection(d, config, home, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


@jax.jit
def around(module, x, y):
    """Streams and a given sub-layer output -> (what the sub-layer reads, streams after it)."""
    collapsed, mixing = module.pre(x)
    return collapsed, module.merge(mixing, y), mixing.post, mixing.res


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_golden_output_and_every_gradient(golden):
    """DeepSeek-V4's hyper-connection in float64."""
    data = golden("mhc")
    config = dataclasses.replace(
        V4,
        streams=data["streams"].shape[2],
        sinkhorn_iterations=int(data["sinkhorn_iters"]),
        eps=float(data["eps"]),
    )
    names = {"fn": lambda a: a.T, "base": np.asarray, "scale": np.asarray}
    with jax.enable_x64():
        module = filled(lambda: build(data["streams"].shape[3], config, dtype="float64"))
        graphdef, params = nnx.split(module)
        assert set(params) == set(names)
        for name, ours in names.items():
            params[name].set_value(jnp.asarray(ours(data[f"param.{name}"])))

        @jax.jit
        def run(params, x, y, cotangents):
            def call(params, x, y):
                collapsed, after, post, res = around(nnx.merge(graphdef, params), x, y)
                return (collapsed, after), (post, res)

            outputs, pull, coefficients = jax.vjp(call, params, x, y, has_aux=True)
            return outputs, coefficients, pull(cotangents)

        cotangents = tuple(
            jnp.asarray(data[f"cotangent_{name}"]) for name in ("collapsed", "output")
        )
        x, y = jnp.asarray(data["streams"]), jnp.asarray(data["sublayer_output"])
        (collapsed, after), (post, res), (grads, grad_x, grad_y) = run(params, x, y, cotangents)
        pairs = {
            "collapsed": (collapsed, data["collapsed"]),
            "output": (after, data["output"]),
            "post": (post, data["post"]),
            "comb": (res.swapaxes(-1, -2), data["comb"]),
            "grad_streams": (grad_x, data["grad_streams"]),
            "grad_sublayer_output": (grad_y, data["grad_sublayer_output"]),
        }
        for name, ours in names.items():
            pairs[f"grad.{name}"] = (grads[name].get_value(), ours(data[f"grad.{name}"]))
        for name, (got, want) in pairs.items():
            atol = 1e-11 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=atol, err_msg=name)


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("norm_gain", [False, True])
def test_matches_the_oracle(streams, transpose, norm_gain):
    n, d = streams, 6
    config = HyperConnectionConfig(
        streams=n, transpose=transpose, norm_gain=norm_gain, sinkhorn_iterations=5
    )
    x, y = normal(2, 3, n, d), normal(2, 3, d, seed=1)
    with jax.enable_x64():
        module = filled(lambda: build(d, config, dtype="float64"))
        fn, base, scale = (np.asarray(p[...]) for p in (module.fn, module.base, module.scale))
        gain = np.asarray(module.norm_gain[...]) if norm_gain else 1.0
        collapsed, after, *_ = around(module, jnp.asarray(x), jnp.asarray(y))
    for b, t in np.ndindex(2, 3):
        pre, post, mixing = oracle.coefficients(
            x[b, t], fn, base, scale, gain, iterations=5, eps=1e-6, transpose=transpose
        )
        np.testing.assert_allclose(collapsed[b, t], pre @ x[b, t], rtol=0, atol=1e-12)
        want = mixing @ x[b, t] + np.outer(post, y[b, t])
        np.testing.assert_allclose(after[b, t], want, rtol=0, atol=1e-12)


def test_every_gradient_equals_a_finite_difference():
    config = HyperConnectionConfig(streams=3, sinkhorn_iterations=4)
    with jax.enable_x64():
        graphdef, params = nnx.split(filled(lambda: build(5, config, dtype="float64")))
        inputs = (params, jnp.asarray(normal(1, 2, 3, 5)), jnp.asarray(normal(1, 2, 5, seed=1)))

        @jax.jit
        def loss(params, x, y):
            collapsed, after, post, res = around(nnx.merge(graphdef, params), x, y)
            weights = jnp.cos(jnp.arange(after.size).reshape(after.shape))
            total = jnp.sum(after * weights) + jnp.sum(collapsed**2)
            return total + jnp.sum(post * weights[..., 0]) + jnp.sum(res**3)

        leaves, tree = jax.tree.flatten(inputs)
        grads = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs))
        for i, grad in enumerate(grads):
            direction = jnp.asarray(normal(*grad.shape, seed=i))
            step = 1e-5

            def moved(sign, i=i, direction=direction, step=step):
                at = [a + sign * step * direction if i == j else a for j, a in enumerate(leaves)]
                return float(loss(*jax.tree.unflatten(tree, at)))

            want = (moved(1) - moved(-1)) / (2 * step)
            assert float(jnp.sum(grad * direction)) == pytest.approx(want, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("config", [PAPER, V4], ids=["paper", "v4"])
def test_mixing_is_doubly_stochastic(config):
    module = build(16, config)
    _, _, post, res = around(
        module, jnp.asarray(normal(2, 5, 4, 16), jnp.float32), jnp.zeros((2, 5, 16))
    )
    assert res.dtype == post.dtype == jnp.float32
    np.testing.assert_allclose(np.sum(res, -1), 1, atol=1e-3)
    np.testing.assert_allclose(np.sum(res, -2), 1, atol=1e-3)
    assert np.all((np.asarray(post) > 0) & (np.asarray(post) < 2))


@pytest.mark.parametrize("streams", [1, 4])
def test_identity_start_is_a_plain_residual_network(streams):
    """Equal streams stay equal, each is h + F(h), and F reads h up to a factor near one."""
    config = HyperConnectionConfig(streams=streams)
    h = np.float32(normal(2, 3, 16))
    x = expand(jnp.asarray(h), streams)
    for sublayer in range(12):
        y = np.float32(normal(2, 3, 16, seed=sublayer + 1))
        collapsed, x, post, res = around(build(16, config, sublayer), x, jnp.asarray(y))
        np.testing.assert_allclose(collapsed, h, rtol=0.02, atol=0.01)
        np.testing.assert_allclose(post, 1, atol=0.01)
        np.testing.assert_allclose(res, np.broadcast_to(np.eye(streams), res.shape), atol=0.01)
        h = h + y
        np.testing.assert_allclose(collapse(x) / streams, h, rtol=0.01, atol=0.05)
        h = np.asarray(x[..., 0, :])


def test_identity_start_reads_the_home_stream_and_keeps_streams_apart():
    x = jnp.asarray(normal(2, 3, 4, 16), jnp.float32)
    for sublayer in range(6):
        collapsed, after, *_ = around(build(16, PAPER, sublayer), x, jnp.zeros((2, 3, 16)))
        np.testing.assert_allclose(collapsed, x[..., sublayer % 4, :], atol=0.05)
        np.testing.assert_allclose(after, x, atol=0.05)


def test_uniform_start_averages():
    module = build(16, dataclasses.replace(PAPER, start="uniform"))
    x = jnp.asarray(normal(2, 3, 4, 16), jnp.float32)
    collapsed, after, *_ = around(module, x, jnp.zeros((2, 3, 16)))
    np.testing.assert_allclose(collapsed, 0.5 * np.sum(x, 2), atol=0.05)
    mean = np.broadcast_to(np.mean(x, 2, keepdims=True), x.shape)
    np.testing.assert_allclose(after, mean, atol=0.05)


def test_home_may_be_traced():
    @nnx.vmap(in_axes=(0, 0))
    def create(rngs, home):
        return build_with(rngs, home)

    def build_with(rngs, home):
        return HyperConnection(8, PAPER, home, param_dtype=jnp.float32, rngs=rngs)

    stacked = create(nnx.Rngs(0).split(6), jnp.arange(6))
    for sublayer in range(6):
        one = build(8, PAPER, sublayer)
        np.testing.assert_array_equal(stacked.base[...][sublayer], one.base[...])
    assert not np.array_equal(stacked.fn[...][0], stacked.fn[...][1])


def test_bfloat16_streams_have_float32_coefficients():
    module = build(32, V4)
    x32 = jnp.asarray(normal(1, 4, 4, 32), jnp.bfloat16).astype(jnp.float32)
    y32 = jnp.asarray(normal(1, 4, 32, seed=1), jnp.bfloat16).astype(jnp.float32)
    want = around(module, x32, y32)
    got = around(module, x32.astype(jnp.bfloat16), y32.astype(jnp.bfloat16))
    assert [a.dtype for a in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    for a, b in zip(got[2:], want[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=2**-8, atol=1e-6)


def test_expand_and_collapse():
    x = jnp.asarray(normal(2, 3, 5), jnp.float32)
    streams = expand(x, 4)
    assert streams.shape == (2, 3, 4, 5)
    np.testing.assert_array_equal(streams, np.stack([x] * 4, axis=2))
    np.testing.assert_array_equal(collapse(streams), 4 * x)
