"""The Engram module against the three published implementations' numbers, forward and backward."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engram_jax.config import PAPER, QWEN, V41, EngramConfig
from engram_jax.layers.engram import Engram
from engram_jax.memory.row_gradients import deduplicate
from tests.oracle import engram_gate as gate_oracle
from tests.oracle import fp8
from tests.oracle.released_fp8 import dequantise_blocks, dequantise_rows

GOLDEN = Path(__file__).parent.parent / "golden"


def load(name):
    with np.load(GOLDEN / name) as file:
        return dict(file)


def build(config, d_model, streams, norm_eps, dtype):
    return Engram(
        d_model,
        streams,
        config,
        norm_eps=norm_eps,
        init_std=0.02,
        dtype=dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )


def relative(ours, theirs):
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def run(module, table, addresses, streams, cotangent):
    """Output and gradients for module, table rows and streams, through `memory`'s retrieval."""
    graphdef, params = nnx.split(module)
    segments = jnp.ones(streams.shape[:2], jnp.int32)

    def forward(params, rows, streams):
        return nnx.merge(graphdef, params)(rows, streams, segments)[0]

    rows = table[addresses]
    output, pullback = jax.vjp(forward, params, rows, streams)
    grad_params, grad_rows, grad_streams = pullback(cotangent)
    unique = deduplicate(addresses, grad_rows)
    grad_table = jnp.zeros_like(table).at[unique.addresses].add(unique.values, mode="drop")
    return output, nnx.to_pure_dict(grad_params), grad_table, grad_streams


def demo_parameters(golden, prefix):
    """The demo's tensors in our layout: {our path: array}."""
    tensor = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    streams = golden["hidden_states"].shape[2]
    projections = [f"key_projs.{m}" for m in range(streams)] + ["value_proj"]

    def stack(names):
        return np.stack([tensor[n] for n in names])

    conv = tensor["short_conv.conv.weight"][:, 0]  # [M * d, kernel]
    return {
        "projection": stack(f"{p}.weight" for p in projections).transpose(2, 0, 1),
        "bias": stack(f"{p}.bias" for p in projections),
        "key_norm": {"gain": stack(f"norm1.{m}.weight" for m in range(streams))},
        "query_norm": {"gain": stack(f"norm2.{m}.weight" for m in range(streams))},
        "conv": {
            "norm": {"gain": stack(f"short_conv.norms.{m}.weight" for m in range(streams))},
            "taps": conv.T.reshape(conv.shape[1], streams, -1),
        },
    }


def assert_tree_close(ours, theirs, tolerance, path=""):
    assert set(ours) == set(theirs), (path, set(ours) ^ set(theirs))
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_tree_close(ours[key], value, tolerance, f"{path}.{key}")
        else:
            error = relative(ours[key], value)
            assert error < tolerance, f"{path}.{key}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("dtype", "output_tolerance", "gradient_tolerance"),
    [("float64", 1e-12, 1e-6), ("float32", 1e-6, 1e-5)],
)
def test_paper_form_equals_the_official_demo(dtype, output_tolerance, gradient_tolerance):
    """float64 row gradients pass through the float32 of `deduplicate`, hence their 1e-6."""
    golden = load("module_demo.npz")
    with jax.enable_x64(dtype == "float64"):
        sizes = golden["head_sizes"]
        offsets = np.concatenate([[0], np.cumsum(sizes.reshape(-1))[:-1]])
        addresses = jnp.asarray(golden["hash_ids"] + offsets, jnp.int32)
        table = jnp.asarray(golden["param.multi_head_embedding.embedding.weight"], dtype)
        config = EngramConfig(layers=(1,), heads_per_order=4, d_mem=64, form=PAPER)
        module = build(config, 48, 4, float(golden["norm_eps_gate"]), dtype)
        if dtype == "float64":
            assert float(jnp.finfo(dtype).eps) == golden["norm_eps_gate"]
        nnx.update(
            module,
            jax.tree.map(lambda x: jnp.asarray(x, dtype), demo_parameters(golden, "param.")),
        )
        output, gradients, grad_table, grad_streams = run(
            module,
            table,
            addresses,
            jnp.asarray(golden["hidden_states"], dtype),
            jnp.asarray(golden["cotangent"], dtype),
        )
        assert relative(output, golden["output"]) < output_tolerance
        assert relative(grad_streams, golden["grad_hidden_states"]) < gradient_tolerance
        assert_tree_close(gradients, demo_parameters(golden, "grad."), gradient_tolerance)
        expected = golden["grad.multi_head_embedding.embedding.weight"]
        assert relative(grad_table, expected) < gradient_tolerance


