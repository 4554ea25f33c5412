"""A client with hundreds of sequences beside one with a single one, over HTTP."""

from __future__ import annotations

import pytest

from tests.serve.web import QUEUE, read_all

MANY = {"n": QUEUE, "max_tokens": 60, "ignore_eos": True, "stream": True}


@pytest.fixture
def many(web):
    """All of the queue is a client's; most of it waits."""
    web.idle()
    connection = web.begin(**MANY)
    while web.runner.stats()["waiting"] < QUEUE // 2:
        pass
    yield connection
    connection.close()
    web.idle()


def test_one_sequence_does_not_wait_for_all_of_anothers(web, many):
    """It is answered while most of the other's wait, and the other is answered, too."""
    one = web.complete("xy", max_tokens=20, ignore_eos=True)
    assert one.status == 200 and web.runner.stats()["waiting"] > QUEUE // 3
    got = read_all(many)
    assert got.count(b'"finish_reason":"length"') == QUEUE and b"data: [DONE]" in got


def test_the_queue_is_not_one_clients(web, many):
    """An even share of it is another's, and no more while it is full."""
    refused = web.complete("xy", n=QUEUE, max_tokens=2)
    assert refused.status == 429 and refused.error["code"] == "queue_full"
    streamed = [web.begin("xy", max_tokens=2, ignore_eos=True, stream=True) for _ in range(3)]
    for one in streamed:
        assert read_all(one).count(b'"finish_reason":"length"') == 1
    assert web.runner.stats()["waiting"] > 0


def test_prompts_of_one_client_do_not_hold_up_anothers(web, beside):
    """64 long prompts to compute, and one short one."""
    web.idle()
    scored = web.begin(["a" * 60] * QUEUE, max_tokens=1, logprobs=1, echo=True, stream=True)
    while web.runner.stats()["waiting"] < QUEUE // 2:
        pass
    assert web.complete("xy", max_tokens=1).status == 200
    assert web.runner.stats()["waiting"] > QUEUE // 4
    assert read_all(scored).count(b'"finish_reason":"') >= QUEUE
