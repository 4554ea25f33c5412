"""How requests begin and end: refusals, stops, cancellation, streams."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.config.errors import UserError
from engram_jax.serve.request import (
    Completion,
    Finish,
    Logprob,
    PromptLogprobs,
    QueueFullError,
    SamplingParams,
)
from tests.serve.served import GREEDY, LENGTHS, make_engine, prompts, served
from tests.tiny import VOCAB


def test_sequences_end_where_they_should(expected):
    tokens = expected[3].tokens
    at = next(i for i, t in enumerate(tokens) if t not in tokens[:i] and i > 2)
    prompt = [prompts()[3]]

    def one(params, eos_id=None):
        return served(params, prompt, eos_id=eos_id)[0][0]

    by_id = one(SamplingParams(max_tokens=12, stop_ids=(tokens[at],)))
    assert (by_id.tokens, by_id.finish) == (tokens[:at], Finish.STOP)
    assert one(SamplingParams(max_tokens=12), eos_id=tokens[at]) == by_id
    through = one(SamplingParams(max_tokens=12, ignore_eos=True), eos_id=tokens[at])
    assert (through.tokens, through.finish) == (tokens, Finish.LENGTH)
    assert one(SamplingParams(max_tokens=1)).tokens == tokens[:1]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("pages", [0, 9])
def test_cancelling_disturbs_nobody(expected, steps, pages):
    engine = make_engine(pages=pages)
    numbers = [engine.submit(p, GREEDY) for p in prompts()]
    deltas = {n: [] for n in numbers}
    gone = numbers[1::2]
    for turn in range(10_000):
        if turn == steps:
            for n in [*gone, *gone, -1, 10**9]:
                engine.cancel(n)
        for delta in engine.step():
            deltas[delta.request].append(delta)
        if not engine.busy:
            break
    found = [Completion.of(deltas[n]) for n in numbers]
    for i, (number, answer) in enumerate(zip(numbers, found, strict=True)):
        if number in gone:
            assert answer.finish == Finish.CANCELLED
            assert answer.tokens == expected[i].tokens[: len(answer.tokens)]
        else:
            assert answer == expected[i]
    stats = engine.stats()
    assert stats["free_pages"] == stats["pages"] and stats["running"] == 0
    assert engine.generate(prompts(), GREEDY) == expected


def test_what_can_never_be_served_is_refused_at_once(engine):
    def refused(prompt, words, **params):
        with pytest.raises(UserError, match=words):
            engine.submit(prompt, SamplingParams(**params))

    refused([], "at least one token")
    refused([0, VOCAB], f"token id {VOCAB}: must be from 0 to {VOCAB - 1}")
    refused([-1], "token id -1")
    refused([1] * 60, "60 tokens and max_tokens = 5: must be at most 64", max_tokens=5)
    refused([1], "top_k = 62", top_k=62, max_tokens=1)
    refused([1], "stop: must be empty", stop=("x",), max_tokens=1)
    assert not engine.busy


def test_the_queue_is_bounded():
    engine = make_engine(queue=2)
    for _ in range(2):
        engine.submit([1], GREEDY)
    with pytest.raises(QueueFullError, match="2 sequences are waiting"):
        engine.submit([1], GREEDY)
    while engine.busy:
        engine.step()
    assert len(engine.generate(prompts(), GREEDY)) == len(LENGTHS)  # it waits by itself
    engine.close()


def test_streaming_gives_a_token_at_a_time_and_can_be_left(engine, expected):
    deltas = list(engine.stream(prompts()[2], GREEDY))
    assert Completion.of(deltas) == expected[2]
    assert [len(d.tokens) for d in deltas] == [1] * 12 + [0]
    for delta in engine.stream(prompts()[2], GREEDY):
        assert delta.tokens == expected[2].tokens[:1]
        break
    assert engine.generate(prompts(), GREEDY) == expected
    assert not engine.busy and engine.stats()["running"] == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"stop": ("",)}, "stop = "),
        ({"stop": ("a",) * 17}, "stop = "),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"prompt_logprobs": True}, "prompt_logprobs = True"),
    ],
)
def test_impossible_settings(values, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**values)


def test_log_probabilities_of_a_prompt_are_entries_in_order():
    """Whatever the parts they came in; copies, for the arrays are the engine's."""
    rng = np.random.default_rng(0)
    whole, found, parts = [], PromptLogprobs(), (3, 20, 1)
    for tokens in parts:
        ids, own = rng.integers(9, size=(tokens, 5)), rng.normal(size=(tokens, 5))
        found.add(ids[:, 0], own[:, 0], ids[:, 1:3], own[:, 1:3])
        for row in range(tokens):
            top = {int(ids[row, 1]): own[row, 1], int(ids[row, 2]): own[row, 2]}
            whole.append(Logprob(int(ids[row, 0]), own[row, 0], top))
        ids[:], own[:] = 0, 0.0
    assert len(found) == 24 and found == tuple(whole) and list(found) == whole
    for i in (0, 3, 22, 23, -1, -24):
        assert found[i] == whole[i]
    assert found[2:24:7] == tuple(whole[2:24:7]) and found != tuple(whole[:-1])
    for beyond in (24, -25):
        with pytest.raises(IndexError):
            found[beyond]
    assert not PromptLogprobs() and PromptLogprobs() == ()