def test_paper_form_in_bfloat16_has_the_machine_epsilon_of_float32():
    """torch.nn.RMSNorm(eps=None) on bfloat16 adds float32's, 2^-23, from torch 2.7 on: measured
    with torch 2.7.0 and 2.9.1, bfloat16 and float32 gains (2.6.0 added bfloat16's, 2^-7). Streams
    as small as sqrt(2^-23) tell the two apart, and both from none."""
    eps, (b, t, m, d) = 2.0**-23, (1, 16, 2, 32)
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=16, form=PAPER)
    module = build(config, d, m, 1e-6, "bfloat16")
    graphdef, params = nnx.split(module)
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(b, t, 4, 4)), jnp.bfloat16)
    streams = jnp.asarray(rng.normal(0, 3e-4, (b, t, m, d)), jnp.bfloat16)
    _, gate = nnx.merge(graphdef, params)(rows, streams, jnp.ones((b, t), jnp.int32))
    e, h = (np.float64(x)[0].reshape(t, *size) for x, size in ((rows, (16,)), (streams, (m, d))))
    weights = np.float64(module.projection[...])
    ones, zeros, mask = np.ones((m, d)), np.zeros((m + 1, d)), np.ones(t, bool)
    expected = gate_oracle.forward(e, weights, h, ones, zeros, mask, eps)[1]
    np.testing.assert_allclose(gate[0], expected, atol=1e-4)
    for wrong in (2.0**-7, 0.0):
        other = gate_oracle.forward(e, weights, h, ones, zeros, mask, wrong)[1]
        assert np.abs(other - expected).max() > 20 * 1e-4


def test_v41_form_equals_the_released_arithmetic():
    """FP8 rows and projection, E8M0 scales, product gains, no conv, residual in stream dtype."""
    golden = load("module_v41.npz")
    with jax.enable_x64(True):
        table = dequantise_rows(
            jnp.asarray(golden["embed_weight_e4m3_bits"]), jnp.asarray(golden["embed_scale_e8m0"])
        )
        addresses = jnp.asarray(golden["flat_row_ids"], jnp.int32)
        rows = table[addresses]
        flat = np.asarray(rows, np.float64).reshape(golden["rows"].shape)
        np.testing.assert_array_equal(flat, golden["rows"])
        wkv = dequantise_blocks(
            jnp.asarray(golden["wkv_weight_e4m3_bits"]), jnp.asarray(golden["wkv_scale_e8m0"])
        )
        config = EngramConfig(layers=(1,), orders=(2, 3, 4), heads_per_order=2, d_mem=192, form=V41)
        module = build(config, 64, 4, float(golden["eps"]), "float64")
        projection = np.asarray(wkv, np.float64).reshape(5, 64, 192).transpose(2, 0, 1)
        module.projection[...] = jnp.asarray(projection)
        module.query_norm.gain[...] = jnp.asarray(golden["q_weight"], "float64")
        module.key_norm.gain[...] = jnp.asarray(golden["k_weight"], "float64")
        streams = jnp.asarray(golden["hidden_states"], "float64")
        output, gate = module(rows, streams, jnp.ones(streams.shape[:2], jnp.int32))
        assert relative(gate, golden["gate"]) < 1e-6
        assert relative(streams + output, golden["output"]) < 1e-6


def qwen_parameters(golden, prefix, streams, d_model):
    def get(name):
        return golden[prefix + name]

    def gain(name):
        return {"gain": get(name).reshape(streams, d_model)}

    keys = get("key_proj.weight").reshape(streams, d_model, -1)
    projection = np.concatenate([keys, get("value_proj.weight")[None]]).transpose(2, 0, 1)
    taps = get("conv1d.weight")[:, 0].T.reshape(-1, streams, d_model)
    return {
        "projection": projection,
        "key_norm": gain("norm_key.weight"),
        "query_norm": gain("norm_query.weight"),
        "conv": {"norm": gain("norm_conv.weight"), "taps": taps},
    }


