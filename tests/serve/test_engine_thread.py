"""The thread that owns the engine: order, atomic groups, cancellation, drain and failure."""

from __future__ import annotations

import queue
import random
import threading

import pytest

from engram_jax.config.errors import UserError
from engram_jax.serve.http.engine_thread import CLOSED, FAILED, ClosedError, EngineThread
from engram_jax.serve.request import Completion, Delta, Finish, QueueFullError, SamplingParams
from tests.serve.served import SERVE, make_engine

PROMPT = [1, 2, 3]
WAIT = 30.0  # s, for what takes milliseconds


def params(tokens=5, **other):
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **other)


class Heard:
    """A listener."""

    def __init__(self):
        self.queue: queue.Queue[tuple[int, Delta]] = queue.Queue()

    def __call__(self, place: int, delta: Delta) -> None:
        self.queue.put((place, delta))

    def all(self, sequences: int) -> list[list[Delta]]:
        """The deltas of every sequence, to its end."""
        out: list[list[Delta]] = [[] for _ in range(sequences)]
        while sequences:
            place, delta = self.queue.get(timeout=WAIT)
            out[place].append(delta)
            sequences -= delta.finish is not None
        return out

    def finishes(self, sequences: int) -> list[Finish | None]:
        return [deltas[-1].finish for deltas in self.all(sequences)]


class Held(Heard):
    """A listener that stops the engine's thread at its first delta, until it is let go."""

    def __init__(self):
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, place: int, delta: Delta) -> None:
        self.reached.set()
        assert self.go.wait(WAIT)
        super().__call__(place, delta)


@pytest.fixture
def engine():
    made = make_engine(queue=8)
    yield made
    made.close()


@pytest.fixture
def runner(engine):
    made = EngineThread(engine)
    yield made
    made.close()


def test_groups_get_what_the_engine_gives_alone(engine):
    prompts = [[1], [5, 6, 7, 8], list(range(30))]
    each = [params(n, temperature=t, seed=n) for n, t in [(3, 0.0), (9, 1.0), (20, 0.7)]]
    expected = engine.generate(prompts, each)
    runner = EngineThread(engine)
    listeners = [Heard() for _ in range(2)]
    for heard in listeners:
        group = runner.submit(list(zip(prompts, each, strict=True)), heard)
        assert group.accepted.result(WAIT) is None
    for heard in listeners:
        assert [Completion.of(d) for d in heard.all(3)] == expected
    runner.close()
    assert runner.stats()["running"] == 0


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ([([10**6], params())], UserError),
        ([(PROMPT, params(SERVE.capacity))], UserError),
        ([(PROMPT, params())] * 8, QueueFullError),
    ],
)
def test_a_group_is_taken_whole_or_not_at_all(runner, last, error):
    beside, refused = Heard(), Heard()
    runner.submit([(PROMPT, params(40))], beside)
    group = runner.submit([(PROMPT, params())] * 2 + last, refused)
    with pytest.raises(error):
        group.accepted.result(WAIT)
    assert beside.finishes(1) == [Finish.LENGTH]
    assert runner.drain(WAIT)
    assert refused.queue.empty()
    assert runner.stats()["generated_tokens"] == 40


def test_cancelled_before_and_after_it_is_taken(runner):
    held, running, waiting, last = Held(), Heard(), Heard(), Heard()
    runner.submit([(PROMPT, params(50))], held)
    assert held.reached.wait(WAIT)  # from here on nothing moves
    given_up = runner.submit([(PROMPT, params(50))], waiting)
    assert given_up.accepted.cancel()
    at_once = runner.submit([(PROMPT, params(50))] * 2, running)
    at_once.cancel()
    runner.submit([(PROMPT, params(2))], last)
    held.go.set()
    assert at_once.accepted.result(WAIT) is None
    assert last.finishes(1) == [Finish.LENGTH]
    assert held.finishes(1) == [Finish.LENGTH]
    assert runner.drain(WAIT)
    assert running.queue.empty() and waiting.queue.empty()
    assert runner.stats()["generated_tokens"] == 50 + 2
    at_once.cancel()  # nothing


