"""The hash: NumPy against the golden files, jnp against both, documents, decode, masked ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing import LayerAddressing, hash_jax, hash_numpy
from engram_jax.config.errors import UserError
from tests.addressing.cases import jitted, planned

INT32 = np.iinfo(np.int32)


def random_ids(rng: np.random.Generator, shape: tuple[int, ...], vocab: int) -> np.ndarray:
    """Ids of the vocabulary, its last ones more often than chance would have them."""
    ids = rng.integers(0, vocab, shape)
    extreme = rng.choice([0, 1, vocab - 2, vocab - 1], shape)
    return np.where(rng.random(shape) < 0.3, extreme, ids).astype(np.int32)


def random_segments(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Documents of 1 to 9 tokens, numbered from 1, padding (0) at the end."""
    segments = np.zeros(shape, np.int32)
    for row in segments:
        ends = np.cumsum(rng.integers(1, 10, shape[1]))
        row[:] = np.searchsorted(ends, np.arange(shape[1]), side="right") + 1
        row[-5:] = 0
    return segments


# ---- golden --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "v41"])
def test_golden_paper_addresses(golden, hasher, name):
    expected = golden(f"addressing_{name}")
    for layer_id, layer in planned(name).items():
        assert layer.fill_id == expected["compressed_pad_id"]
        found = hasher(expected["compressed_ids"], layer) - np.array(layer.offsets)
        np.testing.assert_array_equal(found, expected[f"hashes_{layer_id}"])


def test_golden_qwen_addresses(golden, hasher):
    """The file holds no addresses, but rows, output and gradients that only the right ones give.

    The module in float64 from the rows read: keys, gate, values, conv. See layers/engram.py for the
    equations; here they only serve to show that every position read its own rows.
    """
    g = golden("module_qwen_ple")
    layer = planned("qwen_golden")[1]
    flat = hasher(g["input_ids"], layer)
    table = g["param.ple_embedding.ngram_embedding.weight"]
    row_gradient = g["grad.ple_embedding.ngram_embedding.weight"]
    np.testing.assert_array_equal(np.unique(flat), np.flatnonzero(np.abs(row_gradient).sum(1)))

    M, d, kernel, dilation = 4, 32, 4, 3
    B, T = g["input_ids"].shape

    def norm(x: np.ndarray, weight: str) -> np.ndarray:
        x = x.reshape(B, T, M, d)
        scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + g["norm_eps"])
        return x * scale * (1 + g[f"param.{weight}.weight"].reshape(M, d))

    e = table[flat].reshape(B, T, -1)
    key = norm(e @ g["param.key_proj.weight"].T, "norm_key")
    s = (norm(g["hidden_states"], "norm_query") * key).sum(-1) / np.sqrt(d)
    gate = 1 / (1 + np.exp(-np.sign(s) * np.sqrt(np.maximum(np.abs(s), 1e-6))))
    u = gate[..., None] * (e @ g["param.value_proj.weight"].T)[:, :, None]
    c = np.pad(
        norm(u, "norm_conv").reshape(B, T, M * d), ((0, 0), (dilation * (kernel - 1), 0), (0, 0))
    )
    taps = g["param.conv1d.weight"][:, 0]
    y = sum(c[:, dilation * k : dilation * k + T] * taps[:, k] for k in range(kernel))
    output = u.reshape(B, T, M * d) + y / (1 + np.exp(-y))
    np.testing.assert_allclose(output, g["output"], rtol=0, atol=1e-12)


# ---- jnp against NumPy ---------------------------------------------------------------------------


def test_jnp_equals_numpy_for_every_geometry(geometry):
    layers, vocab = geometry
    rng = np.random.default_rng(1)
    ids = random_ids(rng, (3, 171), vocab)
    segments = random_segments(rng, ids.shape)
    for layer in layers:
        history = random_ids(rng, (3, layer.max_ngram - 1), vocab)
        for extra in ({}, {"segments": segments, "history": history}):
            found = jitted(ids, layer, **extra)
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(found, hash_numpy.addresses(ids, layer, **extra))


