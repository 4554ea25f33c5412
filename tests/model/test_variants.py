"""Whole models with the lab's switches against NumPy: loss, gradients, decoding, serving."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engram_jax.addressing import hash_numpy
from engram_jax.config import ServeConfig
from engram_jax.config.errors import UserError
from engram_jax.model.decode import extend, start
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import SamplingParams
from engram_jax.serve.row_fetch import DeviceMemory
from engram_jax.training.state import build_training, init_state, weights_of
from engram_jax.training.step import batch_addresses, fetch_rows, gradients
from tests.oracle import engram_variants as variants
from tests.oracle import transformer as oracle
from tests.tiny import VOCAB, random_batch, tiny_addressing, tiny_config

# One dense layer with the memory in front: soon compiled, and all that differs is in it.
ONE_LAYER = {
    "model.layers": 1,
    "model.ffn.routed_experts": 0,
    "model.hyper.streams": 2,
    "model.hyper.sinkhorn_iterations": 2,
    "model.engram.layers": (0,),
    "data.seq_len": 7,
    "data.batch_size": 2,
}
SIGNED = {
    "model.engram.signs": True,
    "model.engram.case": True,
    "model.engram.multi_branch": False,
    "model.engram.orders": (2, 3, 4),
    "model.engram.d_mem": 12,
}
SHUFFLED = {"model.engram.lookup": "shuffled", "model.engram.gate": "one"}
OVER = {"model.engram.form": "over_encoding", "model.engram.signs": True}


def built(overrides, dtype):
    """(program, state) with random parameters, and classes of case if they are kept."""
    dtypes = {"model.dtype": dtype, "model.param_dtype": dtype}
    config = tiny_config(**ONE_LAYER, **dtypes, **overrides)
    addressing = tiny_addressing(config)
    if config.model.engram.case:
        classes = np.random.default_rng(6).integers(0, 10, VOCAB).astype(np.int32)
        addressing = dataclasses.replace(addressing, case=classes)
    program = build_training(config, addressing)
    rng = np.random.default_rng(0)

    def fill(x):
        whole = np.issubdtype(x.dtype, np.floating) and x.ndim > 0
        return jnp.asarray(rng.normal(0, 0.4, x.shape) if whole else np.zeros(x.shape), x.dtype)

    return program, jax.tree.map(fill, jax.eval_shape(partial(init_state, program)))


def memory_of(program, params, tables, tokens, others):
    """The oracle's `memory`. others: the tokens whose hashes are read."""
    engram, addressing = program.config.model.engram, program.addressing

    def memory(layer_id, streams):
        layer = addressing.layers[layer_id]
        canonical = addressing.compression[others]
        rows = tables[str(layer_id)][hash_numpy.addresses(canonical, layer)]
        if engram.signs:
            rows = rows * hash_numpy.signs(canonical, layer)[..., None]
        e = rows.reshape(len(tokens), -1)
        if engram.case:
            e = e + params["engram_case"][str(layer_id)]["case"][addressing.case[tokens]]
        own, everywhere = params["engrams"][str(layer_id)], np.ones(len(tokens), bool)
        if engram.form == "over_encoding":
            return variants.over_encoding(e, streams, own["order_projections"], everywhere)
        return variants.engram(
            e,
            streams,
            own,
            everywhere,
            gate=engram.gate,
            multi_branch=engram.multi_branch,
            dilation=engram.max_ngram,
            gate_eps=np.finfo(np.float64).eps,
            conv_eps=1e-5,
        )[0]

    return memory


def logits_by_numpy(program, params, tables, tokens, others):
    memory = memory_of(program, params, tables, tokens, others)
    return oracle.forward(params, {}, {}, tokens, program.config, program.addressing, memory)


def loss_by_numpy(program, params, tables, batch):
    """Nats per target; every sequence is one document."""
    total, roll = 0.0, program.addressing.lookup == "shuffled"
    for b, tokens in enumerate(batch["tokens"]):
        others = batch["tokens"][1 - b] if roll else tokens
        logits = logits_by_numpy(program, params, tables, tokens, others)
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), batch["targets"][b]]
        total += np.sum(losses * batch["loss_mask"][b])
    return total / batch["loss_mask"].sum()


