"""Which groups of ranks can serve: what each has compiled, and what it still has to draw for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from piflux.serving.calls import Call, Warm
from piflux.serving.grouping import Team
from piflux.serving.qualities import Promise
from piflux.serving.seats import Seats

WARM_IMAGES = {"cpu": 2, "cuda": 4}
"""Drawn of each kind: the first compiles, of the last the time counts. On GPUs those in between are
recorded."""


class Warmth:
    """What groups have compiled. A group is a team's ranks as they are: others are another group.

    Args:
        seats: of the ranks.
    """

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._rounds: Counter[Team] = Counter()  # a team's groups, one after the other
        self._warm: dict[Team, str] = {}  # the group that can serve
        self._left: dict[Team, list[Warm]] = {}  # to be drawn before it can
        self._compiled: dict[Team, set[tuple[object, ...]]] = {}  # shapes of calls

    def name_of(self, team: Team) -> str:
        """Of its present group, and of no other."""
        incarnations = ".".join(str(self._seats[rank].incarnation) for rank in team.ranks)
        return f"{team.first}+{team.size} {incarnations} {self._rounds[team]}"

    def is_warm(self, team: Team) -> bool:
        there = all(self._seats[rank].loaded for rank in team.ranks)
        return there and self._warm.get(team) == self.name_of(team)

    def was_warm(self, team: Team) -> bool:
        """Whether any of its groups could serve: what they compiled is in inductor's cache."""
        return team in self._warm

    def next(self, team: Team, all_of_it: Iterable[Warm]) -> Warm:
        """What it has to draw next, of all that it has to before it can serve."""
        if team not in self._left:
            self._left[team] = list(all_of_it)
        return self._left[team][0]

    def take(self, call: Call) -> None:
        """A call that warms up was drawn."""
        left = self._left.get(call.team, [])
        if left and left[0] is call.warms:
            left.pop(0)
        if not left:
            self._left.pop(call.team, None)
            self._warm[call.team] = self.name_of(call.team)

    def compiled(self, call: Call) -> None:
        self._compiled.setdefault(call.team, set()).add(call.shape)

    def compiles(self, call: Call) -> bool:
        """Whether it is the first of its shape in its group, and not drawn yet."""
        return not call.is_drawn and call.shape not in self._compiled.get(call.team, ())

    def begin_anew(self, teams: Iterable[Team]) -> None:
        """What they have drawn to warm up counts no more: one of their ranks is another."""
        for team in teams:
            self._left.pop(team, None)

    def part(self, team: Team) -> None:
        """Its ranks have come apart, and meet anew."""
        self._rounds[team] += 1
        self._left.pop(team, None)
        self._compiled.pop(team, None)


def to_warm(
    promises: Iterable[Promise], sizes: Sequence[tuple[int, int]], most_batch: int, device: str
) -> list[Warm]:
    """What a group draws before it serves, in order.

    Args:
        promises: of the qualities.
        sizes: width and height in pixels.
        most_batch: pictures of one call.
        device: its type.
    """
    kinds: dict[tuple[object, ...], tuple[Promise, tuple[int, int]]] = {}
    for promise in promises:
        for size in sizes:
            # Of promises that differ in what is left out one will do.
            kinds.setdefault((str(sorted(promise.settings.items())), size), (promise, size))
    first = next(iter(kinds.values()))
    batches = [(*first, n) for n in range(2, most_batch + 1)]
    counts = range(WARM_IMAGES.get(device, 2))
    return [
        Warm(promise, size, batch, left)
        for promise, size, batch in [*((*kind, 1) for kind in kinds.values()), *batches]
        for left in reversed(counts)
    ]
