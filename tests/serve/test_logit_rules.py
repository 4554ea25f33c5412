"""Rules that change logits: against their definitions in float64, and beside other sequences."""

from __future__ import annotations

from functools import lru_cache

import jax
import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.model.sampling import adjust_logits, sample_rows
from engram_jax.serve.logit_rules import LogitRules, check_rules, entries, no_adjustments
from engram_jax.serve.request import Completion, Finish, SamplingParams
from tests.oracle import sampling_rules as oracle
from tests.serve.served import GREEDY, SERVE, full_logits, logprobs, make_engine, prompts
from tests.tiny import VOCAB

EOS = 7
MOST = entries(SERVE.capacity, VOCAB)
RULES = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.75, "presence_penalty": -2.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"logit_bias": ((3, 5.0), (9, -100.0), (60, 4.5))},
    {"allowed_ids": (5, 11, EOS, 40)},
    {"bad_words": ((4,), (12, 13), (30, 30, 30))},
    {"min_tokens": 6, "stop_ids": (2, 12)},
    {"allowed_ids": (5, 11, EOS, 40), "bad_words": ((5, 11), (11, 11)), "presence_penalty": 0.5},
    {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.5,
        "logit_bias": ((3, -1.5), (11, 2.0)),
        "bad_words": ((3, 11),),
        "min_tokens": 3,
    },
]


def of_oracle(params, prompt, generated, logits):
    """The oracle's logits for SamplingParams."""
    ends = [*params.stop_ids, *([] if params.ignore_eos else [EOS])]
    names = ("allowed_ids", "bad_words", "logit_bias", "min_tokens")
    penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    how = {name: getattr(params, name) for name in (*names, *penalties)}
    return oracle.adjusted(logits, prompt, generated, ends=ends, **how)


@lru_cache
def compiled():
    return jax.jit(adjust_logits)


