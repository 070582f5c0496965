"""Who is there: each rank's word on a board, about once a second, and what follows from it.

A word says that a rank lives, which epoch it is in, what it waits for, and why it left an epoch. It
lies beside the data: so a rank that waits in a collective, where it can't be reached, hears of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from piflux.ranks.alive import Process
from piflux.ranks.board import Answer, Board, bounded
from piflux.ranks.meeting import Meeting

log = logging.getLogger(__name__)

Result = TypeVar("Result")

BEAT_S = 1.0
"""How often a rank writes its word, and reads the others'."""

HURRY_S = 0.05
"""Likewise, while it waits."""

PATIENCE_S = 0.3
"""After which a rank that waits is in a hurry, and begins to look for the reason."""

LOST_S = 5.0
"""A rank that is stopped, and has said nothing for so long, is lost. One of another host, of which
nobody knows whether it runs, is after twice the time: it died, or is cut off."""


Kind = Literal["excluded", "lost", "stopped", "disagree", "failed", "late"]
"""Why ranks leave an epoch; see `Reason`."""


@dataclass(frozen=True)
class Wait:
    """What a rank waits for.

    Attributes:
        what: in words, the same for all that wait for the same.
        number: the how many-th wait of the epoch it is.
        doing: what the rank is at.
        since: when it began, in seconds by the rank's own clock.
        beat: the rank's last one before that.
    """

    what: str
    number: int
    doing: str
    since: float
    beat: int


@dataclass(frozen=True)
class Left:
    """That a rank left an epoch.

    Attributes:
        epoch: its number.
        image: of the rank, by number.
        kind: why, see `Reason`; likewise `text`.
    """

    epoch: int
    image: int
    kind: Kind
    text: str


@dataclass(frozen=True)
class Word:
    """What a rank says of itself.

    Attributes:
        process: that it is.
        epoch: that it is in.
        image: how many it has begun.
        doing: what its main thread is at.
        busy: whether that is compiling, and it waits for nobody.
        wait: what it waits for.
        left: the last epoch that it left.
        here: the epoch that it is ready to begin.
        given_up: the last image that it stopped in, and why.
        ended: whether it takes no part any more.
        beat: how many words of it there were.
    """

    process: Process
    epoch: int
    image: int
    doing: str
    busy: bool
    wait: Wait | None
    left: Left | None
    here: int | None
    given_up: tuple[int, str] | None
    ended: bool
    beat: int = 0

    def written(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: bytes) -> Word:
        found = json.loads(text)
        parts: dict[str, Any] = {"process": Process, "wait": Wait, "left": Left}
        return cls(**found | {k: found[k] and kind(**found[k]) for k, kind in parts.items()})