def test_qwen_form_equals_transformers():
    golden = load("module_qwen_ple.npz")
    ngram, heads, eos = (int(golden[k]) for k in ("ngram_size", "heads_per_ngram", "eos"))
    with jax.enable_x64(True):
        ids = golden["input_ids"]
        addresses = qwen_addresses(golden, ids, ngram, heads, eos)
        d_model = golden["param.value_proj.weight"].shape[0]
        streams = golden["hidden_states"].shape[-1] // d_model
        config = EngramConfig(layers=(1,), heads_per_order=heads, d_mem=48, form=QWEN)
        module = build(config, d_model, streams, float(golden["norm_eps"]), "float64")
        nnx.update(
            module,
            jax.tree.map(jnp.asarray, qwen_parameters(golden, "param.", streams, d_model)),
        )
        shape = (*ids.shape, streams, d_model)
        output, gradients, grad_table, grad_streams = run(
            module,
            jnp.asarray(golden["param.ple_embedding.ngram_embedding.weight"]),
            jnp.asarray(addresses, jnp.int32),
            jnp.asarray(golden["hidden_states"].reshape(shape)),
            jnp.asarray(golden["cotangent"].reshape(shape)),
        )
        assert relative(output, golden["output"].reshape(shape)) < 1e-12
        assert relative(grad_streams, golden["grad_hidden_states"].reshape(shape)) < 1e-10
        assert_tree_close(gradients, qwen_parameters(golden, "grad.", streams, d_model), 1e-10)
        expected = golden["grad.ple_embedding.ngram_embedding.weight"]
        assert relative(grad_table, expected) < 1e-6


def qwen_addresses(golden, ids, ngram, heads, eos):
    """The PLE hash written out in Python integers; the history restarts after eos."""
    out = np.zeros((*ids.shape, (ngram - 1) * heads), np.int64)
    for b, row in enumerate(ids):
        start = 0
        for t in range(len(row)):
            mixed = 0
            for back in range(ngram):
                token = int(row[t - back]) if t - back >= start else eos
                mixed ^= token * int(golden["multipliers"][back])
                for j in range(heads):
                    if back:
                        head = (back - 1) * heads + j
                        size, offset = golden["head_sizes"][head], golden["head_offsets"][head]
                        out[b, t, head] = mixed % int(size) + int(offset)
            if row[t] == eos:
                start = t + 1
    return out


def random_inputs(config, d_model=16, streams=3, batch=2, length=23):
    keys = jax.random.split(jax.random.key(1), 3)
    rows = jax.random.normal(keys[0], (batch, length, config.heads, config.dim))
    h = jax.random.normal(keys[1], (batch, length, streams, d_model))
    segments = jnp.sort(jax.random.randint(keys[2], (batch, length), 1, 4), axis=1)
    return rows, h, segments


def trained(module):
    """Give the zero-initialised taps values, so that the convolution takes part."""
    if module.conv is not None:
        taps = module.conv.taps
        taps[...] = jax.random.normal(jax.random.key(7), taps.shape, taps[...].dtype)
    return module


def value_of(module, rows):
    """Equation 3's value in float64: [B, T, 1, d]."""
    e = np.asarray(rows, np.float64).reshape(*rows.shape[:2], -1)
    bias = 0 if module.bias is None else np.asarray(module.bias[...])[-1]
    return (e @ np.asarray(module.projection[...])[:, -1] + bias)[..., None, :]


def test_output_is_the_gated_value_at_step_0():
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=32)
    module = build(config, 16, 3, 1e-6, "float32")
    rows, h, segments = random_inputs(config)
    out, gate = module(rows, h, segments)
    np.testing.assert_allclose(out, gate[..., None] * value_of(module, rows), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", [PAPER, QWEN, V41])
def test_packed_documents_equal_documents_alone(form):
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=32, form=form)
    module = trained(build(config, 16, 3, 1e-6, "float32"))
    rows, h, segments = random_inputs(config)
    packed, _ = module(rows, h, segments)
    for b in range(h.shape[0]):
        for document in np.unique(segments[b]):
            where = np.flatnonzero(segments[b] == document)
            alone, _ = module(
                rows[b : b + 1, where], h[b : b + 1, where], jnp.ones((1, len(where)), jnp.int32)
            )
            np.testing.assert_allclose(packed[b, where], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [PAPER, QWEN, V41])
