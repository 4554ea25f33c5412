"""Simulated policies against plain Python on small traces; the optimum against brute force."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from functools import cache

import numpy as np
import pytest

from engram_jax.memory.store import cache_policies


def trace(rng: np.random.Generator, batches: int, size: int, rows: int, since: int = 0):
    return cache_policies.record(
        [rng.integers(0, rows, size).astype(np.int32) * 10 for _ in range(batches)], since
    )


def test_a_trace_has_each_row_once_per_batch():
    got = cache_policies.record([np.array(b, np.int32) for b in ([7, 3, 7], [], [9, 3])], since=1)
    assert list(got.rows) == [3, 7, 9]
    assert list(got.ids) == [0, 1, 0, 2] and list(got.edges) == [0, 2, 2, 4]
    assert got.since == 2 and got.lookups == 2


def best(ids: tuple[int, ...], capacity: int) -> int:
    """The most hits any choice gets: after each lookup keep any subset of what is at hand."""

    @cache
    def hits(at: int, inside: frozenset[int]) -> int:
        if at == len(ids):
            return 0
        here = inside | {ids[at]}
        kept = [here] if len(here) <= capacity else [here - {row} for row in here]
        return (ids[at] in inside) + max(hits(at + 1, some) for some in kept)

    return hits(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_belady_is_the_optimum(seed, capacity):
    some = trace(np.random.default_rng(seed), 6, 3, 6)
    assert cache_policies.belady(some, capacity) == best(tuple(some.ids.tolist()), capacity)


def plain_lru(ids, capacity):
    inside: OrderedDict[int, None] = OrderedDict()
    for row in ids:
        yield row in inside
        inside[row] = None
        inside.move_to_end(row)
        if len(inside) > capacity:
            inside.popitem(last=False)


def plain_lfu_hits_at_most(ids, capacity):
    """Perfect counting; ties may go either way, so the rows inside are those of a correct heap."""
    counts: Counter[int] = Counter()
    inside: set[int] = set()
    for row in ids:
        counts[row] += 1
        yield row in inside
        if row not in inside:
            if len(inside) < capacity:
                inside.add(row)
            elif counts[row] > min(counts[r] for r in inside):
                least = min(counts[r] for r in inside)
                candidates = [r for r in inside if counts[r] == least]
                inside -= {candidates[0]}
                inside.add(row)


def plain_s3_fifo(ids, capacity):
    """Written from the paper's Algorithm 1, with ghosts by the number of departures since."""
    small_most = max(1, capacity // 10)
    small, main, uses, left = deque(), deque(), {}, {}
    departed = 0
    for row in ids:
        yield row in uses
        if row in uses:
            uses[row] = min(3, uses[row] + 1)
            continue
        while len(uses) >= capacity:
            if len(small) >= small_most:
                old = small.popleft()
                if uses[old]:
                    main.append(old)
                    uses[old] = 0
                else:
                    del uses[old]
                    departed += 1
                    left[old] = departed
            else:
                old = main.popleft()
                if uses[old]:
                    uses[old] -= 1
                    main.append(old)
                else:
                    del uses[old]
        ghost = row in left and departed - left[row] <= capacity - small_most
        (main if ghost else small).append(row)
        uses[row] = 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 30, 200])
@pytest.mark.parametrize(("name", "plain"), [("LRU", plain_lru), ("S3-FIFO", plain_s3_fifo)])
def test_policies_equal_plain_python(name, plain, seed, capacity):
    rng = np.random.default_rng(seed)
    batches = [np.minimum(rng.zipf(1.3, 20), 150).astype(np.int32) for _ in range(60)]
    some = cache_policies.record(batches, since=20)
    hits = list(plain(some.ids.tolist(), capacity))
    assert cache_policies.ONLINE[name](some, capacity) == sum(hits[some.since :])
    assert cache_policies.ONLINE[name](cache_policies.record(batches), capacity) == sum(hits)


