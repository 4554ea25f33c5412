import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import AttentionConfig
from engram_jax.layers import splash
from engram_jax.layers.attention import causal_attention
from engram_jax.layers.mla import MLA
from engram_jax.sharding import sequence
from tests.layers.filled import filled
from tests.oracle.mla import attention

SMALL = AttentionConfig(heads=3, kv_lora_rank=6, nope_dim=4, rope_dim=2, v_dim=5, rope_theta=100.0)


def build(d, config, dtype="float32", seed=0, norm_eps=1e-6):
    def create():
        return MLA(
            d,
            config,
            norm_eps=norm_eps,
            init_std=0.5,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype("float64" if dtype == "float64" else "float32"),
            rngs=nnx.Rngs(seed),
        )

    return filled(create, seed)


@jax.jit
def forward(module, x, positions, segments):
    return module(x, positions, segments)


def inputs(shape, seed=0, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def single_document(batch, length):
    return jnp.tile(jnp.arange(length), (batch, 1)), jnp.ones((batch, length), jnp.int32)


def test_golden_output_and_every_gradient(golden):
    data = golden("deepseek_v3_mla")
    config = AttentionConfig(
        heads=int(data["heads"]),
        kv_lora_rank=int(data["kv_lora_rank"]),
        nope_dim=int(data["nope"]),
        rope_dim=int(data["rope"]),
        v_dim=int(data["v_head_dim"]),
        rope_theta=float(data["rope_theta"]),
    )
    names = {
        "q_proj": "q_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
        "kv_norm.gain": "kv_a_layernorm",
        "kv_b_proj": "kv_b_proj",
        "o_proj": "o_proj",
    }
    with jax.enable_x64():
        module = build(data["x"].shape[-1], config, "float64", norm_eps=float(data["norm_eps"]))
        assert module.scale == pytest.approx(float(data["softmax_scale"]), rel=1e-15)
        graphdef, params = nnx.split(module, nnx.Param)
        flat = dict(nnx.to_flat_state(params))
        paths = {".".join(path): path for path in flat}
        assert set(paths) == set(names)
        for ours, theirs in names.items():
            flat[paths[ours]].set_value(jnp.asarray(data[f"param.{theirs}.weight"].T))
        x = jnp.asarray(data["x"])
        where = single_document(*x.shape[:2])

        @jax.jit
        def run(params, x, cotangent):
            y, pull = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, *where), params, x)
            return y, *pull(cotangent)

        y, grads, grad_x = run(params, x, jnp.asarray(data["cotangent"]))
        grads = dict(nnx.to_flat_state(grads))
        pairs = [(y, data["output"]), (grad_x, data["grad_x"])]
        for ours, theirs in names.items():
            pairs.append((grads[paths[ours]].get_value(), data[f"grad.{theirs}.weight"].T))
        for got, want in pairs:
            # The reference's RoPE tables and softmax are float32: 1e-6 of the largest entry.
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("length", [1, 3, 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_the_oracle_over_documents_and_padding(length, seed):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    segments[:, length - length // 4 :] = 0
    positions = np.stack([[int((s[:t] == s[t]).sum()) for t in range(length)] for s in segments])
    with jax.enable_x64():
        module = build(7, SMALL, "float64", seed)
        x = inputs((2, length, 7), seed)
        y = forward(module, x, jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))
        weights = {
            name: np.asarray(getattr(module, name)[...])
            for name in ("q_proj", "kv_a_proj", "kv_b_proj", "o_proj")
        }
    weights["kv_norm"] = np.asarray(module.kv_norm.gain[...])
    for b in range(2):
        want = attention(
            np.asarray(x[b]),
            positions[b],
            segments[b],
            weights,
            heads=3,
            nope=4,
            rope=2,
            value=5,
            theta=100.0,
            eps=1e-6,
        )
        np.testing.assert_allclose(y[b], want, rtol=3e-6, atol=3e-6)


def test_packed_documents_equal_the_documents_alone():
    lengths = [5, 1, 7]
    with jax.enable_x64():
        module = build(8, SMALL, "float64")
        documents = [inputs((1, n, 8), n) for n in lengths]
        alone = [forward(module, x, *single_document(1, x.shape[1])) for x in documents]
        positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
        segments = jnp.repeat(jnp.arange(1, 4), jnp.asarray(lengths))[None]
        packed = forward(module, jnp.concatenate(documents, 1), positions, segments)
        np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), rtol=1e-12, atol=1e-12)


