"""The cache's book-keeping against S3-FIFO written with Python's lists, one set at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram_jax.memory.store.s3fifo import PROBATION, WAYS, Sets
from tests.properties import examples


class PlainSet:
    """One set: rows on probation and rows that stay, oldest first, with their uses."""

    def __init__(self, ways: int):
        self.ways, self.ghosts, self.written = ways, [None] * ways, 0
        self.probation: list[int] = []
        self.stay: list[int] = []
        self.uses: dict[int, int] = {}

    def use(self, row: int) -> bool:
        if row in self.uses:
            self.uses[row] = min(3, self.uses[row] + 1)
        return row in self.uses

    def make_room(self) -> None:
        while len(self.uses) == self.ways:
            if len(self.probation) >= min(PROBATION, self.ways):
                row = self.probation.pop(0)
                if self.uses[row]:
                    self.uses[row] = 0
                    self.stay.append(row)
                    continue
                self.ghosts[self.written % len(self.ghosts)] = row
                self.written += 1
                del self.uses[row]
            else:
                row = self.stay.pop(0)
                if self.uses[row]:
                    self.uses[row] -= 1
                    self.stay.append(row)
                    continue
                del self.uses[row]

    def admit(self, row: int) -> bool:
        if row in self.uses:
            return False
        returns = row in self.ghosts
        self.make_room()
        self.ghosts = [None if ghost == row else ghost for ghost in self.ghosts]
        (self.stay if returns else self.probation).append(row)
        self.uses[row] = 0
        return True

    def seed(self, rows: list[int]) -> list[int]:
        """Which of `rows`, most frequent first, are taken in."""
        new = [row for row in dict.fromkeys(rows) if row not in self.uses]
        taken = new[: self.ways - len(self.uses)]
        self.stay += taken[::-1]
        self.uses |= dict.fromkeys(taken, 1)
        return taken


ROWS = 70
rows = st.lists(st.integers(0, ROWS - 1), max_size=30)
distinct = st.lists(st.integers(0, ROWS - 1), max_size=30, unique=True)
calls = st.lists(
    st.tuples(st.just("look"), rows)
    | st.tuples(st.just("admit"), distinct)
    | st.tuples(st.just("read"), distinct)  # as the cache does: look, then admit what was absent
    | st.tuples(st.just("seed"), distinct)
    | st.tuples(st.just("clear"), st.just([])),
    max_size=40,
)


@examples(200)
@given(capacity=st.sampled_from([1, 2, 3, 5, 15, 16, 17, 33, 48, 69, 70, 200]), calls=calls)
def test_sets_are_s3_fifo(capacity, calls):
    """Hits, who is inside, and where: after every call, whatever came before."""
    book = Sets.empty(capacity, ROWS)
    count, ways = book.keys.shape
    assert ways <= WAYS and (book.slots <= capacity or capacity >= ROWS)
    plain = [PlainSet(ways) for _ in range(count)]
    place: dict[int, int] = {}  # row -> slot that it was put in

    def look(ids):
        slots = np.empty(len(ids), np.int32)
        hits = book.look(np.asarray(ids, np.int32), slots)
        found = [plain[row % count].use(row) for row in ids]
        assert (slots >= 0).tolist() == found and hits == sum(found)
        assert all(slot == place[row] for row, slot in zip(ids, slots, strict=True) if slot >= 0)
        return [row for row, inside in zip(ids, found, strict=True) if not inside]

    def admit(ids):
        slots = np.empty(len(ids), np.int32)
        book.admit(np.asarray(ids, np.int32), slots)
        put([plain[row % count].admit(row) for row in ids], ids, slots)

    def put(new, ids, slots):
        assert (slots >= 0).tolist() == new
        for row, slot in zip(ids, slots.tolist(), strict=True):
            if slot >= 0:
                assert slot // ways == row % count
                place[row] = slot

    for what, ids in calls:
        if what == "clear":
            book.clear()
            plain = [PlainSet(ways) for _ in range(count)]
        elif what == "seed":
            slots = book.seed(np.asarray(ids, np.int32))
            taken = {
                r for s in range(count) for r in plain[s].seed([r for r in ids if r % count == s])
            }
            put([row in taken for row in ids], ids, slots)
        elif what == "look":
            look(ids)
        else:
            admit(look(ids) if what == "read" else ids)
        for number, one in enumerate(plain):
            line = [row for row in book.keys[number].tolist() if row >= 0]
            assert (
                len(line) == len(set(line)) <= ways
            )  # no row twice, never more than there is room
            assert set(line) == set(one.uses)
            assert all(book.keys.reshape(-1)[place[row]] == row for row in line)


def test_of_the_rows_taken_in_beforehand_the_least_frequent_goes_first():
    """Rows 0 to 15, most frequent first: two newcomers cost the set rows 15 and 14, not 0 and 1."""
    book = Sets.empty(16, 1000)
    assert (book.seed(np.arange(16, dtype=np.int32)) >= 0).all()
    book.admit(np.array([100, 101], np.int32), np.empty(2, np.int32))
    assert set(book.keys.reshape(-1).tolist()) == {*range(14), 100, 101}