def test_chunks_with_a_carried_tail_equal_the_whole(form):
    """Chunks of any length, rows of the batch padded differently in each."""
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=32, form=form)
    module = trained(build(config, 16, 3, 1e-6, "float32"))
    rows, h, _ = random_inputs(config)
    whole, _ = module(rows, h, jnp.ones(h.shape[:2], jnp.int32))
    done = np.zeros(2, int)
    tail = module.init_tail(2, h.dtype)
    for take in ([7, 2], [1, 1], [0, 9], [15, 11]):
        size = max(take)
        index = np.minimum(done[:, None] + np.arange(size), h.shape[1] - 1)
        chunk = jax.vmap(lambda x, i: x[i])
        out, tail = module.cached(chunk(rows, index), chunk(h, index), tail, jnp.asarray(take))
        for b, n in enumerate(take):
            expected = whole[b, done[b] : done[b] + n]
            np.testing.assert_allclose(out[b, :n], expected, rtol=1e-5, atol=1e-6)
        done += take
    assert list(done) == [23, 23]


def masked_module(form):
    """A module with a convolution that does something, its inputs, and a mask of every fifth: the
    convolution, which reaches 3, 6 and 9 back, finds others before them."""
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=32, form=form)
    module = trained(build(config, 16, 3, 1e-6, "float32"))
    rows, h, segments = random_inputs(config)
    mask = np.broadcast_to(np.arange(h.shape[1]) % 5 != 0, h.shape[:2])
    return module, rows, h, segments, jnp.asarray(mask)


@pytest.mark.parametrize("form", [PAPER, QWEN, V41])
def test_masked_tokens_get_no_memory(form):
    """Not from the convolution, either. For those after them they are as if they had no value."""
    module, rows, h, segments, mask = masked_module(form)
    out, gate = module(rows, h, segments, mask)
    assert not np.any(out[:, ::5]) and not np.any(gate[:, ::5])
    gated = module(rows, h, segments)[1][..., None] * value_of(module, rows)
    u = np.where(mask[..., None, None], gated, 0).astype(np.float32)
    expected = u if module.conv is None else module.conv(jnp.asarray(u), segments)
    others = np.flatnonzero(mask[0])
    np.testing.assert_allclose(out[:, others], expected[:, others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", [PAPER, QWEN, V41])
def test_masked_tokens_get_no_memory_in_chunks(form):
    module, rows, h, _, mask = masked_module(form)
    whole, _ = module(rows, h, jnp.ones(h.shape[:2], jnp.int32), mask)
    tail, pieces = module.init_tail(2, h.dtype), []
    for start, end in ((0, 7), (7, 8), (8, 10), (10, 23)):
        part = slice(start, end)
        taken = jnp.full(2, end - start)
        out, tail = module.cached(rows[:, part], h[:, part], tail, taken, mask[:, part])
        pieces.append(out)
    found = np.concatenate(pieces, axis=1)
    assert not np.any(found[:, ::5])
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "rounded"),
    [
        ({"precision": "fp8", "fp8_recipe": "channel"}, "channel"),
        ({"precision": "fp8", "fp8_recipe": "block"}, "block"),
        ({"precision": "fp8", "fp8_recipe": "mx"}, "mx"),
        ({"precision": "bf16"}, None),
    ],
)
def test_the_configured_precision_is_computed_in(keys, rounded):
    """Against NumPy with rows and weights rounded so, and further from NumPy without rounding."""
    config = EngramConfig(layers=(1,), heads_per_order=2, d_mem=128, form=V41, **keys)
    module = build(config, 128, 2, 1e-6, "float32")
    rng = np.random.default_rng(0)
    e, h = (rng.normal(size=s).astype(np.float32) for s in ((1, 20, 128), (1, 20, 2, 128)))
    out, _ = module(jnp.asarray(e).reshape(1, 20, 4, 32), jnp.asarray(h), jnp.ones((1, 20), int))
    weights = np.float64(module.projection[...])

    def expected(rows, weights):
        ones, zeros = np.ones((2, 128)), np.zeros((3, 128))
        everywhere = np.ones(20, bool)
        return gate_oracle.forward(rows, weights, np.float64(h[0]), ones, zeros, everywhere, 1e-6)

    def distance(values):
        return np.linalg.norm(out[0] - values[0]) / np.linalg.norm(values[0])

    if rounded is None:
        as_configured = [np.float64(jnp.asarray(x, jnp.bfloat16)) for x in (e[0], weights)]
    else:
        as_configured = [fp8.rows(np.float64(e[0]), rounded), fp8.weights(weights, rounded)]
    # The plain form rounds keys and value to bfloat16, too.
    assert distance(expected(*as_configured)) < (5e-3 if rounded is None else 1e-3)
    assert distance(expected(np.float64(e[0]), weights)) > (1e-3 if rounded is None else 1e-2)