def test_no_gradient_from_later_tokens_or_other_documents():
    module = build(8, SMALL)
    x = inputs((1, 9, 8), dtype="float32")
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    jacobian = jax.jit(jax.jacrev(lambda x: module(x, positions, segments)))(x)
    touched = np.abs(np.asarray(jacobian)).sum(axis=(0, 2, 3, 5)) > 0  # [T out, T in]
    index = np.arange(9)
    want = (segments[0][:, None] == segments[0]) & (index[:, None] >= index)
    np.testing.assert_array_equal(touched, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_prefill_and_decode_equal_the_full_forward(dtype, tolerance):
    """Rows of different lengths: a ragged prefill, a ragged second chunk, then token by token."""
    lengths, prompts, second = np.array([11, 4, 7]), np.array([5, 3, 1]), np.array([2, 1, 4])
    capacity = 12
    with jax.enable_x64(dtype == "float64"):
        module = build(8, SMALL, dtype)
        x = inputs((3, 11, 8), dtype=dtype)
        full = np.asarray(forward(module, x, *single_document(3, 11)))
        step = jax.jit(lambda *args: module.cached(*args))
        cache = module.init_cache(3, capacity)
        done = np.zeros(3, int)
        for counts in [prompts, second, *np.ones((9, 3), int)]:
            counts = np.minimum(counts, lengths - done)
            if not counts.any():
                break
            width = counts.max()
            columns = done[:, None] + np.arange(width)
            real = np.arange(width) < counts[:, None]
            chunk = x[np.arange(3)[:, None], np.where(real, columns, 0)]
            positions = np.where(real, columns, capacity + np.arange(width))
            y, cache = step(chunk, jnp.asarray(positions, jnp.int32), cache)
            assert y.dtype == dtype
            for b in range(3):
                np.testing.assert_allclose(
                    y[b, : counts[b]],
                    full[b, done[b] : done[b] + counts[b]],
                    rtol=tolerance,
                    atol=tolerance,
                )
            done += counts
        np.testing.assert_array_equal(done, lengths)
        for b in range(3):  # padding has written nothing
            assert not np.asarray(cache.latent)[b, lengths[b] :].any()
            assert not np.asarray(cache.key_rope)[b, lengths[b] :].any()
            assert np.asarray(cache.latent)[b, : lengths[b]].all()


def test_bfloat16_compute_keeps_float32_parameters_and_softmax():
    module, exact = build(32, SMALL, "bfloat16"), build(32, SMALL, "float32")
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(module, nnx.Param)))
    x = inputs((2, 40, 32), dtype="float32")
    where = single_document(2, 40)
    y, want = forward(module, x, *where), np.asarray(forward(exact, x, *where))
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(y) - want) < 0.02 * np.linalg.norm(want)
    jaxpr = str(jax.make_jaxpr(lambda x: module(x, *where))(x))
    exponentials = [line for line in jaxpr.splitlines() if " exp " in line]
    assert exponentials
    assert all(":f32[" in line for line in exponentials)


@pytest.mark.parametrize("part", [1, 3, 5])
def test_queries_cut_in_parts_give_the_same(part, monkeypatch):
    """What long sequences do, forward and backward, at a length the oracle checks uncut."""
    module = build(7, SMALL)
    x = inputs((2, 11, 7), dtype="float32")
    positions, _ = single_document(2, 11)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, 11)), axis=1))

    def run(x):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(module(x, positions, segments) ** 2)))(
            x
        )

    whole = run(x)
    monkeypatch.setattr("engram_jax.layers.attention.PART", part)
    cut = run(x)
    np.testing.assert_allclose(cut[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(cut[1], whole[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2], ids=["whole", "cut"])
def test_the_kernel_for_tpus_is_the_same_attention(shards):
    """Its program interpreted on a CPU, at several tiles, documents across their edges: output and
    all three gradients. With cut sequences, every device has its queries and all keys, whose
    gradients add up: chunks of one tile, of which the devices visit 1 + 4 and 2 + 3."""
    length, rng = 2 * shards * splash.BLOCK, np.random.default_rng(0)
    config = AttentionConfig(heads=2, nope_dim=16, rope_dim=8, v_dim=12, kv_lora_rank=6)
    module = build(7, config)
    query, keys = (jnp.asarray(rng.normal(size=(1, length, 2, 24)), jnp.float32) for _ in "qk")
    values = jnp.asarray(rng.normal(size=(1, length, 2, 12)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(1, length, 2, 12)), jnp.float32)
    ends = np.array([0, 3, 300, 301, 700, 1000, 1500])
    segments = jnp.asarray(np.searchsorted(ends, np.arange(length))[None], jnp.int32)
    assert splash.usable(length) and not splash.usable(length + 128)

    def differentiate(attend):
        def f(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(out * weights), out

        return jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(query, keys, values)

    def kernel(query, keys, values):
        def on_device(own):
            query, segments_here, device = own
            how = {"device": device, "shards": shards, "interpret": True}
            both = segments_here, segments
            return splash.attention(query, keys, values, *both, module.scale, **how)

        cut = [
            sequence.device_order(x, shards).reshape(1, shards, length // shards, *x.shape[2:])
            for x in (query, segments)
        ]
        own = *(x.swapaxes(0, 1) for x in cut), jnp.arange(shards)
        out = jax.lax.map(on_device, own).swapaxes(0, 1)
        return sequence.natural_order(out.reshape(1, length, *out.shape[3:]), shards)

    (_, ours), grads = differentiate(kernel)
    (_, plain), expected = differentiate(
        lambda *qkv: causal_attention(*qkv, segments, module.scale)
    )
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    for one, other in zip(grads, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
