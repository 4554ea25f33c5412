"""Beginnings of prompts that are computed once: which, for whom, and that no bit changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engram_jax.serve.engine_steps import EngineSteps
from engram_jax.serve.pages import Pages
from engram_jax.serve.request import Finish, SamplingParams
from engram_jax.serve.scheduler import Schedule, Sequence
from engram_jax.serve.staged_rows import StagedMemory
from tests.serve.served import (
    GREEDY,
    SERVE,
    Damaged,
    host_memory,
    host_tables,
    make_engine,
    model,
    prompts,
    rows_of,
)

CHUNK = SERVE.prefill_chunk
BASE = prompts([40], seed=3)[0]


def stored(schedule):
    """The units that are remembered, with the tokens up to their ends."""
    found = {}

    def walk(unit, salt, tokens):
        for key, one in unit.behind.items():
            whole = tokens + np.frombuffer(key, np.int32).tolist()
            found[salt, tuple(whole)] = one
            walk(one, salt, whole)

    for salt, root in schedule.prefixes._roots.items():
        walk(root, salt, [])
    return found


@pytest.mark.parametrize("seed", range(40))
def test_any_load_is_served_with_the_states_of_its_own_tokens(seed):
    """A device that is imitated: a page holds the tokens that were computed into it, and a sequence
    must find its own prompt in its pages, whoever computed it. Everything ends, nothing is lost."""
    rng = np.random.default_rng(seed)
    page, chunk = int(rng.choice([1, 2, 4, 6])), int(rng.choice([2, 3, 4, 8]))
    longest = int(rng.integers(12, 40))
    pages = Pages(-(-longest // page) + int(rng.integers(0, 12)), page)
    slots = int(rng.integers(1, 6))
    schedule = Schedule(slots, pages, queue=64, chunk=chunk)
    prefixes, unit = schedule.prefixes, int(np.lcm(chunk, page))
    tails: dict[int, tuple[int, ...]] = {}  # what a row of the kept tails is behind
    held = np.full((pages.total, page), -1)
    family = rng.integers(0, 3, (3, longest))
    arriving, ended = [], 0
    for number in range(40):
        tokens = family[rng.integers(3)][: rng.integers(1, longest)].copy()
        tokens[int(rng.integers(len(tokens))) :] = rng.integers(0, 3)
        most = int(rng.integers(1, longest - len(tokens) + 1))
        one = Sequence(number, tokens, SamplingParams(most), np.zeros(0, np.int32))
        one.salt = "ab"[rng.integers(2)]
        if rng.random() < 0.3:  # its end alone is scored, or all of it
            one.shares = int(rng.integers(len(tokens)))
        arriving.append(one)

    def compute(s, count):
        for at in range(s.computed, s.computed + count):
            token = s.prompt[at] if at < len(s.prompt) else 7
            assert schedule.prefixes._idle.keys().isdisjoint(s.shared)
            held[s.pages[at // page], at % page] = token
        s.computed += count

    def check(s):
        whole = [*s.prompt[: s.computed], *[7] * max(0, s.computed - len(s.prompt))]
        found = held[s.pages[: -(-s.computed // page)]].reshape(-1)[: s.computed]
        assert found.tolist() == [int(t) for t in whole]

    for _turn in range(20_000):
        while arriving and rng.random() < 0.5:
            schedule.submit(arriving.pop())
        ready, leaving = schedule.room_for_next()
        for one in leaving:
            one.saved = held[one.pages].copy()
            schedule.vacate(one)
        for one in ready:
            schedule.grow(one)
            compute(one, 1)
            one.generated.append(7)
        for one in schedule.prefilling(2):
            compute(one, min(chunk, len(one.prompt) - one.computed))
            if not one.prefilling:
                one.generated.append(7)
            if (made := prefixes.add(one)) is not None:
                assert one.computed % unit == 0
                tails[made.row] = tuple(one.prompt[: one.computed].tolist())
        for one in [*schedule.running, *schedule.evicted]:
            if len(one.generated) >= one.params.max_tokens or rng.random() < 0.01:
                schedule.end(one)
                ended += 1
        for one in schedule.readmit():
            held[one.pages[: len(one.saved)]] = one.saved
        for one in [*(s for s in schedule.admit() if s.shared), *schedule.adopt()]:
            assert tails[one.shared[-1].row] == tuple(one.prompt[: one.computed].tolist())
            assert one.shared[-1].salt == one.salt and one.prefilling
            assert one.computed <= one.shares
        for one in schedule.running:
            check(one)
        units = stored(schedule)
        for (_, tokens), one in units.items():
            assert held[one.pages].reshape(-1).tolist() == list(tokens[-unit:])
            assert one.holders == sum(one in s.shared for s in schedule.running)
        own = [p for s in schedule.running for p in s.pages[len(s.shared) * unit // page :]]
        kept = [p for one in units.values() for p in one.pages]
        assert len(set(own + kept)) == len(own + kept) == pages.total - pages.free
        needed = {*own, *(p for one in units.values() if one.holders for p in one.pages)}
        assert schedule.free == pages.total - len(needed)
        if not arriving and not schedule.busy:
            break
    assert ended == 40 and schedule.free == pages.total
    assert prefixes.hits or unit > 4  # or the prompts have too little in common
    prefixes.evict(pages.total)
    assert pages.free == pages.total and not prefixes._roots
    serve = dataclasses.replace(SERVE, page=page, prefill_chunk=chunk)
    assert len(prefixes._rows) == serve.kept_prefixes(pages.total)


def run(engine, given, params=GREEDY):
    before = engine.stats()
    found = engine.generate(given, params)
    after = engine.stats()
    return found, {key: after[key] - before[key] for key in after}


def alone(engine, given, params):
    """Every prompt computed whole: each has a salt of its own."""
    params = [params] * len(given) if isinstance(params, SamplingParams) else params
    own = [dataclasses.replace(p, cache_salt=f"alone {i}") for i, p in enumerate(params)]
    found, counts = run(engine, given, own)
    assert counts["prefix_hits"] == 0
    assert counts["prompt_tokens"] == sum(map(len, given)) or counts["evictions"]
    return found


@pytest.mark.parametrize(
    "engine",
    [{}, {"page": 16, "prefill_sequences": 1}, {"page": 4, "pages": 18}],
    ids=["a chunk a page", "two chunks, one by one", "two pages, evictions"],
)
def test_no_bit_changes(engine):
    """Prompts with beginnings in common, at once and again, beside others; one ends where a unit
    does, one is another's beginning."""
    given = [BASE, BASE, BASE[:24], BASE[:16] + BASE[:9], *prompts([20, 7]), BASE[:17], BASE[:33]]
    drawn = SamplingParams(12, temperature=1.0, logprobs=5)
    params = [GREEDY, dataclasses.replace(drawn, seed=1), *[GREEDY] * 3, drawn, GREEDY, drawn]
    made = make_engine(**engine)
    wanted = alone(made, given, params)
    for _ in range(2):
        found, counts = run(made, given, params)
        assert found == wanted
        assert counts["prefix_hits"] and counts["prefix_hit_tokens"]
        total = sum(map(len, given)) - counts["prefix_hit_tokens"]
        assert counts["prompt_tokens"] == total or made.stats()["evictions"]
    stats = made.stats()
    assert stats["free_pages"] == stats["pages"] > stats["prefix_pages"] > 0
    made.close()