def test_jnp_equals_numpy_for_any_int32(geometry):
    """Masked ids, and products that wrap around int64: ids no tokenizer has."""
    layers, _ = geometry
    rng = np.random.default_rng(2)
    ids = rng.integers(INT32.min, INT32.max, (2, 200), endpoint=True)
    edges = [INT32.min, INT32.min + 1, -(2**16), -100, -1, 0, 2**16, INT32.max - 1, INT32.max]
    ids = np.where(rng.random(ids.shape) < 0.5, rng.choice(edges, ids.shape), ids).astype(np.int32)
    for layer in layers:
        expected = hash_numpy.addresses(ids, layer)
        np.testing.assert_array_equal(jitted(ids, layer), expected)
        heads = expected - np.array(layer.offsets)
        assert (heads >= 0).all()
        assert (heads < np.array(layer.head_sizes)).all()


@pytest.mark.parametrize(
    "largest_multiplier", [2**63 - 1, 2**62 + 1, 2**32 + 1, 2**32 - 1, 2**31 + 1, 1]
)
def test_jnp_equals_numpy_for_extreme_multipliers(largest_multiplier):
    layer = LayerAddressing(0, (largest_multiplier, 3), (2**30 - 35, 65_537, 2), (2,), 3)
    ids = np.array([0, 1, 2, 65_535, 65_536, 129_279, INT32.max, -1, INT32.min], np.int32)
    found = jitted(ids, layer)
    np.testing.assert_array_equal(found, hash_numpy.addresses(ids, layer))


