"""A short run of benchmarks/soak.py, and that its judge sees mistakes."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import soak
from benchmarks.soak_reference import Answer, Reference, ask
from engram_jax.serve.request import SamplingParams
from tests.serve.served import SERVE, make_engine, model
from tests.serve.web import EOS, tokenizer
from tests.tiny import VOCAB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("over_http", "host"),
    [(False, False), (False, True), pytest.param(True, True, marks=pytest.mark.proof)],
)
def test_random_requests(over_http, host):
    result = soak.measure(requests=200, over_http=over_http, host=host, seed=100_000)
    figures = {figure.name: figure.value for figure in result.figures}
    missed = [f.name for f in result.figures if f.met is False and "slope" not in f.name]
    assert not missed, result.details["wrong"]
    for name in ("bad requests refused", "cancelled on the way", "moved out and back"):
        assert figures[name] > 0


@pytest.fixture(scope="module")
def judged():
    """answers(params) -> a true answer and what judges it, fresh each time."""
    program, weights = model()
    engine = make_engine(tokenizer=tokenizer(), eos_id=EOS)

    def make(**params):
        asked = ask(3, VOCAB, SERVE.capacity)
        asked = dataclasses.replace(asked, params=SamplingParams(max_tokens=12, **params))
        done = engine.generate([asked.prompt], asked.params)[0]
        logprobs = [p.logprob for p in (*done.prompt_logprobs, *done.logprobs)]
        answer = Answer(asked, list(done.tokens), done.finish, logprobs, done.text)
        return answer, Reference(program, weights, SERVE.capacity, EOS, tokenizer())

    yield make
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_judge_sees_mistakes(judged, temperature):
    params = {"temperature": temperature, "seed": 5, "logprobs": 0, "ignore_eos": True}

    def wrong(**change) -> int:
        answer, reference = judged(**params)
        reference.judge(dataclasses.replace(answer, **change))
        verdict = reference.finish()
        assert not verdict.ties and verdict.answers == 1
        return len(verdict.wrong) + (verdict.logprob_error > 1e-4)

    answer, _ = judged(**params)
    other = [(answer.tokens[3] + 1) % VOCAB]
    assert wrong() == 0
    assert wrong(tokens=[*answer.tokens[:3], *other, *answer.tokens[4:]]) > 0
    assert wrong(tokens=answer.tokens[:-1], logprobs=answer.logprobs[:-1]) > 0
    assert wrong(text=answer.text + "x") > 0
    assert wrong(logprobs=[p + 1e-3 for p in answer.logprobs]) > 0
    shorter = dataclasses.replace(answer.ask.params, seed=6, temperature=1.0)
    assert wrong(ask=dataclasses.replace(answer.ask, params=shorter)) > 0