def test_drain_lets_what_runs_finish(runner):
    held = Held()
    runner.submit([(PROMPT, params(50))], held)
    assert held.reached.wait(WAIT)
    accepted = runner.submit([(PROMPT, params(3))], (late := Heard()))
    done = []
    drain = threading.Thread(target=lambda: done.append(runner.drain(WAIT)))
    drain.start()
    while runner.state != "draining":
        pass
    with pytest.raises(ClosedError):
        runner.submit([(PROMPT, params())], Heard()).accepted.result(0)
    held.go.set()
    drain.join(WAIT)
    assert done == [True] and accepted.accepted.done()
    assert held.finishes(1) == late.finishes(1) == [Finish.LENGTH]


def test_drain_cancels_what_takes_too_long(runner):
    held = Held()
    runner.submit([(PROMPT, params(50))] * 5, held)
    assert held.reached.wait(WAIT)
    threading.Timer(0.2, held.go.set).start()
    assert not runner.drain(0.1)
    assert Finish.CANCELLED in held.finishes(5)
    assert runner.stats()["running"] == runner.stats()["waiting"] == 0


def test_close_ends_everything(runner):
    held = Held()
    runner.submit([(PROMPT, params(50))] * 5, held)
    assert held.reached.wait(WAIT)
    late = runner.submit([(PROMPT, params())], Heard())
    threading.Timer(0.2, held.go.set).start()
    runner.close()
    ends = [deltas[-1] for deltas in held.all(5)]
    assert {(end.finish, end.error) for end in ends} == {(Finish.ERROR, CLOSED)}
    with pytest.raises(ClosedError):
        late.accepted.result(0)
    runner.close()


def test_an_engine_that_fails(engine, runner, caplog):
    held, other = Held(), Heard()
    runner.submit([(PROMPT, params(50))], held)
    runner.submit([(PROMPT, params(50))], other)
    assert held.reached.wait(WAIT)
    late = runner.submit([(PROMPT, params())], (third := Heard()))
    engine._steps = None  # every further step raises
    held.go.set()
    for heard in (held, other):
        (last,) = [deltas[-1] for deltas in heard.all(1)]
        assert (last.finish, last.error) == (Finish.ERROR, FAILED)
    if late.accepted.exception(WAIT) is None:  # it was taken before that step
        assert third.finishes(1) == [Finish.ERROR]
    with pytest.raises(ClosedError, match="failed"):
        runner.submit([(PROMPT, params())], Heard()).accepted.result(WAIT)
    assert runner.state == "failed"
    assert [bool(r.exc_info) for r in caplog.records] == [True]
    assert runner.drain(WAIT)  # nothing is left to wait for


def test_a_listener_that_fails(runner, caplog):
    def fails(place: int, delta: Delta) -> None:
        raise RuntimeError("its event loop is closed")

    beside = Heard()
    runner.submit([(PROMPT, params(50))] * 2, fails)
    runner.submit([(PROMPT, params(20))], beside)
    assert beside.finishes(1) == [Finish.LENGTH]
    assert runner.drain(WAIT) and runner.state == "draining"
    assert runner.stats()["generated_tokens"] < 60
    assert "its event loop is closed" in caplog.text


def test_many_threads(runner):
    """Everybody who is not refused hears the end, unless it was they who cancelled."""
    ends: queue.Queue[Finish | str] = queue.Queue()

    def user(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(10):
            heard, n = Heard(), rng.randint(1, 3)
            group = runner.submit([(PROMPT, params(rng.randint(1, 9)))] * n, heard)
            if rng.random() < 0.3:
                group.cancel()
                continue
            try:
                group.accepted.result(WAIT)
            except QueueFullError:
                ends.put("full")
                continue
            for finish in heard.finishes(n):
                ends.put(finish)

    threads = [threading.Thread(target=user, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert runner.drain(WAIT)
    stats = runner.stats()
    assert stats["running"] == stats["waiting"] == 0 and stats["free_pages"] == stats["pages"]
    found = set(ends.queue)
    assert Finish.LENGTH in found and found <= {Finish.LENGTH, "full"}
