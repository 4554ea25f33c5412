"""The whole model: against NumPy, causality, documents, decoding, depth."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.config import GenerateConfig
from engram_jax.model.decode import Generator, extend, start
from engram_jax.model.transformer import stages
from engram_jax.training.state import weights_of
from engram_jax.training.step import batch_addresses
from tests.oracle import transformer as oracle
from tests.tiny import NEIGHBOURS, VOCAB, random_batch, tiny, tiny_config

_COMPILED = {}  # id of a program -> it, which keeps the id its own, and the compiled function


def full(program, state, batch):
    """(logits [B, T, V], output) of the plain forward pass; compiled once for a shape."""

    def run(state, batch):
        addresses = batch_addresses(program, batch)
        rows = {k: state.memory[k].rows[a] for k, a in addresses.items()}
        model = program.model(state.params, state.router_bias)
        mask = program.memory_mask(batch["tokens"])
        output = model(batch["tokens"], rows, batch["positions"], batch["segments"], mask)
        return model.logits(output.hidden), output

    return _COMPILED.setdefault(id(program), (program, jax.jit(run)))[1](state, batch)


def one_document(config, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (1, length)).astype(np.int32)
    return {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.arange(length, dtype=np.int32)[None],
    }


@pytest.mark.parametrize("keys", [{"model.layers": 4, "model.engram.layers": (1, 3)}, NEIGHBOURS])
def test_forward_equals_numpy_float64(keys):
    program, state = tiny(**keys)
    to64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    batch = one_document(program.config, 13)
    batch["tokens"][0, 2:9] = random_batch(program.config)["tokens"][0, :7]  # has frequent n-grams
    logits, _ = full(program, state, batch)
    expected = oracle.forward(
        to64(state.params),
        to64(state.router_bias),
        {k: np.asarray(t.rows, np.float64) for k, t in state.memory.items()},
        batch["tokens"][0],
        program.config,
        program.addressing,
    )
    np.testing.assert_allclose(logits[0], expected, rtol=2e-4, atol=2e-4)
    assert np.std(expected) > 0.1  # not a comparison of zeros


def test_no_output_depends_on_later_tokens_or_other_documents():
    """By gradients: of every logit with respect to every embedded token and every row."""
    program, state = tiny()
    batch = random_batch(program.config, seed=3)
    addresses = batch_addresses(program, batch)
    rows = {k: state.memory[k].rows[a] for k, a in addresses.items()}

    def reach(position):
        """How much logits at `position` depend on the rows read at each position, [B, T]."""

        def total(rows):
            model = program.model(state.params, state.router_bias)
            out = model(batch["tokens"], rows, batch["positions"], batch["segments"])
            return jnp.sum(model.logits(out.hidden)[:, position] ** 2)

        grads = jax.grad(total)(rows)
        return sum(jnp.sum(jnp.abs(g), axis=(2, 3)) for g in grads.values())

    positions = jnp.arange(program.config.data.seq_len)
    found = np.asarray(jax.jit(lambda p: jax.lax.map(reach, p))(positions))  # [T out, B, T in]
    segments = batch["segments"]
    for t in range(found.shape[0]):
        allowed = (segments == segments[:, t : t + 1]) & (np.arange(found.shape[0]) <= t)
        assert not np.any(found[t][~allowed])
        assert np.all(found[t][:, t] > 0)


def test_packed_documents_equal_documents_alone():
    program, state = tiny()
    batch = random_batch(program.config, seed=4)
    logits, _ = full(program, state, batch)
    for b in range(2):
        for document in np.unique(batch["segments"][b]):
            where = np.flatnonzero(batch["segments"][b] == document)
            alone = one_document(program.config, program.config.data.seq_len, seed=9)
            alone["tokens"][0, : len(where)] = batch["tokens"][b, where]  # others follow it
            expected = full(program, state, alone)[0][0, : len(where)]
            np.testing.assert_allclose(logits[b, where], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["paper", "v41", "qwen", "scone"])
def test_prefill_and_decode_equal_the_full_forward(form):
    """Two sequences of different lengths, fed in uneven, unevenly padded chunks."""
    program, state = tiny(**(NEIGHBOURS if form == "scone" else {"model.engram.form": form}))
    weights = weights_of(program, state)
    length = 18
    batch = {k: np.repeat(v, 2, 0) for k, v in one_document(program.config, length).items()}
    batch["tokens"][1] = np.random.default_rng(9).integers(0, VOCAB, length)
    batch["tokens"][:, 4:15] = random_batch(program.config)["tokens"][:2, :11]
    expected, _ = full(program, state, batch)
    step = jax.jit(partial(extend, program))
    session = start(program, weights, 2, 32)
    done = np.zeros(2, int)
    for take in ([5, 3], [1, 1], [1, 4], [1, 1], [1, 1], [9, 8]):
        size = max(take)
        index = np.minimum(done[:, None] + np.arange(size), length - 1)
        tokens = np.take_along_axis(batch["tokens"], index, axis=1)
        logits, session = step(weights, tokens, np.array(take, np.int32), session)
        done += take
        for b in range(2):
            np.testing.assert_allclose(logits[b], expected[b, done[b] - 1], rtol=2e-4, atol=2e-4)
    assert list(done) == [18, 18]


def test_greedy_generation_equals_repeated_full_forwards():
    program, state = tiny()
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    config = GenerateConfig(max_tokens=7, temperature=0)
    found = Generator(program, weights_of(program, state)).complete(prompts, config)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in continuation:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            logits, _ = full(
                program,
                state,
                {
                    "tokens": padded,
                    "segments": np.ones_like(padded),
                    "positions": np.arange(16, dtype=np.int32)[None],
                },
            )
            assert token == int(np.argmax(logits[0, len(ids) - 1]))
            ids.append(token)
        assert len(continuation) == 7


def test_generation_stops_at_the_end_of_sequence_token():
    program, state = tiny()
    generator = Generator(program, weights_of(program, state))
    config = GenerateConfig(max_tokens=7, temperature=0)
    free = generator.complete([[3, 1, 4], [9, 2]], config)
    eos = free[0][3]
    stopped = generator.complete([[3, 1, 4], [9, 2]], config, eos_id=eos)
    for ids, full_ids in zip(stopped, free, strict=True):
        end = full_ids.index(eos) if eos in full_ids else len(full_ids)
        assert ids == full_ids[:end]


def test_stages_cut_where_blocks_differ_and_before_engram_layers():
    small = tiny_config(**{"model.layers": 4, "model.engram.layers": (1, 3)})
    found = [(s.first, s.count, s.kind) for s in stages(small.model)]
    assert found == [(0, 1, "dense"), (1, 2, "moe"), (3, 1, "moe")]
    deep = tiny_config(**{"model.layers": 30, "model.engram.layers": (1, 14)})
    found = [(s.first, s.count, s.kind) for s in stages(deep.model)]
    assert found == [(0, 1, "dense"), (1, 13, "moe"), (14, 16, "moe")]


def test_compiled_size_does_not_grow_with_depth():
    def size(layers):
        program, _ = tiny(**{"model.layers": layers, "model.engram.layers": (1,)})
        shapes = jax.eval_shape(lambda: one_document(program.config, 8))
        state = jax.eval_shape(
            lambda: tiny(**{"model.layers": layers, "model.engram.layers": (1,)})[1]
        )
        return len(jax.jit(lambda s, b: full(program, s, b)[0]).lower(state, shapes).as_text())

    assert abs(size(24) - size(12)) < 0.02 * size(12)  # no more than 8 blocks are unrolled


ALL_KEPT = ("outputs", "attention", "queries", "experts")


@pytest.mark.parametrize(
    ("remat", "kept"), [("block", ()), ("block", ALL_KEPT), ("dots", ())], ids=str
)
def test_rematerialisation_changes_no_gradient(remat, kept):
    program, state = tiny()
    other, _ = tiny(**{"model.remat": remat, "model.kept": kept})
    batch = random_batch(program.config)

    def gradients(program):
        def loss(params):
            changed = dataclasses.replace(state, params=params)
            return jnp.sum(full(program, changed, batch)[0] ** 2)

        return jax.jit(jax.grad(loss))(state.params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        gradients(other),
        gradients(program),
    )


def test_what_is_kept_is_not_computed_again():
    """Matrix products in the gradient's program for a TPU, of dense weights and of experts."""

    def products(**keys):
        program, state = tiny(**keys)
        batch = random_batch(program.config)

        def loss(params):
            return jnp.sum(full(program, dataclasses.replace(state, params=params), batch)[0])

        lowered = jax.jit(jax.grad(loss)).trace(state.params).lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        return text.count("stablehlo.dot_general"), text.count('"chlo.ragged_dot"')

    def kept(*names):
        dense, routed = products(**{"model.remat": "block", "model.kept": names})
        return nothing[0] - dense, nothing[1] - routed

    nothing = products(**{"model.remat": "block"})
    # A dense layer and one with experts. Outputs: of attention, of the dense layer's feed-forward,
    # of the shared experts, of the routed ones.
    assert kept("outputs") == (4, 1)
    assert kept("queries") == (2, 0)
    assert kept("attention") == (2, 0)  # the weights that its gradient needs are not kept on a CPU
    assert kept("outputs", "experts") == (4, 3)


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
    program, state = tiny()
    half, own = tiny(**{"model.dtype": "bfloat16"})
    assert {x.dtype for x in jax.tree.leaves(own.params)} == {jnp.dtype("float32")}
    batch = random_batch(program.config)
    logits, output = full(half, state, batch)
    assert output.hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact, _ = full(program, state, batch)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert error < 0.2  # a router may choose another expert for a token in a few hundred


def test_masked_tokens_read_no_memory_anywhere():
    """A negative id (an image position) opens no gate, in the full forward and when decoding."""
    program, state = tiny()
    batch = one_document(program.config, 9)
    batch["tokens"][0, 4] = -3
    expected, out = full(program, state, batch)
    for gate in out.gates.values():
        assert not np.any(gate[0, 4]) and np.all(gate[0, [3, 5]] > 0)
    weights = weights_of(program, state)
    session = start(program, weights, 1, 32)
    step = jax.jit(partial(extend, program))
    logits, _ = step(weights, jnp.asarray(batch["tokens"]), jnp.array([9]), session)
    np.testing.assert_allclose(logits[0], expected[0, -1], rtol=2e-4, atol=2e-4)