@pytest.mark.parametrize("overrides", [SIGNED, SHUFFLED, OVER], ids=["signed", "shuffled", "over"])
def test_loss_and_gradients_equal_numpy(overrides):
    """The gradients that the training step sends to rows and parameters: against differences of
    NumPy's loss for some entries of each, those that are largest."""
    with jax.enable_x64(True):
        program, state = built(overrides, "float64")
        batch = random_batch(program.config, documents=False)

        @jax.jit
        def computed(state, batch):
            addresses = batch_addresses(program, batch)
            rows, _ = fetch_rows(program, state.memory, addresses)
            return addresses, gradients(program, state, rows, batch)[:3]

        addresses, (loss, d_params, d_rows) = computed(state, batch)
        params = jax.tree.map(np.asarray, state.params)
        tables = {k: np.asarray(t.rows, np.float64) for k, t in state.memory.items()}
        expected = loss_by_numpy(program, params, tables, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)

        of_table = np.zeros(tables["0"].shape)
        np.add.at(of_table, np.asarray(addresses["0"]), np.asarray(d_rows["0"], np.float64))
        named = {k: v for k, v in params.items() if k.startswith("engram")}
        pairs = [(tables["0"], of_table)]
        found = {k: d_params[k] for k in named}
        pairs += zip(jax.tree.leaves(named), jax.tree.leaves(found), strict=True)
        for values, ours in pairs:
            ours = np.asarray(ours)
            largest = np.argsort(np.abs(ours), axis=None)[-3:]
            for at in zip(*np.unravel_index(largest, ours.shape), strict=True):
                theirs = 0.0
                for by in (1e-6, -1e-6):
                    changed = values.copy()
                    changed[at] += by

                    def swap(x, values=values, changed=changed):
                        return changed if x is values else x

                    with_it = jax.tree.map(swap, (params, tables))
                    theirs += loss_by_numpy(program, *with_it, batch) / (2 * by)
                assert abs(ours[at]) > 1e-6
                np.testing.assert_allclose(ours[at], theirs, rtol=1e-5, atol=1e-9)


@lru_cache
def decoding(name):
    return built({"signed": SIGNED, "over": OVER}[name], "float32")


def expected_logits(program, state, tokens):
    to64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    tables = {k: np.asarray(t.rows, np.float64) for k, t in state.memory.items()}
    return logits_by_numpy(program, to64(state.params), tables, tokens, tokens)


def test_decoding_reads_signs_and_case():
    program, state = decoding("signed")
    weights = weights_of(program, state)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, 9)).astype(np.int32)
    expected = expected_logits(program, state, tokens[0])
    step, session = jax.jit(partial(extend, program)), start(program, weights, 1, 32)
    for begin in (0, 3, 6):
        part = tokens[:, begin : begin + 3]
        logits, session = step(weights, part, jnp.array([3]), session)
        np.testing.assert_allclose(logits[0], expected[begin + 2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["signed", pytest.param("over", marks=pytest.mark.slow)])
def test_serving_reads_signs_and_case(name):
    """Layer 0 begins the engine's second span; greedy tokens and their logits, of two prompts."""
    program, state = decoding(name)
    weights = weights_of(program, state)
    serve = ServeConfig(sequences=2, capacity=16, page=8, prefill_chunk=4, prefill_sequences=2)
    memory = {k: DeviceMemory(program, rows) for k, rows in weights.rows.items()}
    engine = Engine(program, weights, memory, EngineSteps(program, serve), None, None)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 6]]
    found = engine.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0, logprobs=1))
    engine.close()
    for prompt, completion in zip(prompts, found, strict=True):
        ids = np.array(prompt + list(completion.tokens))
        logits = expected_logits(program, state, ids)
        assert len(completion.tokens) == 4
        for at, token in enumerate(completion.tokens, len(prompt) - 1):
            assert token == np.argmax(logits[at])


def test_a_model_without_what_it_reads_beside_its_rows_is_an_error():
    """Not a silent omission: whoever calls the model must give signs and classes."""
    program, state = decoding("signed")
    batch = random_batch(program.config, documents=False)
    rows = {"0": jnp.zeros((2, 7, 6, 2))}

    def run(beside):
        model = program.model(state.params, state.router_bias)
        places = batch["positions"], batch["segments"]
        return model(batch["tokens"], rows, *places, beside=beside).hidden

    complete = program.beside(batch["tokens"], batch["segments"])
    jax.eval_shape(run, complete)
    for wrong, told in (
        (None, "have signs"),
        (dataclasses.replace(complete, signs={}), "have signs"),
        (dataclasses.replace(complete, case=None), "have classes"),
    ):
        with pytest.raises(ValueError, match=told):
            jax.eval_shape(run, wrong)


def test_ids_without_memory_have_class_0():
    program, _ = decoding("signed")
    tokens = jnp.array([[-3, 5, VOCAB + 2]])
    classes = program.beside(tokens).case
    np.testing.assert_array_equal(classes, [[0, program.addressing.case[5], 0]])


def test_a_shuffled_model_cannot_continue_a_sequence():
    config = tiny_config(**ONE_LAYER, **SHUFFLED)
    program = build_training(config, tiny_addressing(config))
    with pytest.raises(UserError, match="'shuffled': is a control") as raised:
        start(program, program.abstract_weights(), 1, 8)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="'shuffled': is a control"):
        EngineSteps(program, ServeConfig(capacity=8))
