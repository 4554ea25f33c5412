"""Log-probabilities of a part of a prompt, and of what may follow it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.serve.request import MAX_NEXT, SamplingParams
from tests.serve.served import full_logits, logprobs, make_engine, prompts
from tests.tiny import VOCAB

SCORE = SamplingParams(0, logprobs=1, prompt_logprobs=True)
CONTEXT, OTHER = prompts([29, 7], seed=7)  # three units of 8 and 5 tokens
ENDS = prompts([1, 4, 8, 12], seed=8)


@pytest.fixture(scope="module")
def engine():
    made = make_engine()
    yield made
    made.close()


def scored_from(first, **more):
    return dataclasses.replace(SCORE, prompt_logprobs_from=first, **more)


def test_from_a_token_on_and_what_may_follow(engine):
    """The values of the uncached forward pass, with the likeliest token at every place."""
    given = [CONTEXT + end for end in ENDS] + [OTHER]
    asked = (3, VOCAB - 1, 3, 0)
    params = [scored_from(len(CONTEXT), next_ids=asked)] * len(ENDS) + [SCORE]
    for prompt, how, found in zip(given, params, engine.generate(given, params), strict=True):
        first, wanted = how.prompt_logprobs_from, logprobs(full_logits(prompt))
        tokens = [*prompt[first:], *how.next_ids]
        places = [*range(first - 1, len(prompt) - 1), *[len(prompt) - 1] * len(how.next_ids)]
        assert [p.token for p in found.prompt_logprobs] == tokens and found.tokens == ()
        mine = [p.logprob for p in found.prompt_logprobs]
        np.testing.assert_allclose(mine, wanted[places, tokens], atol=1e-4)
        best = [next(iter(p.top)) for p in found.prompt_logprobs]
        assert best == wanted[places].argmax(-1).tolist()
        tops = [p.top[token] for p, token in zip(found.prompt_logprobs, best, strict=True)]
        np.testing.assert_allclose(tops, wanted[places].max(-1), atol=1e-4)


def test_a_context_is_computed_once_to_the_bit(engine):
    """Of each prompt that begins with it, what is behind its last whole unit is computed."""
    given = [CONTEXT + end for end in ENDS]
    first = len(CONTEXT)
    alone = [scored_from(first, cache_salt=f"alone {i}") for i in range(len(given))]
    wanted = engine.generate(given, alone)
    before = engine.stats()
    found = engine.generate(given, scored_from(first, cache_salt="together"))
    computed = engine.stats()["prompt_tokens"] - before["prompt_tokens"]
    assert found == wanted
    assert computed == 24 + sum(len(CONTEXT) - 24 + len(end) for end in ENDS)

    # The token that predicts the first wanted one is computed always, and all before it, units or
    # not, if every token is wanted.
    at_end = engine.generate([CONTEXT], scored_from(24, cache_salt="together"))
    assert len(at_end[0].prompt_logprobs) == 5
    before = engine.stats()["prompt_tokens"]
    whole = engine.generate([CONTEXT], dataclasses.replace(SCORE, cache_salt="together"))
    assert engine.stats()["prompt_tokens"] - before == len(CONTEXT)
    assert whole[0].prompt_logprobs[23:] == at_end[0].prompt_logprobs


def test_the_likeliest_alone_and_more_of_them(engine):
    """One is found otherwise than twenty."""
    five, one = (
        engine.generate([CONTEXT], dataclasses.replace(SCORE, logprobs=n))[0].prompt_logprobs
        for n in (5, 1)
    )
    for many, single in zip(five, one, strict=True):
        assert (many.token, many.logprob) == (single.token, single.logprob)
        assert [*many.top.items()][:1] == [*single.top.items()]


def test_with_an_answer(engine):
    """Scored and then continued: both as alone."""
    how = scored_from(20, max_tokens=6, next_ids=(1, 2))
    (both,) = engine.generate([CONTEXT], how)
    (score,) = engine.generate([CONTEXT], scored_from(20, next_ids=(1, 2)))
    (answer,) = engine.generate([CONTEXT], SamplingParams(6))
    assert both.prompt_logprobs == score.prompt_logprobs and len(score.prompt_logprobs) == 11
    assert both.tokens == answer.tokens and len(both.logprobs) == 6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt_logprobs_from": 0}, "prompt_logprobs_from = 0: must be at least 1"),
        ({"prompt_logprobs": False, "max_tokens": 1, "prompt_logprobs_from": 2}, "and used with"),
        ({"prompt_logprobs": False, "max_tokens": 1, "next_ids": (1,)}, "and used with"),
        ({"next_ids": (0,) * (MAX_NEXT + 1)}, f"at most {MAX_NEXT} token ids"),
        ({"next_ids": (VOCAB,)}, f"must be from 0 to {VOCAB - 1}"),
        ({"prompt_logprobs_from": 30}, "must be at most the prompt's 29 tokens"),
    ],
)
def test_refused(engine, wrong, words):
    with pytest.raises(UserError, match=words):
        engine.check(CONTEXT, dataclasses.replace(SCORE, **wrong))
