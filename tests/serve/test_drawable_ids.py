"""A vocabulary larger than the tokenizer: what has no text is never drawn or listed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from engram_jax.addressing import drawable_ids
from engram_jax.config.errors import UserError
from engram_jax.serve.engine import Engine
from engram_jax.serve.logit_rules import check_rules
from engram_jax.serve.request import SamplingParams
from tests.serve.served import SERVE, device_memory, full_logits, logprobs, model, prompts
from tests.tiny import VOCAB

PROMPTS = prompts((5, 12))
SAMPLED = SamplingParams(max_tokens=16, temperature=1.5, seed=3, logprobs=4, prompt_logprobs=True)
GREEDY = dataclasses.replace(SAMPLED, temperature=0.0)
# Behind the program that draws twice; 100 is the largest bias.
BIASED = dataclasses.replace(GREEDY, logit_bias=((11, 1.0),))


@pytest.fixture(scope="module")
def missing():
    """The ids past the tokenizer's, and in the middle those that the plain model likes best."""
    liked = np.argsort(-full_logits(PROMPTS[0])[-1])[:3].tolist()
    return sorted({*range(VOCAB - 9, VOCAB), *liked})


@pytest.fixture(scope="module")
def tokenizer(missing):
    vocab = {f"w{i}": i for i in range(VOCAB) if i not in missing}
    return Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))


@pytest.fixture(scope="module")
def engine(tokenizer):
    program, weights = model()
    program = dataclasses.replace(program, config=dataclasses.replace(program.config, serve=SERVE))
    made = Engine(program, weights, device_memory(program, weights), tokenizer=tokenizer)
    yield made
    made.close()


def test_which_ids_there_are(tokenizer, missing):
    found = drawable_ids(tokenizer, VOCAB)
    assert np.flatnonzero(~found).tolist() == missing
    assert drawable_ids(tokenizer, min(missing)) is None and drawable_ids(None, VOCAB) is None


@pytest.mark.parametrize("params", [GREEDY, BIASED, SAMPLED], ids=["greedy", "biased", "drawn"])
def test_tokens_and_what_is_listed_against_the_plain_forward(engine, missing, params):
    bias = np.zeros(VOCAB)
    for token, value in params.logit_bias:
        bias[token] += value
    out = np.zeros(VOCAB, bool)
    out[missing] = True
    found = engine.generate(PROMPTS, params)
    for prompt, one in zip(PROMPTS, found, strict=True):
        logits = full_logits([*prompt, *one.tokens]).astype(np.float64)
        assert len(one.tokens) == 16 and not out[list(one.tokens)].any()
        if params.temperature == 0:
            wanted = np.where(out, -np.inf, logits + bias).argmax(-1)
            assert list(one.tokens) == wanted[len(prompt) - 1 : -1].tolist()
        own = logprobs(logits)  # of all ids, as in the loss
        listed = np.argsort(np.where(out, np.inf, -own), axis=-1, kind="stable")[:, :4]
        entries = [*one.prompt_logprobs, *one.logprobs]
        for at, (row, token, entry) in enumerate(
            zip(own, [*prompt[1:], *one.tokens], entries, strict=False)
        ):
            assert entry.token == token and list(entry.top) == listed[at].tolist()
            assert entry.logprob == pytest.approx(row[token], abs=1e-5)


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"allowed_ids": (1, VOCAB - 2)}, "allowed_token_ids"),
        ({"logit_bias": ((VOCAB - 2, 1.0),)}, "logit_bias"),
        ({"bad_words": ((1, VOCAB - 2),)}, "bad_words"),
        ({"stop_ids": (VOCAB - 2,)}, "stop_token_ids"),
    ],
)
def test_rules_about_them_are_refused(engine, rules, name):
    params = SamplingParams(max_tokens=2, **rules)
    told = f"{name}: token id {VOCAB - 2}: must be an id of the tokenizer, which has none there"
    with pytest.raises(UserError, match=told):
        engine.check([1], params)


def test_rules_that_leave_none_of_the_tokenizers():
    drawable = np.arange(VOCAB) < 2
    params = SamplingParams(bad_words=((0,), (1,)))
    check_rules(params, None, VOCAB)
    with pytest.raises(UserError, match="must have a token that bad_words"):
        check_rules(params, None, VOCAB, drawable)