@pytest.mark.parametrize("rules", RULES)
def test_entries_against_the_definitions(rules):
    """Token by token: what the entries make of any logits, and that all others stay as they are."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=40, **rules)
    prompt = rng.integers(0, VOCAB, 9)
    made = LogitRules(params, prompt, EOS, MOST)
    generated = []
    for _ in range(12):
        logits = rng.normal(0, 4, (2, VOCAB)).astype(np.float32)
        batch = no_adjustments(2, MOST, VOCAB)
        made.fill(1, batch, generated)
        found = np.asarray(
            compiled()(logits, batch.ids, batch.bias, batch.factor, batch.less, batch.only)
        )
        assert np.array_equal(found[0], logits[0])
        wanted = of_oracle(params, prompt.tolist(), generated, logits[1])
        np.testing.assert_allclose(found[1], wanted, rtol=1e-6, atol=1e-5)
        if params.allowed_ids is None:
            same = wanted == logits[1].astype(np.float64)
            assert np.array_equal(found[1][same], logits[1][same])
        generated.append(int(rng.choice([4, 5, 11, 12, 13, 30, 30, 30, int(rng.integers(VOCAB))])))


@lru_cache
def greedy(prompt, params):
    """(tokens, whether it stopped): the plain forward pass, its logits adjusted by the oracle."""
    tokens = []
    ends = {*params.stop_ids, EOS}
    for _ in range(params.max_tokens):
        logits = full_logits([*prompt, *tokens])[-1]
        token = int(of_oracle(params, prompt, tokens, logits).argmax())
        if token in ends:
            return tokens, True
        tokens.append(token)
    return tokens, False


CASES = [
    (tuple(prompts()[at % 8]), SamplingParams(max_tokens=10, logprobs=2, **rules))
    for at, rules in enumerate(RULES)
]


@pytest.fixture(scope="module")
def ruled():
    """Each case alone."""
    made = make_engine(eos_id=EOS)
    found = [made.generate([prompt], params)[0] for prompt, params in CASES]
    made.close()
    return found


def test_greedy_sequences_against_the_oracle(ruled):
    changed = 0
    for (prompt, params), found in zip(CASES, ruled, strict=True):
        tokens, stopped = greedy(prompt, params)
        assert (list(found.tokens), found.finish == Finish.STOP) == (tokens, stopped)
        assert found.sampled == len(tokens) + stopped
        changed += tokens != greedy(prompt, SamplingParams(max_tokens=10))[0]
    assert changed >= len(CASES) - 2


def test_log_probabilities_stay_the_models(ruled):
    for (prompt, _), found in zip(CASES, ruled, strict=True):
        if not found.tokens:
            continue
        wanted = logprobs(full_logits([*prompt, *found.tokens]))[len(prompt) - 1 :]
        for row, entry in zip(wanted, found.logprobs, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
            assert list(entry.top) == np.argsort(-row)[:2].tolist()
            if entry.token in entry.top:
                assert entry.top[entry.token] == entry.logprob


@pytest.mark.parametrize("pages", [0, 9])
def test_companions_change_nothing(expected, ruled, pages):
    """To the last bit, for those with rules and those without, also moved out and back in."""
    engine = make_engine(eos_id=EOS, pages=pages)
    given = prompts()
    plain = SamplingParams(max_tokens=12, logprobs=5, ignore_eos=True)
    mixed = [(p, plain) for p in given] + CASES
    order = np.random.default_rng(1).permutation(len(mixed)).tolist()
    found = engine.generate([mixed[i][0] for i in order], [mixed[i][1] for i in order])
    back = dict(zip(order, found, strict=True))
    assert [back[i] for i in range(len(given))] == expected
    assert [back[len(given) + i] for i in range(len(CASES))] == ruled
    assert not pages or engine.stats()["evictions"]
    engine.close()


def test_requests_without_rules_take_todays_programs(expected, monkeypatch):
    engine = make_engine()

    def never(*given):
        raise AssertionError("drawn again")

    monkeypatch.setattr(engine._steps, "redraw", never)
    monkeypatch.setattr("engram_jax.serve.engine.no_adjustments", never)
    assert engine.generate(prompts(), GREEDY) == expected
    engine.close()


def test_draws_with_rules_depend_on_the_seed_only():
    engine = make_engine()
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, min_p=0.05, top_k=20)
    prompt = prompts()[3]
    alone = engine.generate([prompt], params)
    other = SamplingParams(max_tokens=12, temperature=1.5, seed=6, frequency_penalty=1.0)
    assert engine.generate([prompt, prompts()[2]], [params, other])[:1] == alone
    engine.close()


@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [(0.3, 0, 1.0), (0.6, 0, 1.0), (1.0, 0, 1.0), (0.0, 0, 1.0), (0.1, 3, 1.0), (0.2, 0, 0.7)],
)
def test_draws_follow_the_distribution_of_min_p(min_p, top_k, top_p):
    """20,000 draws: four standard deviations are 0.014."""
    logits, count = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05])), 20_000
    for temperature in (1.0, 0.5):
        found = _draws()(
            np.tile(logits.astype(np.float32), (count, 1)),
            np.zeros(count, np.uint32),
            np.arange(count, dtype=np.int32),
            np.full(count, temperature, np.float32),
            np.full(count, top_p, np.float32),
            np.full(count, top_k, np.int32),
            np.full(count, min_p, np.float32),
        )
        share = np.bincount(np.asarray(found), minlength=5) / count
        wanted = oracle.probabilities(logits, temperature, min_p=min_p, top_k=top_k, top_p=top_p)
        np.testing.assert_allclose(share, wanted, atol=0.014)
        assert not share[wanted == 0].any()


@lru_cache
def _draws():
    return jax.jit(sample_rows)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"allowed_ids": (VOCAB,)}, f"allowed_token_ids: token id {VOCAB}: must be from 0 to"),
        ({"bad_words": ((1, VOCAB + 3),)}, "bad_words: token id 64"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: token id -1"),
        ({"stop_ids": (99,)}, "stop_token_ids: token id 99"),
        ({"allowed_ids": (EOS,), "min_tokens": 1}, "must have a token that bad_words and min_"),
        ({"allowed_ids": (1, 2), "bad_words": ((1,), (2, 2))}, "must have a token that bad_words"),
        ({"allowed_ids": (1, 2), "bad_words": ((2, 1), (1, 2, 2))}, "must have a token that bad_"),
        ({"allowed_ids": (1, EOS), "min_tokens": 2, "stop_ids": (1,)}, "must have a token"),
    ],
)
def test_rules_that_cannot_be_kept(rules, words):
    with pytest.raises(UserError, match=words):
        check_rules(SamplingParams(**rules), EOS, VOCAB)
    engine = make_engine(eos_id=EOS)
    with pytest.raises(UserError, match=words):
        engine.submit([1], SamplingParams(max_tokens=12, **rules))
    engine.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_tokens": 129}, "min_tokens = 129: must be from 0 to max_tokens = 128"),
        ({"min_tokens": -1}, "min_tokens = -1"),
        ({"min_p": 1.1}, "min_p = 1.1"),
        ({"min_p": float("nan")}, "min_p = nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf"),
        ({"presence_penalty": 2.01}, "presence_penalty = 2.01: must be from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty = nan"),
        ({"allowed_ids": ()}, r"allowed_ids = \(\)"),
        ({"bad_words": ((),)}, "bad_words = "),
        ({"bad_words": ((1,),) * 33}, "bad_words = "),
        ({"logit_bias": ((1, 2.0), (1, 3.0))}, "logit_bias = "),
        ({"logit_bias": ((1, 100.5),)}, "logit_bias = "),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias = "),
    ],
)
def test_impossible_settings(values, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**values)


def test_what_stops_a_sequence_may_belong_to_it():
    prompt = prompts()[3]
    engine = make_engine(eos_id=EOS)
    plain = engine.generate([prompt], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    at = next(i for i, t in enumerate(plain.tokens) if i > 2 and t not in plain.tokens[:i])
    for include in (False, True):
        params = SamplingParams(
            max_tokens=12, stop_ids=(plain.tokens[at],), include_stop=include, logprobs=0
        )
        found = engine.generate([prompt], params)[0]
        assert found.tokens == plain.tokens[: at + include] and found.finish == Finish.STOP
        assert found.sampled == at + 1 and len(found.logprobs) == at + include
    engine.close()


def test_a_token_that_ends_is_counted():
    engine = make_engine(eos_id=EOS)
    before = engine.stats()["generated_tokens"]
    only = SamplingParams(max_tokens=5, allowed_ids=(EOS,))
    found = engine.generate([[1, 2], [3]], only)
    assert [(c.tokens, c.sampled, c.finish) for c in found] == [((), 1, Finish.STOP)] * 2
    assert engine.stats()["generated_tokens"] - before == 2
    deltas = list(engine.stream([1, 2], only))
    assert Completion.of(deltas) == found[0]
    engine.close()