class Presence:
    """This rank's word on the board, and those of the others that it is to know of.

    Args:
        meeting: of all; its store is cloned.
        timeout_s: how long a rank is waited for that lives.
        say: this rank's word as it is now. It is called from any thread.

    Attributes:
        words: of the others, the last that was read.
        answered: when the board last answered, by `time.monotonic`.
        beat: how many words this rank has written.
        silence_s: after which a rank is lost that is stopped and says nothing.
    """

    def __init__(self, meeting: Meeting, timeout_s: float, say: Callable[[], Word]) -> None:
        self.say = say
        self.words: Mapping[int, Word] = {}
        self.answered = time.monotonic()
        self.beat = 0
        self.silence_s = max(2 * BEAT_S, min(LOST_S, timeout_s / 2))
        self._rank = meeting.rank
        self._others = frozenset(range(meeting.size)) - {meeting.rank}
        self._changed: dict[int, float] = {}  # when a rank's word was last another one
        self._written: set[int] = set()  # the ranks that have ever written one
        self._taking = threading.Lock()
        self._closed = threading.Event()
        clone: Any = getattr(meeting.store, "clone")  # noqa: B009  # which torch's stubs don't know
        self._board = Board(dist.PrefixStore("piflux", bounded(clone, timeout_s)))
        self._watch: threading.Thread | None = None

    def is_of(self, others: Iterable[int]) -> None:
        """From now on these alone are known of."""
        with self._taking:
            self._others = frozenset(others)
            self.words = {r: word for r, word in self.words.items() if r in self._others}

    # --- what is written and read ----------------------------------------------------------------

    def find(self, act: Callable[[dist.Store], Result]) -> Result:
        """What `act` finds on the board. Raises Silent, or what the store raises."""
        return self._board.find(act, 2 * self.silence_s)

    def _write(self, store: dist.Store) -> None:
        self.beat += 1
        store.set(f"state/{self._rank}", replace(self.say(), beat=self.beat).written())

    def write_and_read(self, store: dist.Store) -> dict[int, Word]:
        """For `find`, and then for `take`."""
        self._write(store)
        others = self._others
        new = [rank for rank in others - self._written if store.check([f"state/{rank}"])]
        self._written.update(new)
        asked = [rank for rank in others if rank in self._written]
        found = store.multi_get([f"state/{rank}" for rank in asked])
        return {rank: Word.read(text) for rank, text in zip(asked, found, strict=True)}

    def take(self, words: Mapping[int, Word]) -> None:
        """These were read."""
        now = time.monotonic()
        with self._taking:
            words = {rank: word for rank, word in words.items() if rank in self._others}
            for rank, word in words.items():
                before = self.words.get(rank)
                if before is None or before.beat != word.beat:
                    self._changed[rank] = now
            self.words = {**self.words, **words}
            self.answered = now

    def look(self) -> None:
        """Write and read now. Raises Silent, or what the store raises."""
        self.take(self._board.find(self.write_and_read, self.silence_s))

    def watch(self, waits: Callable[[], Wait | None], call_back: Callable[[Wait], None]) -> None:
        """Begin to write and read, in a thread of its own.

        Args:
            waits: what this rank waits for now.
            call_back: what is done where that has taken a while, each time after a look.
        """
        self._watch = threading.Thread(
            target=self._keep_watch, args=(waits, call_back), daemon=True, name="piflux-watch"
        )
        self._watch.start()

    def _keep_watch(
        self, waits: Callable[[], Wait | None], call_back: Callable[[Wait], None]
    ) -> None:
        """The thread's life. It asks, but waits for no answer: what it ends may hang on it."""
        latest = 0.0
        asked: Answer[dict[int, Word]] | None = None
        while not self._closed.wait(HURRY_S if self.say().wait else BEAT_S / 4):
            try:
                now = time.monotonic()
                if asked is not None and asked.is_there:
                    with contextlib.suppress(Exception):  # the store's end is noticed by its age
                        self.take(asked.get(0))
                    asked = None
                wait = waits()
                hurries = wait is not None and now - wait.since > PATIENCE_S
                if asked is None and now - latest >= (HURRY_S if hurries else BEAT_S):
                    latest, asked = now, self._board.ask(self.write_and_read)
                if wait is not None and hurries:
                    call_back(wait)
            except Exception:
                log.exception("the watch over the other ranks failed, and goes on")

    # --- what follows from it --------------------------------------------------------------------

    def gone(self, silent_s: float | None = None) -> dict[int, str]:
        """The ranks that it is no use to wait for, with what is known of them.

        Args:
            silent_s: to take in place of `silence_s`.
        """
        now, me, words = time.monotonic(), self.say().process, self.words
        silent_s = self.silence_s if silent_s is None else silent_s
        gone = {}
        for rank, word in words.items():
            runs = word.process.runs(me)
            if word.ended:
                gone[rank] = "has ended"
            elif runs == "no":
                gone[rank] = "died: its process is gone"
            elif runs == "stopped":
                silence = now - self._changed[rank]
                if silence > silent_s:
                    gone[rank] = f"is stopped, and has said nothing for {silence:.0f} s"
            elif runs == "unknown":
                # A store that doesn't answer says nothing of anyone.
                silence = self.answered - self._changed[rank]
                if silence > 2 * silent_s:
                    gone[rank] = (
                        f"lives no more or is cut off, and has said nothing for {silence:.0f} s"
                    )
        return gone

    def close(self) -> None:
        """Write a last word, and no more."""
        self._closed.set()
        self._board.ask(self._write)
        self._board.close(1.0)
        if self._watch is not None and threading.current_thread() is not self._watch:
            self._watch.join(1.0)