def test_one_prompt_is_computed_once(engine):
    """n answers: the last token of the prompt is computed for each, the units before it once."""
    found, counts = run(engine, [BASE] * 6)
    assert all(one == found[0] for one in found)
    rest = len(BASE) - (len(BASE) - 1) // CHUNK * CHUNK
    assert counts["prompt_tokens"] == len(BASE) + 5 * rest
    assert counts["prefix_hits"] == 5 and counts["prefix_hit_tokens"] == 5 * (len(BASE) - rest)


def test_rows_from_the_host_and_prompts_that_are_scored():
    """Where all of a prompt's log-probabilities are asked for, it is computed whole."""
    program, weights = model()
    scored = dataclasses.replace(GREEDY, prompt_logprobs=True)
    params = [GREEDY, scored, GREEDY]
    made = make_engine(host_memory(program, weights, np.arange(9)))
    wanted = alone(made, [BASE] * 3, params)
    for _ in range(2):
        found, counts = run(made, [BASE] * 3, params)
        assert found == wanted and counts["prompt_tokens"] >= len(BASE)
    assert len(found[1].prompt_logprobs) == len(BASE) - 1
    made.close()


def test_salts_keep_apart(engine):
    salted = [dataclasses.replace(GREEDY, cache_salt=salt) for salt in "aab"]
    first, counts = run(engine, [BASE] * 3, salted)
    assert counts["prefix_hits"] == 1 and first[1:] == first[:1] * 2
    again, counts = run(engine, [BASE] * 2, [GREEDY, salted[0]])
    assert counts["prefix_hits"] == 1 and again == first[:2]


def test_nothing_is_kept_of_what_could_not_be_read():
    """The rows of the third unit are damaged: the two before it are kept, and good."""
    program, weights = model()
    rows = rows_of(BASE)[0]
    bad = np.setdiff1d(rows[2 * CHUNK : 3 * CHUNK], rows[: 2 * CHUNK])
    source = Damaged(host_tables(program, weights)["1"], bad)
    made = make_engine({"1": StagedMemory(program, source)})
    (found,), counts = run(made, [BASE])
    assert found.finish == Finish.ERROR and counts["prefix_pages"] == 2
    source.bad = []
    found, counts = run(made, [BASE])
    assert counts["prefix_hit_tokens"] == 2 * CHUNK
    assert found == alone(made, [BASE], GREEDY)
    made.close()


def test_switched_off():
    program, _ = model()
    steps = EngineSteps(program, dataclasses.replace(SERVE, share_prefixes=False))
    assert steps.shared_chunk == steps.units == 0
    schedule = Schedule(2, Pages(16, SERVE.page), queue=2, chunk=0)
    one = Sequence(0, np.array(BASE), GREEDY, np.zeros(0, np.int32))
    schedule.submit(one)
    assert schedule.admit() == schedule.prefilling(2) == [one]
    one.computed = CHUNK
    assert schedule.prefixes.add(one) is None and schedule.adopt() == []
