"""Epochs: memberships of ranks, one after the other, each with connections of its own.

Whoever stops in the midst of an image ends the epoch for all, and at their next call all meet in a
new one. Whom it is no use to wait for is left out of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import methodcaller

import torch.distributed as dist

from piflux.errors import RankFailed, RankLost
from piflux.ranks.board import bounded
from piflux.ranks.links import Link
from piflux.ranks.meeting import Meeting
from piflux.ranks.predictions import Predictions
from piflux.ranks.presence import BEAT_S, HURRY_S, Left, Presence, Word
from piflux.ranks.reasons import Reason, excluded, late, line_of, lost

log = logging.getLogger(__name__)

RANK_COMPILES_S = 1800.0
"""How long one that compiles is waited for, where the timeout is shorter."""


@dataclass(eq=False)
class Epoch:
    """One membership.

    Attributes:
        number: -1 before the first.
        members: by their ranks in the meeting.
        link: their connections; None before the first epoch, and where it has ended.
        waits: how often this rank has waited in it.
        why: its connections were ended; None if they were not, or another rank did it.
        spoiled: whether a GPU went on then with what nobody sent.
        predictions: that were made in it.
    """

    number: int
    members: tuple[int, ...]
    link: Link | None
    waits: int = 0
    why: Reason | None = None
    spoiled: bool = False
    predictions: Predictions = field(default_factory=Predictions)


class Epochs:
    """The epochs of a meeting, as one rank goes through them.

    Args:
        meeting: of all ranks.
        presence: who is there.
        timeout_s: how long a rank is waited for that lives.

    Attributes:
        present: the epoch that this rank is in, or was in last.
        left: the last that it left, and why.
        here: the number of the one that it is ready to begin.
    """

    def __init__(self, meeting: Meeting, presence: Presence, timeout_s: float) -> None:
        self.present = Epoch(-1, tuple(range(meeting.size)), None)
        self.left: Left | None = None
        self.here: int | None = None
        self._meeting = replace(meeting, store=dist.PrefixStore("piflux", meeting.store))
        self._rank = meeting.rank
        self._presence = presence
        self._timeout_s = timeout_s

    def link(self) -> Link:
        """Connections of the present epoch, or of a new one if it has ended. All call it together.

        Raises:
            RankFailed: not all came in time.
            RankLost: one died meanwhile.
            Excluded: the others have gone on without this rank.
        """
        link = self.present.link
        return self._meet() if link is None else link

    def allowed(self, words: Sequence[Word]) -> float:
        """Seconds that ranks are waited for which say this."""
        busy = any(word.busy for word in words)
        return max(self._timeout_s, RANK_COMPILES_S) if busy else self._timeout_s

    def leave(self, reason: Reason) -> None:
        """The present one has ended for this rank: say why, and let nobody wait for it."""
        number, link = self.present.number, self.present.link
        if self.left is None or self.left.epoch != number:
            self.left = Left(number, self._presence.say().image, reason.kind, reason.text)
        if link is not None:
            # First said, then done: whoever is woken up looks for the reason.
            with contextlib.suppress(Exception):  # who can't be told is told by the link's end
                self._presence.look()
            self.end(link)

    def end(self, link: Link) -> None:
        """What the main thread does with connections that it needs no more."""
        link.end()
        link.left.set()
        self.present.link = None

    def alone(self) -> Link:
        """Begin one of this rank alone."""
        self.leave(Reason("lost", "the others are gone"))
        return self._connect(self.present.number + 1, (self._rank,))

    def _meet(self) -> Link:
        if self.present.members == (self._rank,):
            return self.alone()
        number, began = self.present.number + 1, time.monotonic()
        self.here = number
        try:
            members = self._agreed_members(number, began)
            if self._rank not in members:
                raise excluded(self._rank).error()
            left = [rank for rank in self.present.members if rank not in members]
            if left:
                who = " and ".join(f"rank {rank}" for rank in left)
                log.warning("rank %d: goes on without %s", self._rank, who)
            return self._connect(number, members)
        finally:
            self.here = None

    def _agreed_members(self, number: int, began: float) -> tuple[int, ...]:
        """Those who are here when all others are gone: whoever finds it first writes it down."""
        presence, key = self._presence, f"members/{number}"
        others = [rank for rank in self.present.members if rank != self._rank]

        def decided(store: dist.Store) -> tuple[dict[int, Word], str | None]:
            words = presence.write_and_read(store)
            return words, store.get(key).decode() if store.check([key]) else None

        while True:
            try:
                read, found = presence.find(decided)
            except Exception as error:
                if len(others) == 1 and number > 0:
                    return (self._rank,)  # the store went with the other one
                raise RankFailed(
                    f"the store of the process group doesn't answer rank {self._rank} "
                    f"({line_of(error)}): the process that holds it is gone or cut off. Start all "
                    "ranks anew"
                ) from error
            presence.take(read)
            if found is not None:
                return tuple(json.loads(found))
            words, gone = presence.words, presence.gone()
            here = [rank for rank in others if rank in words and words[rank].here == number]
            if all(rank in here or rank in gone for rank in others):
                mine = json.dumps(sorted([self._rank, *here]))
                written: bytes = presence.find(methodcaller("compare_set", key, "", mine))
                return tuple(json.loads(written))
            me = presence.say()
            for rank in others:
                stopped = words[rank].given_up if rank in words else None
                if stopped is not None and stopped[0] == me.image and rank not in here:
                    raise Reason("stopped", stopped[1]).error()
            allowed = self.allowed([*words.values()])
            if time.monotonic() - began > allowed:
                raise late(allowed, f"{me.doing}, the beginning of an epoch", others, words).error()
            time.sleep(HURRY_S / 5)

    def _connect(self, number: int, members: tuple[int, ...]) -> Link:
        meeting = self._meeting.among(members, f"epoch-{number}")
        self._presence.is_of(set(members) - {self._rank})
        try:
            link = bounded(lambda: Link(meeting, self._timeout_s), self._timeout_s + BEAT_S)
        except Exception as error:
            self.present = Epoch(number, members, None)
            self.leave(Reason("failed", f"rank {self._rank} could not connect: {line_of(error)}"))
            if gone := self._presence.gone():
                raise RankLost(lost(gone).text, list(gone)) from error
            raise RankFailed(
                f"rank {self._rank} could not connect to the others within {self._timeout_s:.3g} "
                f"s: {line_of(error)}"
            ) from error
        self.present, self.left = Epoch(number, members, link), None
        return link
