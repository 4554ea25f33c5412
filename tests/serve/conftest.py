"""The tiny model, served."""

from __future__ import annotations

import pytest

from engram_jax.serve.request import SamplingParams
from tests.serve.served import make_engine, served
from tests.serve.web import CASES, EOS, QUEUE, Running, tokenizer


@pytest.fixture
def engine():
    """A fresh engine over the tiny model, its table on the device."""
    made = make_engine()
    yield made
    made.close()


@pytest.fixture(scope="session")
def expected():
    """What the default engine answers: the other tests compare with it to the last bit."""
    return served()[0]


@pytest.fixture(scope="module")
def web_engine():
    made = make_engine(tokenizer=tokenizer(), eos_id=EOS, queue=QUEUE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(web_engine):
    """What the engine gives each case with nothing beside it."""
    out = []
    for prompt, fields in CASES:
        ids = web_engine.tokenizer.encode(prompt).ids
        params = SamplingParams(logprobs=3, prompt_logprobs=True, **fields)
        out += web_engine.generate([ids], params)
    return out


@pytest.fixture(scope="module")
def web(web_engine, alone):
    with Running(web_engine) as running:
        yield running