def test_modulus_against_python_integers():
    """The two quotients where they may be one short: around multiples of p and of 2**32."""
    sizes = [2, 3, 4, 5, 7, 127, 65_535, 65_536, 65_537, 2_262_403, 2**24 - 3, 2**24 + 43]
    sizes += [20_000_003, 2**26 - 5, 2**29 + 11, 2**30 - 35, 2**30 - 1, 2**30]
    rng = np.random.default_rng(3)
    for p in sizes:
        multiples = [int(k) * p for k in rng.integers(0, 2**63 // p, 200)]
        near = [n + step for n in [*multiples, 2**32, 2**62, 2**63 - 2] for step in (-1, 0, 1)]
        random = [int(n) for n in rng.integers(0, 2**63 - 1, 500)]
        numbers = [n for n in [0, 1, 2**63 - 1, *near, *random] if 0 <= n < 2**63]
        high = jnp.asarray([n >> 32 for n in numbers], jnp.uint32)
        low = jnp.asarray([n & 0xFFFFFFFF for n in numbers], jnp.uint32)
        found = jax.jit(lambda h, l, p=p: hash_jax._modulo(h, l, np.array(p)))(high, low)
        np.testing.assert_array_equal(found, [n % p for n in numbers], err_msg=str(p))


def test_jnp_form_uses_32_bit_integers_only():
    """No int64 (a TPU has none), no float (whose rounding compilers may change)."""
    layer = planned("v41")[1]
    ids = jnp.zeros((2, 8), jnp.int32)
    history = hash_jax.empty_history(layer, (2,))
    program = jax.make_jaxpr(lambda i, s, h: hash_jax.addresses(i, layer, s, h))(ids, ids, history)
    text = str(program)
    assert "u32[" in text
    assert not any(name in text for name in ("f32[", "f64[", "bf16[", "i64[", "u64["))


def test_jnp_form_is_pure_under_jit_and_vmap():
    layer = planned("demo")[15]
    ids = random_ids(np.random.default_rng(4), (3, 5, 7), 98_627)
    expected = hash_numpy.addresses(ids, layer)
    np.testing.assert_array_equal(jitted(ids, layer), expected)
    mapped = jax.jit(jax.vmap(lambda i: hash_jax.addresses(i, layer)))(ids)
    np.testing.assert_array_equal(mapped, expected)


# ---- documents and decode ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v41", "qwen_golden"])
def test_packed_documents_hash_as_they_do_alone(hasher, name):
    layer = next(iter(planned(name).values()))
    rng = np.random.default_rng(5)
    documents = [random_ids(rng, (n,), 997) for n in (1, 2, 3, 4, 9, 1, 30)]
    packed = np.concatenate(documents)
    segments = np.repeat(np.arange(1, 8), [len(d) for d in documents])
    alone = np.concatenate([hasher(d, layer) for d in documents])
    np.testing.assert_array_equal(hasher(packed, layer, segments), alone)
    assert (hasher(packed, layer) != alone).any()


def test_a_document_starts_after_pad_ids(hasher):
    """The ids before the start are the pad id's, written out here as a history and as tokens."""
    layer = planned("v41")[1]
    ids = random_ids(np.random.default_rng(6), (2, 6), 99_092)
    plain = hasher(ids, layer)
    pads = np.full((2, layer.max_ngram - 1), layer.fill_id, np.int32)
    np.testing.assert_array_equal(hasher(ids, layer, history=pads), plain)
    np.testing.assert_array_equal(hasher(np.concatenate([pads, ids], 1), layer)[:, 3:], plain)
    np.testing.assert_array_equal(hash_numpy.empty_history(layer, (2,)), pads)
    np.testing.assert_array_equal(hash_jax.empty_history(layer, (2,)), pads)


def test_qwen_history_restarts_after_the_end_of_sequence(hasher):
    layer = planned("qwen_golden")[1]
    eos = layer.restart_id
    text = np.array([5, 9, eos, 11, 12, 13, eos, eos, 14, 15], np.int32)
    found = hasher(text, layer)
    np.testing.assert_array_equal(found[3:7], hasher(text[3:7], layer))
    np.testing.assert_array_equal(found[8:], hasher(text[8:], layer))
    # The end of sequence itself still belongs to what it ends.
    assert (found[2] != hasher(text[2:3], layer)[0]).any()


@pytest.mark.parametrize("name", ["demo", "v41", "qwen_golden", "smallest"])
@pytest.mark.parametrize("form", ["numpy", "jnp"])
def test_decode_with_carried_history_equals_the_whole_sequence(name, form):
    module = {"numpy": hash_numpy, "jnp": hash_jax}[form]
    addresses = jitted if form == "jnp" else module.addresses
    layer = next(iter(planned(name).values()))
    rng = np.random.default_rng(7)
    ids = random_ids(rng, (2, 40), 11)  # few ids, so that Qwen's end of sequence comes up often
    whole = hash_numpy.addresses(ids, layer)
    for lengths in ([1] * 40, [1, 2, 5, 1, 5, 2, 2, 12, 5, 5]):
        history, found = module.empty_history(layer, (2,)), []
        for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
            piece = ids[:, start : start + length]
            found.append(addresses(piece, layer, history=history))
            history = np.concatenate([history, piece], axis=1)[:, -(layer.max_ngram - 1) :]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)


def test_history_of_the_wrong_width_is_refused(hasher):
    with pytest.raises(ValueError, match=r"history has shape \(2, 2\)"):
        hasher(np.zeros((2, 4), np.int32), planned("v41")[1], history=np.zeros((2, 2), np.int32))


# ---- masked ids and compression ------------------------------------------------------------------


def test_a_masked_id_reaches_only_the_n_grams_that_hold_it(hasher):
    layer = planned("demo")[1]
    ids = random_ids(np.random.default_rng(8), (12,), 98_627)
    masked = np.where(np.arange(12) == 5, -1, ids)
    changed = (hasher(masked, layer) != hasher(ids, layer)).reshape(12, 2, 8).any(-1)
    expected = np.zeros((12, 2), bool)
    expected[5:7, 0] = expected[5:8, 1] = True  # bigrams, trigrams
    np.testing.assert_array_equal(changed, expected)


def test_canonicalise_passes_masked_ids_and_refuses_unknown_ones():
    compression = np.array([3, 1, 1, 0], np.int32)
    raw = np.array([[0, 3, -1], [-100, 2, 1]])
    expected = [[3, 0, -1], [-100, 1, 1]]
    for found in (
        hash_numpy.canonicalise(raw, compression),
        hash_jax.canonicalise(jnp.asarray(raw), jnp.asarray(compression)),
    ):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UserError, match="token id 4: must be an id of the tokenizer, 0 to 3"):
        hash_numpy.canonicalise(np.array([4]), compression)
    unknown = hash_jax.canonicalise(jnp.asarray([4, 0]), jnp.asarray(compression))
    np.testing.assert_array_equal(unknown, [-1, 3])
    np.testing.assert_array_equal(hash_numpy.canonicalise(raw, None), raw)
    np.testing.assert_array_equal(hash_jax.canonicalise(jnp.asarray(raw), None), raw)
