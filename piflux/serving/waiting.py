"""A bounded queue that is fair between users. Pure Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Waiting(Generic[Item]):
    """Items of users, who take turns: the first of one, the first of the next, and so on.

    Whoever asks for much waits for himself alone. Within a user's the order is that of coming.

    Args:
        most: items that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._urgent: deque[Item] = deque()
        self._users: dict[str, deque[Item]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return len(self._urgent) + sum(map(len, self._users.values()))

    def fits(self, count: int) -> bool:
        """Whether so many more may wait."""
        return len(self) + count <= self._most

    def put(self, user: str, item: Item) -> None:
        """Behind the user's others. Whether it fits was asked before."""
        self._users.setdefault(user, deque()).append(item)

    def put_back(self, item: Item) -> None:
        """Before all others: it had its turn, and lost it by no fault of its own."""
        self._urgent.append(item)

    def __iter__(self) -> Iterator[Item]:
        """In the order in which they will be taken, if nothing comes in between."""
        yield from self._urgent
        queues = [list(items) for items in self._users.values()]
        for i in range(max(map(len, queues), default=0)):
            yield from (items[i] for items in queues if i < len(items))

    def first(self) -> Item | None:
        """The next in turn, which stays."""
        return next(iter(self), None)

    def take(self, fits: Callable[[Item], bool] = lambda item: True) -> Item | None:
        """Take the next in turn out, of those that fit; None if there is none."""
        item = next((item for item in self if fits(item)), None)
        if item is not None:
            self._remove(item, had_turn=True)
        return item

    def drop(self, unwanted: Callable[[Item], bool]) -> None:
        """Take out what is not wanted any more; turns stay as they are."""
        for item in [item for item in self if unwanted(item)]:
            self._remove(item, had_turn=False)

    def _remove(self, item: Item, *, had_turn: bool) -> None:
        if any(item is x for x in self._urgent):
            self._urgent = deque(x for x in self._urgent if x is not item)
            return
        for user, items in list(self._users.items()):
            if any(item is x for x in items):
                kept = deque(x for x in items if x is not item)
                if had_turn or not kept:
                    del self._users[user]
                if kept:
                    self._users[user] = kept  # behind the others, if he had his turn
                return
