"""Turns of requests, against a plain definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from engram_jax.serve.waiting import Waiting, in_turns


@dataclass(eq=False)
class One:
    group: str
    name: int


def queue(letters, room=99):
    made = Waiting(room)
    for number, letter in enumerate(letters):
        made.add(One(letter, number))
    return made


def taken(waiting, count=None):
    return [waiting.take() for _ in range(len(waiting) if count is None else count)]


@pytest.mark.parametrize(
    ("arrived", "order"),
    [
        ("", []),
        ("aaa", [0, 1, 2]),  # of one request: as they came
        ("abc", [0, 1, 2]),  # a sequence each: as they came
        ("aaab", [0, 3, 1, 2]),
        ("aaaabbc", [0, 4, 6, 1, 5, 2, 3]),
        ("abab", [0, 1, 2, 3]),
    ],
)
def test_requests_take_turns(arrived, order):
    waiting = queue(arrived)
    assert [one.name for one in waiting] == order and len(waiting) == len(order)
    assert [one.name for one in taken(waiting)] == order
    assert not waiting and list(waiting) == []
    assert [one.name for one in in_turns([One(g, i) for i, g in enumerate(arrived)])] == order


def test_who_comes_later_waits_for_a_turn_of_everyone_else():
    """And nobody is passed twice by the same one, however many come."""
    waiting = queue("aaaaaaaa")
    assert [one.name for one in taken(waiting, 3)] == [0, 1, 2]
    waiting.add(One("b", 100))
    assert [one.name for one in taken(waiting, 2)] == [3, 100]
    for new in range(4):  # one after the other, while `a` has more
        waiting.add(One(f"new {new}", 200 + new))
        assert [one.name for one in taken(waiting, 2)] == [4 + new, 200 + new]
    assert not waiting


def test_removing():
    waiting = queue("aabba")
    first, *_, last = list(waiting)
    middle = list(waiting)[1]
    waiting.remove(middle)
    waiting.remove(middle)  # it is gone
    waiting.remove(One("c", 9))
    waiting.remove(One("a", 9))
    assert [one.name for one in waiting] == [0, 3, 1, 4] and len(waiting) == 4
    waiting.remove(first)
    waiting.remove(last)
    assert [one.name for one in waiting] == [1, 3] and len(waiting) == 2
    with pytest.raises(StopIteration):
        _ = queue("").first


@pytest.mark.parametrize(
    ("arrived", "group", "room"),
    [
        ("aaa", "a", True),  # not full
        ("aaaa", "a", False),  # its share is all four, and it has them
        ("aaaa", "b", True),
        ("aaaab", "b", True),  # half of four
        ("aaaabb", "b", False),
        ("aaaabb", "c", True),  # a third of four
        ("aaaabbc", "c", False),
        ("aaaabbcd", "e", False),  # less than one each
        ("abcd", "e", False),
    ],
)
def test_a_request_may_have_its_share_of_a_full_queue(arrived, group, room):
    assert queue(arrived, room=4).has_room(group) == room


def test_the_queue_is_bounded():
    """By room * (1 + 1/2 + 1/3 + ...), whatever comes."""
    most = sum(24 // requests for requests in range(1, 25))
    rng = np.random.default_rng(0)
    waiting = Waiting(24)
    for number in range(3000):
        group = f"{rng.integers(0, 60)}"
        if waiting.has_room(group):
            waiting.add(One(group, number))
        assert len(waiting) <= most
        if rng.random() < 0.02:
            waiting.take()
    greedy = Waiting(24)
    for group in "abcdefghijklmnopqrstuvwxyz":
        while greedy.has_room(group):
            greedy.add(One(group, 0))
    assert len(greedy) == most  # reached
