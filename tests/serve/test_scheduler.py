"""The rules of admission and eviction, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from engram_jax.serve.pages import Pages
from engram_jax.serve.request import QueueFullError, SamplingParams
from engram_jax.serve.scheduler import Schedule, Sequence

PAGE = 4


def sequence(number, prompt, tokens):
    history = np.zeros(2, np.int32)
    return Sequence(number, np.zeros(prompt, np.int32), SamplingParams(tokens), history)


@pytest.mark.parametrize("seed", range(30))
def test_any_load_is_served_in_bounded_memory(seed):
    """A device that is imitated: what it is asked to hold is checked, and everything ends."""
    rng = np.random.default_rng(seed)
    longest = int(rng.integers(8, 40))
    total = -(-longest // PAGE) + int(rng.integers(0, 8))
    slots = int(rng.integers(1, 6))
    schedule = Schedule(slots, Pages(total, PAGE), queue=5)
    todo = []
    for number in range(40):
        prompt = int(rng.integers(1, longest))
        todo.append(sequence(number, prompt, int(rng.integers(1, longest - prompt + 1))))
    arriving, ended, begun = todo[::-1], [], []
    for _turn in range(20_000):
        while arriving and rng.random() < 0.5:
            if len(schedule.waiting) == 5:
                with pytest.raises(QueueFullError):
                    schedule.submit(arriving[-1])
                break
            schedule.submit(arriving.pop())
        ready, leaving = schedule.room_for_next()
        for one in leaving:
            schedule.vacate(one)
            assert one.slot == -1 and one.pages == []
        for one in ready:
            schedule.grow(one)
            assert len(one.pages) * PAGE > one.computed
            one.computed += 1
            one.generated.append(0)
        for one in [s for s in schedule.running if s.prefilling][:2]:
            one.computed = min(len(one.prompt), one.computed + 3)
            if not one.prefilling:
                one.generated.append(0)
        for one in [*schedule.running, *schedule.evicted]:
            if len(one.generated) == one.params.max_tokens or rng.random() < 0.002:
                schedule.end(one)
                ended.append(one)
        schedule.readmit()
        begun += schedule.admit()
        held = [page for one in schedule.running for page in one.pages]
        assert len(set(held)) == len(held) and set(held) <= set(range(total))
        assert len(held) + schedule.pages.free == total
        assert len({one.slot for one in schedule.running}) == len(schedule.running) <= slots
        assert len(schedule.running) + len(schedule.evicted) <= slots
        assert len(begun) - len(ended) == len(schedule.running) + len(schedule.evicted)
        if not arriving and not schedule.busy:
            break
    assert len(ended) == 40
    assert [one.number for one in begun] == list(range(40))  # first come, first served
    assert schedule.pages.free == total


def test_the_youngest_makes_room_for_the_oldest():
    schedule = Schedule(3, Pages(4, PAGE), queue=9)
    old, middle, young = (sequence(n, 3, 20) for n in range(3))
    for one in (old, middle, young):
        schedule.submit(one)
    assert schedule.admit() == [old, middle, young]
    for one in (old, middle, young):
        one.computed, one.generated = 3, [0]
    middle.computed = 4  # one page is free and both of the others want one
    old.computed = 4
    ready, leaving = schedule.room_for_next()
    assert (ready, leaving) == ([old, middle], [young])
    schedule.vacate(young)
    assert schedule.grow(old) and schedule.grow(middle)
    assert schedule.readmit() == [] and schedule.pages.free == 0
    waiting = sequence(3, 4, 1)  # two pages
    schedule.submit(waiting)
    schedule.end(middle)
    assert schedule.readmit() == [young]  # before anything new
    assert schedule.admit() == [] and list(schedule.waiting) == [waiting]
    schedule.end(old)
    assert schedule.admit() == [waiting]
    assert schedule.evictions == 1


def test_who_has_no_place_has_no_slot():
    """-1 and no pages, before it runs and when it has ended."""
    schedule, one = Schedule(1, Pages(3, PAGE), queue=9), sequence(0, 3, 20)
    assert (one.slot, one.pages) == (-1, [])
    schedule.submit(one)
    schedule.admit()
    assert one.slot == 0 and len(one.pages) == 1
    schedule.end(one)
    assert (one.slot, one.pages) == (-1, [])


def test_pages_are_not_invented():
    pages = Pages(2, PAGE)
    taken = pages.take(2)
    with pytest.raises(ValueError, match="1 pages wanted, 0 free"):
        pages.take(1)
    pages.give(taken)
    assert sorted(pages.take(2)) == [0, 1]
    assert [pages.needed(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_who_comes_back_leaves_a_page_for_everyone_who_runs():
    """Else the next step would move it out again."""
    schedule = Schedule(4, Pages(6, PAGE), queue=9)
    old, middle, young = (sequence(n, 3, 20) for n in range(3))
    for one in (old, middle, young):
        schedule.submit(one)
    schedule.admit()
    young.computed, young.generated = 3, [0]
    schedule.vacate(young)
    taken = schedule.pages.take(2)
    assert schedule.pages.free == 2 and schedule.readmit() == []
    schedule.pages.give(taken[:1])
    assert schedule.readmit() == [young]


def test_a_sequence_moves_nobody_out_while_its_page_has_room():
    """3 of 4 tokens: the next one goes where the last ones are, though no page is free."""
    schedule = Schedule(2, Pages(2, PAGE), queue=9)
    both = [sequence(n, 3, 20) for n in range(2)]
    for one in both:
        schedule.submit(one)
    assert schedule.admit() == both and schedule.pages.free == 0
    for one in both:
        one.computed, one.generated = 3, [0]
    assert schedule.room_for_next() == (both, [])
    assert not any(schedule.grow(one) for one in both)
    assert [len(one.pages) for one in both] == [1, 1]


def test_a_request_that_ends_leaves_where_it_is():
    """Waiting, running or moved out: it alone is gone, and what it held is free."""
    schedule = Schedule(2, Pages(4, PAGE), queue=9)
    requests = [sequence(n, 3, 20) for n in range(4)]
    for one in requests:
        schedule.submit(one)
    first, second, third, fourth = requests
    assert schedule.admit() == [first, second]
    schedule.end(third)
    assert list(schedule.waiting) == [fourth] and schedule.running == [first, second]
    schedule.vacate(second)
    second.saved = object()
    schedule.end(second)
    assert schedule.evicted == [] and second.saved is None and schedule.running == [first]
    schedule.end(second)  # once more: nothing is left to end
    schedule.end(first)
    assert schedule.running == [] and schedule.pages.free == 4 and schedule.busy
    schedule.end(fourth)
    assert not schedule.busy


def test_the_oldest_of_those_moved_out_comes_back_first():
    """Whichever of them was moved out first; and behind it nobody is let past."""
    schedule = Schedule(3, Pages(9, PAGE), queue=9)
    old, middle, young = (sequence(n, 3, 20) for n in range(3))
    for one in (old, middle, young):
        schedule.submit(one)
    schedule.admit()
    schedule.vacate(young)
    schedule.vacate(middle)
    assert schedule.evicted == [middle, young]
    assert schedule.readmit() == [middle, young] and schedule.running == [old, middle, young]
    schedule.vacate(middle)  # alone: it is again older than who went on meanwhile
    assert schedule.readmit() == [middle] and schedule.running == [old, middle, young]
    schedule.vacate(middle)
    schedule.vacate(young)
    taken = schedule.pages.take(schedule.pages.free - 2)  # one for `old`, so one may come back
    assert schedule.readmit() == [middle] and schedule.evicted == [young]
    schedule.pages.give(taken)


@pytest.mark.parametrize(("computed", "pages"), [(3, 1), (4, 2), (7, 2), (8, 3)])
def test_who_comes_back_has_room_for_its_next_token(computed, pages):
    """As many pages as its tokens and one more take."""
    schedule = Schedule(1, Pages(9, PAGE), queue=9)
    one = sequence(0, 3, 20)
    schedule.submit(one)
    schedule.admit()
    one.computed, one.generated = computed, [0] * (computed - 2)
    schedule.vacate(one)
    assert schedule.readmit() == [one]
    assert len(one.pages) == pages and not schedule.grow(one)


class TestFairness:
    """A request's hundreds of sequences, and another's one."""

    def make(self, slots, pages, groups):
        schedule = Schedule(slots, Pages(pages, PAGE), queue=9)
        made = []
        for number, group in enumerate(groups):
            made.append(sequence(number, 3, 20))
            made[-1].request = group
            schedule.submit(made[-1])
        return schedule, made

    def test_the_next_free_slot_is_the_others(self):
        schedule, made = self.make(2, 9, "aaaaaa")
        assert schedule.admit() == made[:2]
        other = sequence(6, 3, 20)
        schedule.submit(other)
        schedule.end(made[0])
        assert schedule.admit() == [made[2]]  # the turn that it already had
        schedule.end(made[1])
        assert schedule.admit() == [other]
        schedule.end(made[2])
        assert schedule.admit() == [made[3]]

    def test_age_is_the_order_of_admission(self):
        """Not of submission: else a request that was let in is moved out for the next of those
        that it passed."""
        schedule, made = self.make(3, 4, "aaab")
        assert schedule.admit() == [made[0], made[3], made[1]]
        assert schedule.running == [made[0], made[3], made[1]]
        for one in schedule.running:
            one.computed, one.generated = 4, [0]
        ready, leaving = schedule.room_for_next()
        assert (ready, leaving) == ([made[0], made[3]], [made[1]])
        schedule.vacate(made[1])
        schedule.vacate(made[3])
        assert schedule.evicted == [made[3], made[1]]
        assert schedule.readmit() == [made[3]]

    def test_nothing_passes_the_one_whose_turn_it_is(self):
        schedule = Schedule(3, Pages(4, PAGE), queue=9)
        runs, large, small = sequence(0, 7, 1), sequence(1, 11, 1), sequence(2, 3, 1)
        for one in (runs, large, small):
            schedule.submit(one)
        assert schedule.admit() == [runs] and list(schedule.waiting) == [large, small]

    def test_prompts_are_computed_in_turns(self):
        schedule, made = self.make(5, 9, "aaaab")
        schedule.admit()
        assert schedule.running == [made[0], made[4], made[1], made[2], made[3]]
        assert schedule.prefilling(2) == [made[0], made[4]]
        made[0].computed = made[4].computed = 3
        assert schedule.prefilling(2) == [made[1], made[2]]
        assert schedule.prefilling(9) == made[1:4]

    def test_a_full_queue_has_room_for_another_request(self):
        schedule, made = self.make(1, 9, "a" * 9)
        one_more = sequence(9, 3, 20)
        one_more.request = "a"
        with pytest.raises(QueueFullError, match="9 sequences are waiting"):
            schedule.submit(one_more)
        schedule.submit(sequence(10, 3, 20))
        assert len(schedule.waiting) == 10
        for one in made:
            schedule.end(one)
        assert [one.number for one in schedule.waiting] == [10]
