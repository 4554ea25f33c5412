"""The engine against the plain forward pass, whatever runs beside, wherever the rows lie."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.config import GenerateConfig
from engram_jax.hardware import xla_flags
from engram_jax.memory.store.dram import HostTable
from engram_jax.memory.store.row_format import RowFormat
from engram_jax.model.decode import Generator
from engram_jax.model.sampling import key_of_token, sample
from engram_jax.serve.engine import Engine
from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.request import Finish, SamplingParams
from engram_jax.serve.staged_rows import StagedMemory
from engram_jax.training.state import weights_of
from tests.serve.served import (
    GREEDY,
    LENGTHS,
    SERVE,
    full_logits,
    host_memory,
    logprobs,
    make_engine,
    model,
    prompts,
    rows_of,
    served,
)
from tests.tiny import NEIGHBOURS, VOCAB, tiny


def test_tokens_and_log_probabilities_are_the_forward_pass(expected):
    for prompt, found in zip(prompts(), expected, strict=True):
        assert found.finish == Finish.LENGTH and len(found.tokens) == 12
        logits = full_logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
        assert found.tokens == tuple(logits.argmax(-1).tolist())
        wanted = logprobs(logits)
        for row, token, own in zip(wanted, found.tokens, found.logprobs, strict=True):
            assert own.token == token
            np.testing.assert_allclose(own.logprob, row[token], atol=2e-5)
            best = np.sort(row)[::-1][:5]
            np.testing.assert_allclose(list(own.top.values()), best, atol=2e-5)
            np.testing.assert_allclose([row[t] for t in own.top], best, atol=2e-5)


def test_sampled_tokens_are_the_samplers_for_each_request_alone():
    params = [
        SamplingParams(max_tokens=10, temperature=t, top_p=p, top_k=k, seed=s)
        for t, p, k, s in [
            (0.7, 1.0, 0, 0),
            (1.0, 0.9, 0, 1),
            (1.3, 0.5, 7, 2**32 - 1),
            (0.0, 0.3, 1, 5),
            (1e-42, 1.0, 0, 3),
            (5.0, 1.0, 61, 3),
            (2.0, 0.2, 3, 9),
            (1.0, 1.0, 0, 1),
        ]
    ]
    found, _ = served(params)
    for prompt, own, answer in zip(prompts(), params, found, strict=True):
        logits = full_logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        for step, token in enumerate(answer.tokens):
            key = key_of_token(own.seed, step)
            how = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
            assert int(sample(logits[step : step + 1], key, **how)[0]) == token, (own, step)


@pytest.mark.parametrize("order", [slice(None, None, -1), [3], [7, 0], [5, 5, 5, 2]])
def test_no_bit_depends_on_what_runs_beside(expected, order):
    index = np.arange(len(LENGTHS))[order]
    found, _ = served(given=[prompts()[i] for i in index])
    assert found == [expected[i] for i in index]


@pytest.mark.parametrize("pages", [8, 9, 12])
def test_moving_out_and_back_changes_no_bit(expected, pages):
    found, stats = served(pages=pages)
    assert stats["evictions"] > 0
    assert found == expected


@pytest.mark.parametrize("pages", [8, 9])
def test_moving_out_while_drawing_and_scoring_prompts(pages):
    """Rows come from the host, prompts are scored, tokens drawn: all of it at once."""
    program, weights = model()
    params = [
        SamplingParams(11, temperature=1.0, seed=i, logprobs=3, prompt_logprobs=i % 2 == 0)
        for i in range(len(LENGTHS))
    ]
    wanted, roomy = served(params)
    found, stats = served(params, pages=pages, memory=host_memory(program, weights, np.arange(9)))
    assert roomy["evictions"] == 0 and stats["evictions"] > 0
    assert found == wanted


def test_a_longer_capacity_changes_no_bit(monkeypatch):
    """Pages behind a sequence's end are not read, however many there may be. Two programs: compiled
    through MLIR as a user's are, which add up alike whatever the shapes."""
    monkeypatch.setitem(xla_flags.OPTIONS, xla_flags.CPU, {"xla_cpu_use_fusion_emitters": True})
    assert served(capacity=256)[0] == served(capacity=512)[0]


