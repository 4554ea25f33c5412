"""Prometheus' text of a server, read by Prometheus' own parser."""

from __future__ import annotations

import time
from bisect import bisect_left

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engram_jax import __version__
from engram_jax.serve.http.metrics import BUCKETS, ENGINE, Histogram, Metrics, Timing
from engram_jax.serve.request import Delta, Finish, SamplingParams
from tests.serve.served import host_memory, make_engine, model
from tests.serve.web import EOS, QUEUE, Running, tokenizer


@pytest.fixture(scope="module")
def server(web_engine):
    with Running(web_engine) as running:
        yield running


def families(server):
    return {f.name: f for f in text_string_to_metric_families(server.get("/metrics").body.decode())}


def value(server, name, **labels):
    """Of one sample; 0 if there is none."""
    found = families(server).values()
    samples = [s for f in found for s in f.samples if s.name == name and s.labels == labels]
    return samples[0].value if samples else 0.0


def test_every_number_has_a_meaning_and_a_type(server):
    found = families(server)
    assert all(
        f.documentation and f.type in ("gauge", "counter", "histogram") for f in found.values()
    )
    assert {f"engram_{name}" for name in server.runner.stats()} <= set(found)
    assert set(server.runner.stats()) == set(ENGINE)
    assert server.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_choices_share_their_prompt(server):
    """Four answers to a prompt of 41 tokens: the chunks before the last one are computed once."""
    names = ("prefix_hits", "prefix_hit_tokens", "prompt_tokens")

    def counts():
        time.sleep(0.2)  # the numbers are at most 0.1 s old
        found = server.stats()
        assert found["engram_free_pages"] == found["engram_pages"] > found["engram_prefix_pages"]
        return [found[f"engram_{name}"] for name in names]

    before = counts()
    prompt = [(7 * i) % 50 for i in range(41)]
    assert server.complete(prompt, n=4, max_tokens=2).status == 200
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3 * 40, 40 + 4]
    assert server.complete(prompt, cache_salt="x", max_tokens=2).status == 200
    assert counts()[:2] == after[:2]
    wrong = server.complete(prompt, cache_salt="", max_tokens=2)
    assert wrong.status == 400
    assert wrong.error["message"] == "cache_salt = '': must be a text of 1 to 256 characters"


def test_times_and_ends(server):
    names = ("time_to_first_token", "inter_token", "sequence")
    counts = [f"engram_{name}_seconds_count" for name in names]
    before = [value(server, name) for name in counts]
    length = value(server, "engram_finished_sequences_total", reason="length")
    began = time.monotonic()
    assert server.complete(n=2, max_tokens=5, ignore_eos=True).status == 200
    took = time.monotonic() - began
    server.idle()
    after = [value(server, name) for name in counts]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 8, 2]
    assert value(server, "engram_finished_sequences_total", reason="length") - length == 2
    stop = value(server, "engram_finished_sequences_total", reason="stop")
    assert server.complete(allowed_token_ids=[EOS]).status == 200
    assert value(server, "engram_finished_sequences_total", reason="stop") - stop == 1
    sums = [value(server, f"engram_{name}_seconds_sum") for name in names]
    assert 0 < sums[0] < sums[2] and took > 0
    buckets = families(server)["engram_sequence_seconds"].samples[: len(BUCKETS) + 1]
    heights = [sample.value for sample in buckets]
    assert heights == sorted(heights) and buckets[-1].labels == {"le": "+Inf"}


def test_a_histogram_counts_what_is_not_longer():
    made = Histogram()
    seconds = [0.0, 0.001, 0.0010001, 0.3, 499.0, 501.0]
    for one in seconds:
        made.add(one)
    found = dict(made.samples())
    for end in BUCKETS:
        assert found[f'_bucket{{le="{end:g}"}}'] == sum(one <= end for one in seconds)
    assert found['_bucket{le="+Inf"}'] == found["_count"] == 6
    assert found["_sum"] == pytest.approx(sum(seconds))
    assert bisect_left(BUCKETS, 0.001) == 0 and list(BUCKETS) == sorted(BUCKETS)


def test_what_has_not_ended_is_cancelled_once():
    metrics = Metrics()
    for accepted in (False, True):  # one that the engine refused has no sequences
        timing = Timing(metrics, time.monotonic(), 3)
        timing.accepted = accepted
        timing.note(0, Delta(0, finish=Finish.ERROR, error="x"))
        timing.close()
        timing.close()
        timing.note(1, Delta(1, finish=Finish.STOP))
    assert metrics.finished[Finish.CANCELLED] == 2 and metrics.finished[Finish.ERROR] == 2
    assert metrics.finished[Finish.STOP] == 0


def test_a_client_that_goes_is_one_response(server):
    server.idle()
    before = {s: value(server, "engram_http_responses_total", status=s) for s in ("200", "499")}
    cancelled = value(server, "engram_finished_sequences_total", reason="cancelled")
    connection = server.begin(n=QUEUE, max_tokens=60, ignore_eos=True, stream=True)
    assert b"200 OK" in connection.recv(100)
    assert value(server, "engram_active_requests") == 1
    connection.close()
    server.idle()
    while value(server, "engram_active_requests"):
        time.sleep(0.01)
    gone = value(server, "engram_http_responses_total", status="499")
    assert gone - before["499"] == 1
    assert value(server, "engram_finished_sequences_total", reason="cancelled") > cancelled


def test_a_stream_that_ends_in_an_error_is_one():
    made = make_engine(tokenizer=tokenizer())
    with Running(made) as server:
        stream = server.begin(max_tokens=60, n=2, stream=True)
        got = stream.recv(20)
        assert b"200" in got
        made._steps = None  # what a lost device does: every further step raises
        while b"[DONE]" not in got:
            got += stream.recv(65536)
        assert b'data: {"error":' in got
        while value(server, "engram_active_requests"):
            time.sleep(0.01)
        assert value(server, "engram_http_responses_total", status="500") == 1
        failed = value(server, "engram_failed_sequences_total")
        assert failed == value(server, "engram_finished_sequences_total", reason="error") >= 1
        # The answer has ended with the first one; the other is cancelled then.
        cancelled = value(server, "engram_finished_sequences_total", reason="cancelled")
        assert failed + cancelled == 2
        stream.close()


@pytest.mark.parametrize("where", ["device", "host"])
def test_lookups_are_those_of_tokens(where):
    """Not of the padding of a chunk, nor of unused rows of a batch."""
    made = make_engine(memory=None if where == "device" else host_memory(*model()))
    heads = model()[0].config.model.engram.heads
    made.generate([[1] * 11, [2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))
    stats = made.stats()
    assert stats["rows_lookups"] == (11 + 4 + 2 + 4) * heads
    assert stats["rows_hits_device"] == (stats["rows_lookups"] if where == "device" else 0)
    assert stats["generated_tokens"] == 10 and stats["prompt_tokens"] == 13
    made.close()


def test_version(server):
    answer = server.get("/version")
    assert answer.status == 200 and answer.json == {"version": __version__}
    assert server.send("POST", "/version", "{}").status == 405
