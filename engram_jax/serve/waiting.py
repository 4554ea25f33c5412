"""The queue of sequences that have not begun: requests take turns, a sequence each.

A request (one HTTP request: its prompts times n) may have hundreds of sequences. First come, first
served would let them all pass before the one sequence of the next request. So the requests that
wait take turns, and each gives its oldest sequence; one that comes joins at the end of the round.
Nobody waits for more than a turn of everyone else, however many come after it.

The queue's room is shared likewise: a request may always fill its even share of it, so that one
that has filled the queue does not have the others refused. It holds at most `room` sequences from
each of 1, 2, 3, ... requests' shares: room * (1 + 1/2 + 1/3 + ...), for 256 about 1,570.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Member(Protocol):
    """What waits. group: the request that it belongs to."""

    @property
    def group(self) -> Hashable: ...


T = TypeVar("T", bound=Member)


class Waiting(Generic[T]):
    """Sequences in the order in which they would begin. room: of the queue, in sequences."""

    def __init__(self, room: int):
        self.room = room
        self._turns: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """The next first, if nothing is added."""
        depth = max(map(len, self._turns.values()), default=0)
        for turn in range(depth):
            yield from (each[turn] for each in self._turns.values() if turn < len(each))

    def has_room(self, group: Hashable) -> bool:
        """Whether another sequence of this request may wait."""
        if self._count < self.room:
            return True
        own = len(self._turns.get(group, ()))
        requests = len(self._turns) + (own == 0)
        return own < self.room // requests

    def add(self, one: T) -> None:
        self._turns.setdefault(one.group, deque()).append(one)
        self._count += 1

    @property
    def first(self) -> T:
        """Whose turn it is. Raises StopIteration if nobody waits."""
        return next(iter(self._turns.values()))[0]

    def take(self) -> T:
        """Remove it; its request's next turn comes after all others'."""
        one = self.first
        own = self._turns[one.group]
        own.popleft()
        self._count -= 1
        if own:
            self._turns.move_to_end(one.group)
        else:
            del self._turns[one.group]
        return one

    def remove(self, one: T) -> None:
        """Remove it if it waits."""
        own = self._turns.get(one.group)
        if own is None or one not in own:
            return
        own.remove(one)
        self._count -= 1
        if not own:
            del self._turns[one.group]


def in_turns(members: list[T]) -> list[T]:
    """The first of every request, then the second of every request, and so on, in given order."""
    turns: Waiting[T] = Waiting(0)
    for one in members:
        turns.add(one)
    return list(turns)