def test_prompt_log_probabilities(expected):
    params = SamplingParams(max_tokens=0, logprobs=3, prompt_logprobs=True)
    found, _ = served(params)
    for prompt, answer in zip(prompts(), found, strict=True):
        assert answer.finish == Finish.LENGTH and answer.tokens == ()
        assert [p.token for p in answer.prompt_logprobs] == prompt[1:]
        wanted = logprobs(full_logits(prompt))
        for at, own in enumerate(answer.prompt_logprobs):
            np.testing.assert_allclose(own.logprob, wanted[at, own.token], atol=2e-5)
            assert len(own.top) == 3
    both = SamplingParams(max_tokens=12, logprobs=5, prompt_logprobs=True)
    again, _ = served([both, *[GREEDY] * (len(LENGTHS) - 1)])
    assert [a.tokens for a in again] == [a.tokens for a in expected]
    assert [a.logprobs for a in again] == [a.logprobs for a in expected]  # of the companions, too
    assert len(again[0].prompt_logprobs) == 0 and not again[3].prompt_logprobs


@pytest.mark.parametrize("pages", [0, 8])
def test_a_prompt_that_fills_the_capacity_is_scored(pages):
    (prompt,) = prompts([64])
    params = SamplingParams(max_tokens=0, logprobs=0, prompt_logprobs=True)
    (found,), _ = served(params, [prompt], pages=pages)
    wanted = logprobs(full_logits(prompt))[np.arange(63), prompt[1:]]
    np.testing.assert_allclose([p.logprob for p in found.prompt_logprobs], wanted, atol=2e-5)


def test_full_sequences_fit():
    (prompt,) = prompts([52])
    (found,), _ = served(GREEDY, [prompt])
    logits = full_logits([*prompt, *found.tokens])[len(prompt) - 1 : -1]
    assert found.tokens == tuple(logits.argmax(-1).tolist())


MODELS = {
    "no memory": {"model.engram.layers": ()},
    "layers 0 and 2": {"model.engram.layers": (0, 2)},
    "no convolution": {"model.engram.form": "v41"},
    "dialect qwen": {
        "model.engram.form": "qwen",
        "model.engram.hash_dialect": "qwen",
        "tokenizer.canonical_vocab_size": VOCAB,
        "tokenizer.eos_id": 7,
    },
    "frequent n-grams, product keys": NEIGHBOURS,
    "one stream, tied": {"model.hyper.streams": 1, "model.tie_embeddings": True},
}


RARE = (
    "no memory",
    "layers 0 and 2",
    "no convolution",
    "one stream, tied",
    "frequent n-grams, product keys",
)  # each model is a minute of compilation


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in RARE else ()) for n in MODELS]
)
def test_other_models_decode_as_the_plain_generator(name):
    program, state = tiny(**MODELS[name])
    weights = weights_of(program, state)
    steps = EngineSteps(program, dataclasses.replace(SERVE, pages=9))
    engine = Engine(program, weights, host_memory(program, weights), steps)
    given = [*prompts((1, 9, 30)), [7, 3, 7, 7, 1, 2, 7]]
    found = engine.generate(given, SamplingParams(max_tokens=14))
    generator = Generator(program, weights)
    how = GenerateConfig(max_tokens=14, temperature=0.0)
    assert [list(f.tokens) for f in found] == [generator.complete([p], how)[0] for p in given]
    assert engine.stats()["evictions"] > 0
    engine.close()


def test_numbers_that_are_none_stay_with_their_sequence():
    """Its pages go to others, who see what is left in them only with weight zero."""
    program, weights = model()
    rows = np.asarray(weights.rows["1"]).copy()
    poison, other = [3, 1, 4, 1, 5, 9, 2, 6], [10, 20, 30, 11, 12]
    params = SamplingParams(max_tokens=4, logprobs=5)
    (wanted,), _ = served(params, [other])
    used = set(rows_of([*other, *wanted.tokens]).reshape(-1).tolist())
    bad = sorted(set(rows_of(poison).reshape(-1).tolist()) - used)[0]
    rows[bad] = np.nan
    stored = RowFormat("float32", rows.shape[1])
    made = {"1": StagedMemory(program, HostTable(stored, [rows.view(np.uint8)]))}
    engine = make_engine(memory=made)
    (broken,) = engine.generate([poison], params)
    assert np.isnan(broken.logprobs[0].logprob)  # it is read
    assert engine.generate([other], params) == [wanted]
    assert engine.generate([poison, other], params)[1] == wanted
    engine.close()