@pytest.mark.parametrize("seed", range(5))
def test_lfu_where_no_counts_tie(seed):
    """Rows with counts that are far apart: which one goes is never a matter of order."""
    rng = np.random.default_rng(seed)
    ids = [row for row in range(8) for _ in range(3**row % 50 + row)]
    batches = [np.array([row], np.int32) for row in rng.permutation(ids)]
    some = cache_policies.record(batches)
    for capacity in (7, 8):
        want = sum(plain_lfu_hits_at_most(some.ids.tolist(), capacity))
        assert abs(cache_policies.lfu(some, capacity) - want) <= (0 if capacity == 8 else 3)


@pytest.mark.parametrize("capacity", [1, 5, 40, 149, 400])
def test_no_policy_beats_the_optimum_and_all_hit_when_all_fits(capacity):
    rng = np.random.default_rng(1)
    batches = [np.minimum(rng.zipf(1.3, 20), 150).astype(np.int32) for _ in range(60)]
    some = cache_policies.record(batches)
    most = cache_policies.belady(some, capacity)
    for simulate in cache_policies.ONLINE.values():
        assert 0 <= simulate(some, capacity) <= most
        if capacity > 150:
            assert simulate(some, capacity) == most == some.ids.size - len(some.rows)


def test_static_keeps_what_it_was_told():
    some = cache_policies.record(
        [np.array(b, np.int32) for b in ([4, 8], [4, 6], [4, 8, 2])], since=1
    )
    assert cache_policies.static(some, 2, np.array([8, 2, 4], np.int32)) == 2
    assert cache_policies.static(some, 3, np.array([8, 2, 4], np.int32)) == 4
    assert cache_policies.static_best(some, 1) == 2 and cache_policies.static_best(some, 9) == 5


def test_sets_start_warm():
    rng = np.random.default_rng(2)
    batches = [np.minimum(rng.zipf(1.3, 20), 150).astype(np.int32) for _ in range(30)]
    some = cache_policies.record(batches)
    ids, counts = np.unique(np.concatenate(batches), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    warm = cache_policies.sets(some, 1000, ids[order].astype(np.int32))
    assert warm == some.ids.size


def plain_sets(ids, capacity, rows):
    """S3-FIFO in sets of 16 with lists: what `sets` says it does, written for reading."""
    ways = min(16, capacity)
    number = capacity // ways if capacity < rows else -(-rows // ways)
    inside = [{"probation": [], "stays": [], "uses": {}, "ghosts": deque()} for _ in range(number)]
    for row in ids:
        here = inside[row % number]
        yield row in here["uses"]
        if row in here["uses"]:
            here["uses"][row] = min(3, here["uses"][row] + 1)
            continue
        ghost = row in here["ghosts"]
        while len(here["uses"]) == ways:
            if len(here["probation"]) >= min(2, ways):
                old = here["probation"].pop(0)
                if here["uses"][old]:
                    here["stays"].append(old)
                    here["uses"][old] = 0
                else:
                    del here["uses"][old]
                    here["ghosts"].append(old)
                    if len(here["ghosts"]) > ways:
                        here["ghosts"].popleft()
            else:
                old = here["stays"].pop(0)
                if here["uses"][old]:
                    here["stays"].append(old)
                    here["uses"][old] -= 1
                else:
                    del here["uses"][old]
        if ghost:  # its place in the ring stays empty until the ring comes round
            ghosts = here["ghosts"]
            here["ghosts"] = deque(None if g == row else g for g in ghosts)
        here["stays" if ghost else "probation"].append(row)
        here["uses"][row] = 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [1, 5, 16, 48, 90, 1000])
def test_the_sets_equal_plain_python(seed, capacity):
    """Batches of one row: within a larger one, rows are all looked up before any comes in."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.25, 3_000), 400).astype(np.int32)
    ids[-1] = 400
    some = cache_policies.record([np.array([row]) for row in ids], since=500)
    hits = list(plain_sets(ids.tolist(), capacity, 401))
    assert cache_policies.sets(some, capacity) == sum(hits[500:])
