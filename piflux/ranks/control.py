"""Who is there, and why somebody stopped: what ranks know of each other beside the data.

Each rank writes its *state* on a board, about once a second: that it lives, which epoch it is in,
what it waits for, why it left an epoch. So a rank that waits in a collective, where it can't be
reached, is called back as soon as another one has stopped, died, or waits for something else: its
link is ended, its collective raises, and what is raised in the end says what happened.

An *epoch* is a membership with connections of its own. Whoever stops in the midst of an image ends
the epoch for all, and at their next call all meet in a new one. Whom it is no use to wait for is
left out of it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.errors import Excluded, PifluxError, RankFailed, RankLost, RanksDisagree
from piflux.ranks.board import Answer, Board, bounded
from piflux.ranks.header import apart, tell, wishes
from piflux.ranks.links import Link

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""How often a rank writes its state, and reads the others'."""

HURRY_S = 0.05
"""Likewise, while it waits."""

PATIENCE_S = 0.3
"""After which a rank that waits begins to look for the reason."""

LOST_S = 5.0
"""A rank that is stopped, and has said nothing for so long, is lost. One of another host, of which
nobody knows whether it runs, is after twice the time: it died, or is cut off."""

COMPILING_S = 1800.0
"""How long one that compiles is waited for, where the timeout is shorter."""

SURE = 3
"""After so many beats at one place a rank is taken to stay there."""

LOOK_S = 0.0005
"""How often the host looks whether a GPU is done, at an image's end."""

DEVICE = "the device"

State = dict[str, Any]


class Control:
    """One process's view of the ranks of a group.

    Args:
        store: of the group; it is cloned.
        name: of the group.
        rank: of this process in the group.
        size: of the group.
        backends: see `Link`.
        timeout_s: how long a rank is waited for that lives.

    Attributes:
        members: those in the present epoch, by their ranks in the group.
        image: how many images this process has begun.
        calls: how many calls of models there were in it.
        doing: what the main thread is at, for messages.
        busy: whether that is compiling, which may take longer than the timeout.
        exchanged: whether anything was exchanged since the image began.
        wish: whether this rank wants the image to end.
        backends: see `Link`.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        backends: dict[str, str],
        timeout_s: float,
    ) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._name = name
        self.members: tuple[int, ...] = tuple(range(size))
        self.image = self.calls = 0
        self.doing = "the beginning"
        self.busy = False
        self.exchanged = False
        self.backends = backends
        self.wish = self._wished = False
        self._wishes: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # on a GPU, step by step
        self._store = dist.PrefixStore("piflux", store)
        self._epoch = -1
        self._link: Link | None = None
        self._depth = 0
        self._left: State | None = None
        self._here: int | None = None
        self._given_up: tuple[int, str] | None = None
        self._waiting: State | None = None
        self._waits = 0
        self._states: dict[int, State] = {}
        self._still: dict[int, tuple[int, int]] = {}  # since which beat a rank waits in which place
        self._changed: dict[int, float] = {}
        self._beats = 0
        self._answered = time.monotonic()
        self._round: Answer[dict[int, State]] | None = None
        self._given: deque[torch.cuda.Event] = deque()  # after each step that a GPU was given
        self._progress = time.monotonic()
        self._spoiled = False  # whether the GPU went on with what nobody sent
        self._headers: tuple[Tensor, Tensor] | None = None  # on a GPU: whether any differed, which
        self._why: tuple[str, str] | None = None  # the link was ended: by which kind of reason
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._hurry = threading.Event()
        self._me = _process()
        self._known: set[int] = set()
        clone: Any = getattr(store, "clone")  # noqa: B009  # which torch's stubs don't know
        client = bounded(clone, timeout_s)
        self._board = Board(dist.PrefixStore("piflux", client))
        self._watch = threading.Thread(target=self._keep_watch, daemon=True, name="piflux-watch")
        self._watch.start()
        atexit.register(self.close)

    # --- what is written and read ----------------------------------------------------------------

    def _state(self) -> State:
        self._beats += 1
        waiting = self._waiting
        if waiting is not None:
            waiting = dict(waiting, waited_s=time.monotonic() - waiting["since"])
        return {
            "beat": self._beats,
            "process": self._me,
            "epoch": self._epoch,
            "image": self.image,
            "doing": self.doing,
            "busy": self.busy and waiting is None,
            "waiting": waiting,
            "left": self._left,
            "here": self._here,
            "given_up": self._given_up,
            "ended": self._ended.is_set(),
        }

    def _write_and_read(self, store: dist.Store) -> dict[int, State]:
        store.set(f"state/{self.rank}", json.dumps(self._state()))
        others = [rank for rank in self.members if rank != self.rank]
        self._known.update(r for r in others if r in self._known or store.check([f"state/{r}"]))
        asked = [rank for rank in others if rank in self._known]
        found = store.multi_get([f"state/{rank}" for rank in asked])
        return {rank: json.loads(text) for rank, text in zip(asked, found, strict=True)}

    def _take(self, states: Mapping[int, State]) -> None:
        now = time.monotonic()
        for rank, state in states.items():
            before = self._states.get(rank)
            if before is None or before["beat"] != state["beat"]:
                self._changed[rank] = now
        self._states.update(states)
        self._answered = now

    def _look(self, within_s: float) -> None:
        """Write and read now. Raises Silent, or what the store raises."""
        answer = self._board.ask(self._write_and_read)
        self._take(answer.get(within_s))

    def _keep_watch(self) -> None:
        """A thread's life. It asks, but waits for no answer: what it ends may hang on it."""
        latest = 0.0
        while not self._ended.wait(HURRY_S if self._waiting else BEAT_S / 4):
            try:
                now = time.monotonic()
                if self._round is not None and self._round.is_there:
                    with contextlib.suppress(Exception):  # the store's end is noticed by its age
                        self._take(self._round.get(0))
                    self._round = None
                waiting = self._waiting or self._waiting_device()
                impatient = waiting is not None and now - waiting["since"] > PATIENCE_S
                if self._round is None and now - latest >= (HURRY_S if impatient else BEAT_S):
                    latest, self._round = now, self._board.ask(self._write_and_read)
                if waiting is not None and impatient:
                    self._call_back(waiting, now)
            except Exception:
                log.exception("the watch over the other ranks failed, and goes on")

    def _call_back(self, waiting: State, now: float) -> None:
        """End the link if it is no use to wait any longer."""
        link, why = self._link, self._reason(waiting, now)
        if why is None or link is None:
            return
        with self._lock:
            if self._waiting is waiting or waiting["what"] == DEVICE:
                self._why = self._why or why
                self._spoiled = self._is_device_busy()
                link.end()

    def _waiting_device(self) -> State | None:
        """As `_waiting`, where a GPU is what waits."""
        if not self._is_device_busy():
            return None
        return {"what": DEVICE, "number": -1, "doing": self.doing, "since": self._progress}

    def _reason(self, waiting: State, now: float) -> tuple[str, str] | None:
        """Kind and text of what speaks against waiting on."""
        others = {r: s for r, s in self._states.items() if r in self.members}
        if any(state["epoch"] > self._epoch for state in others.values()):
            return "excluded", self._tell_excluded()
        if gone := self._gone(now):
            return "lost", self._tell_lost(gone)
        for rank, state in others.items():
            left = state["left"]
            if left is not None and left["epoch"] == self._epoch:
                return left["kind"], left["text"]
            theirs = state["waiting"]
            apart = theirs is not None and theirs["what"] != waiting["what"]
            same = theirs is not None and theirs["number"] == waiting["number"]
            if apart and same and state["epoch"] == self._epoch:
                return "disagree", self._tell_apart(waiting, {rank: theirs})
        apart = {r: s["waiting"] for r, s in others.items() if s["epoch"] == self._epoch}
        if len(apart) == len(self.members) - 1 and self._stuck(waiting, apart, now):
            return "disagree", self._tell_apart(waiting, apart)
        allowed = self.timeout_s
        if any(state["busy"] for state in others.values()):
            allowed = max(allowed, COMPILING_S)
        if now - waiting["since"] > allowed:
            return "late", self._tell_late(waiting, allowed, now)
        return None

    def _stuck(self, mine: State, theirs: Mapping[int, State | None], now: float) -> bool:
        """Whether all wait, for different things, and have done so for long.

        Not at once: what one waits for may still be on its way, while another has it already.
        """
        long_s = self.timeout_s / 4
        waiting = [x for x in theirs.values() if x is not None and x["waited_s"] > long_s]
        all_wait = len(waiting) == len(theirs) and now - mine["since"] > long_s
        if not all_wait or all(x["what"] == mine["what"] for x in waiting):
            self._still = {}
            return False
        # Nor by what was written long ago: who has been slow since may have gone on.
        for rank, at in theirs.items():
            assert at is not None, "all wait"
            beat, number = self._states[rank]["beat"], at["number"]
            if self._still.get(rank, (0, -1))[1] != number:
                self._still[rank] = beat, number
        return all(self._states[r]["beat"] - beat >= SURE for r, (beat, _) in self._still.items())

    # --- who is there ----------------------------------------------------------------------------

    def _gone(self, now: float, silent_s: float | None = None) -> dict[int, str]:
        """Members that it is no use to wait for, with what is known of them."""
        silent_s = self.silence_s if silent_s is None else silent_s
        gone = {}
        for rank, state in self._states.items():
            if rank not in self.members:
                continue
            if state["ended"]:
                gone[rank] = "has ended"
                continue
            runs = _runs(state["process"], self._me)
            if runs == "no":
                gone[rank] = "died: its process is gone"
                continue
            if runs == "yes":
                continue  # however slow it is
            # A store that doesn't answer says nothing of anyone.
            silence = (now if runs == "stopped" else self._answered) - self._changed[rank]
            if silence > (silent_s if runs == "stopped" else 2 * silent_s):
                how = "is stopped, and" if runs == "stopped" else "lives no more or is cut off, and"
                gone[rank] = f"{how} has said nothing for {silence:.0f} s"
        return gone

    @property
    def silence_s(self) -> float:
        """After which a rank is lost that is stopped and says nothing."""
        return max(2 * BEAT_S, min(LOST_S, self.timeout_s / 2))

    def _tell_excluded(self) -> str:
        return (
            f"rank {self.rank} was away for so long that the others went on without it: end this "
            "process; to have it back, start all ranks anew"
        )

    def _tell_lost(self, gone: Mapping[int, str]) -> str:
        return "; ".join(f"rank {rank} {how}" for rank, how in sorted(gone.items()))

    def _tell_apart(self, mine: State, theirs: Mapping[int, State]) -> str:
        lines = ["the ranks are at different points, and would wait for each other for ever:"]
        all_ = {self.rank: mine, **theirs}
        lines += [f"  rank {r}: {at['doing']}, {at['what']}" for r, at in sorted(all_.items())]
        lines.append(
            "Every rank must make the same calls in the same order: the same steps, the same "
            "callbacks, the same interrupts, the same settings of the autoencoder"
        )
        return "\n".join(lines)

    def _tell_late(self, waiting: State, allowed: float, now: float) -> str:
        lines = [f"waited {allowed:.3g} s for the others in {waiting['doing']}, {waiting['what']}:"]
        for rank in self.members:
            if rank != self.rank:
                state = self._states.get(rank)
                at = "it never called what piflux parallelized"
                if state is not None:
                    at = f"it lives, and is at {state['doing']} of its image {state['image']}"
                    if state["waiting"]:
                        at += f", where it waits for {state['waiting']['what']}"
                lines.append(f"  rank {rank}: {at}")
        lines.append(
            "Call the model on every rank, or set PIFLUX_TIMEOUT_S to more seconds if that "
            "takes longer"
        )
        if now - self._answered > self.silence_s:
            lines.append("The store of the process group has not answered meanwhile, either")
        return "\n".join(lines)

    # --- waiting ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def awaiting(self, what: str) -> Iterator[None]:
        """The main thread waits inside for what others send over the link.

        Raises:
            RankLost, RankFailed, RanksDisagree: in place of what the link raises.
        """
        self._waits += 1
        self._waiting = {
            "what": what,
            "number": self._waits,
            "doing": self.doing,
            "since": time.monotonic(),
        }
        try:
            yield
        except RuntimeError as error:
            if not _is_of_link(error):
                raise
            self._explain(error)
        finally:
            with self._lock:
                self._waiting = None
        self.exchanged = True

    def _explain(self, error: Exception) -> NoReturn:
        """Raise what the link's error comes of."""
        waiting, until = self._waiting, time.monotonic() + 2 * self.silence_s
        assert waiting is not None
        why, unanswered = self._why, 0
        while why is None and time.monotonic() < until:
            try:
                self._look(self.silence_s)
            except Exception:
                unanswered += 1
                if unanswered > 2:
                    break
            now = time.monotonic()
            # What was said before what was not: who is slow to speak need not be lost.
            why = self._reason(waiting, now)
            if why is None and (gone := self._gone(now, 2 * BEAT_S)):
                why = "lost", self._tell_lost(gone)
            if why is None:
                time.sleep(HURRY_S)
        if why is None:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if unanswered and len(self.members) == 2:
                # Who held the store was the other one: nobody is left to agree with.
                (other,) = (rank for rank in self.members if rank != self.rank)
                self._alone()
                text = f"rank {other} is gone, and with it the store of the process group"
                raise RankLost(text, [other]) from error
            where = "; the store of the process group is gone, too" if unanswered else ""
            why = "failed", f"a connection between ranks broke{where}: {first}"
        self._leave(*why)
        raise self._error(*why) from error

    def _error(self, kind: str, text: str) -> PifluxError:
        if kind == "excluded":
            return Excluded(text)
        gone = self._gone(time.monotonic(), 2 * BEAT_S)
        if kind == "lost" and self._spoiled:
            return RankLost(
                f"{text}: this image is lost, since the GPU was steps ahead. The ranks that are "
                "left go on at the next one",
                list(gone),
                resumable=False,
            )
        if kind == "lost":
            return RankLost(
                f"{text}. Without it this image can't go on as it was; at their next call the "
                "ranks that are left go on without it",
                list(gone),
            )
        if kind == "disagree":
            return RanksDisagree(text)
        if kind == "stopped":
            return RankFailed(
                f"{text}: this image is lost on all ranks. They are ready for the next one, which "
                "all have to begin"
            )
        return RankFailed(text)

    def _leave(self, kind: str, text: str) -> None:
        """The epoch has ended for this rank: say why, and let nobody wait for it."""
        if self._left is None or self._left["epoch"] != self._epoch:
            self._left = {"epoch": self._epoch, "kind": kind, "text": text, "image": self.image}
        if self._link is not None:
            # First said, then done: whoever is woken up looks for the reason.
            with contextlib.suppress(Exception):  # who can't be told is told by the link's end
                self._look(self.silence_s)
            self._link.end()
            self._link.left.set()
            self._link = None

    def start(self, whole: Tensor, piece: Tensor, what: str) -> Sequence[dist.Work]:
        """Start to gather everyone's piece, (bytes,), into (members, bytes); both of uint8."""
        link = self.link()
        if link.size == 1:
            whole[0].copy_(piece)
            return ()
        try:
            return link.gather(whole, piece, what)
        except RuntimeError as error:
            with self.awaiting(what):
                raise error

    def finish(self, works: Sequence[dist.Work], device: torch.device, what: str) -> None:
        """Wait for what `start` returned, on CPUs; on a GPU what comes next on it does.

        Raises: see `awaiting`.
        """
        if works:
            with self.awaiting(f"a gather of {what}"):
                Link.wait(works, device)

    def compare(self, headers: Tensor) -> None:
        """Of all ranks; see `piflux.ranks.header`.

        Raises:
            RanksDisagree: they differ. On a GPU `settle` raises it.
        """
        differ = apart(headers)
        if headers.is_cuda:
            flag = differ.reshape(1, 1)
            before = self._headers
            if before is not None and before[1].shape == headers.shape:
                flag, headers = before[0] | flag, torch.where(before[0], before[1], headers)
            self._headers = flag, headers.clone()
            wished = torch.empty((), dtype=torch.bool, pin_memory=True)
            wished.copy_(wishes(headers), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._wishes.append((event, wished))
            if not self._given:
                self._progress = time.monotonic()
            self._given.append(event)
        elif differ:
            self._disagree(tell(headers))
        else:
            self._wished |= bool(wishes(headers))

    def wished(self) -> bool:
        """Whether any rank wants the image to end: after the same prediction on all ranks.

        On a GPU the latest prediction is left out, for which the host would have to wait.
        """
        while len(self._wishes) > 1:
            event, wished = self._wishes.popleft()
            # The host looks, rather than wait where nothing could call it back.
            while not event.query() and not (self._link is None or self._link.broken):
                time.sleep(LOOK_S)
            self._wished |= event.query() and bool(wished)
        return self._wished

    def _is_device_busy(self) -> bool:
        """Whether steps were given to a GPU that it hasn't come to an end of."""
        with self._looking:  # both threads do
            while self._given and self._given[0].query():
                self._given.popleft()
                self._progress = time.monotonic()
            return bool(self._given)

    def _disagree(self, text: str) -> NoReturn:
        self._leave("disagree", text)
        raise self._error("disagree", text)

    def settle(self) -> None:
        """An image ends: see `Ranks.settle`."""
        # The host looks, rather than wait where nothing could call it back.
        while self._is_device_busy() and not (self._link is None or self._link.broken):
            time.sleep(LOOK_S)
        if self._link is not None and self._link.broken:
            with self.awaiting(DEVICE):
                raise RuntimeError("the connections between ranks have been ended")
        kept, self._headers = self._headers, None
        if kept is not None and bool(kept[0]):
            self._disagree(tell(kept[1].cpu()))

    # --- epochs ----------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The number of the present one, -1 before the first."""
        return self._epoch

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def index(self) -> int:
        """This rank's number among the members."""
        return self.members.index(self.rank)

    def link(self) -> Link:
        """Connections of the present epoch, or of a new one if it has ended. All call it together.

        Raises:
            RankFailed: not all came in time.
            Excluded: the others have gone on without this rank.
        """
        if self._link is None:
            self._meet()
        assert self._link is not None
        return self._link

    def _alone(self) -> None:
        """Nobody is left."""
        self._leave("lost", "the others are gone")
        epoch = self._epoch + 1
        link = Link(self._store, f"{self._name}-{epoch}", 0, 1, self.backends, 1.0)
        self._enter(epoch, (self.rank,), link)

    def _meet(self) -> None:
        if self.members == (self.rank,):
            return self._alone()
        epoch, began, doing = self._epoch + 1, time.monotonic(), self.doing
        self._here = epoch
        try:
            members = self._agreed_members(epoch, began)
            if self.rank not in members:
                raise Excluded(self._tell_excluded())
            if len(members) < len(self.members):
                left = [rank for rank in self.members if rank not in members]
                log.warning(
                    "rank %d: goes on without %s",
                    self.rank,
                    " and ".join(f"rank {rank}" for rank in left),
                )
            self._connect(epoch, members, began)
        finally:
            self._here, self.doing = None, doing

    def _agreed_members(self, epoch: int, began: float) -> tuple[int, ...]:
        """Those who are here when all others are gone: whoever finds it first writes it down."""
        key, others = f"members/{epoch}", [r for r in self.members if r != self.rank]

        def decided(store: dist.Store) -> tuple[dict[int, State], str | None]:
            states = self._write_and_read(store)
            return states, store.get(key).decode() if store.check([key]) else None

        while True:
            try:
                states, found = self._board.ask(decided).get(2 * self.silence_s)
            except Exception as error:
                if len(others) == 1 and self._epoch >= 0:
                    return (self.rank,)  # the store went with the other one
                raise RankFailed(
                    f"the store of the process group doesn't answer rank {self.rank} "
                    f"({_line(error)}): the process that holds it is gone or cut off. Start all "
                    "ranks anew"
                ) from error
            self._take(states)
            if found is not None:
                return tuple(json.loads(found))
            now = time.monotonic()
            gone = self._gone(now)
            here = [r for r in others if r in self._states and self._states[r]["here"] == epoch]
            if all(rank in here or rank in gone for rank in others):
                mine = json.dumps(sorted([self.rank, *here]))
                written = self._board.ask(methodcaller("compare_set", key, "", mine))
                return tuple(json.loads(written.get(2 * self.silence_s)))
            for rank in others:
                stopped = self._states.get(rank, {}).get("given_up")
                if stopped is not None and stopped[0] == self.image and rank not in here:
                    raise self._error("stopped", stopped[1])
            busy = any(state["busy"] for state in self._states.values())
            allowed = max(self.timeout_s, COMPILING_S) if busy else self.timeout_s
            if now - began > allowed:
                at = {"doing": self.doing, "what": "the beginning of an epoch"}
                raise RankFailed(self._tell_late(at, allowed, now))
            time.sleep(HURRY_S / 5)

    def _connect(self, epoch: int, members: tuple[int, ...], began: float) -> None:
        name = f"{self._name}-{epoch}"
        store = dist.PrefixStore(f"epoch-{epoch}", self._store)
        index, size = members.index(self.rank), len(members)
        try:
            link = bounded(
                lambda: Link(store, name, index, size, self.backends, self.timeout_s),
                self.timeout_s + BEAT_S,
            )
        except Exception as error:
            self._epoch, self.members = epoch, members
            self._leave("failed", f"rank {self.rank} could not connect: {_line(error)}")
            if gone := self._gone(time.monotonic()):
                raise RankLost(self._tell_lost(gone), list(gone)) from error
            raise RankFailed(
                f"rank {self.rank} could not connect to the others within {self.timeout_s:.3g} s: "
                f"{_line(error)}"
            ) from error
        self._enter(epoch, members, link)

    def _enter(self, epoch: int, members: tuple[int, ...], link: Link) -> None:
        with self._lock:
            self._epoch, self.members, self._link = epoch, members, link
            self._why, self._left, self._waits = None, None, 0
            self._given.clear()
            self._headers, self._spoiled = None, False

    # --- images ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def image_under_way(self) -> Iterator[None]:
        """An image, or a call of a model that belongs to none. What leaves it ends the epoch, so
        that no rank waits for this one."""
        if not self._depth:
            self.begin()
        with self.together():
            yield

    def begin(self) -> None:
        self.image += 1
        self.calls = 0
        self.exchanged = False
        self.wish = self._wished = False
        self._wishes.clear()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What leaves the outermost of these ends the epoch, unless all raise it alike."""
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self.stop(error)
            raise
        finally:
            self._depth -= 1

    def stop(self, error: BaseException) -> None:
        """Tell the others that this rank doesn't go on with the image."""
        told = vars(error).setdefault("told_to_ranks", [])
        if getattr(error, "on_all_ranks", False) or id(self) in told:
            return
        told.append(id(self))
        said = _line(error) if str(error) else ""
        what = f"{type(error).__name__}: {said}" if said else type(error).__name__
        text = f"rank {self.rank} stopped in {self.doing} by {what}"
        self._given_up = self.image, text
        if self._link is not None:
            self._leave("stopped", text)
        if not self._depth:  # no more of an image whose beginning was inferred
            self.begin()

    def exchange(self, mine: Any, what: str) -> list[Any]:
        """Everyone's, by their order in the epoch; picklable.

        The first of an image finds all ranks, too: those that stopped in the last image after this
        one had ended it are met anew.

        Raises:
            RanksDisagree: on all ranks, which are here for something else.
            RankLost, RankFailed: see `awaiting`.
        """
        while True:
            first = not self.exchanged
            link, image = self.link(), self.image
            if link.size == 1:
                return [mine]
            data = pickle.dumps((image, what, mine))
            try:
                with self.awaiting(f"exchange of {what}"):
                    everyones = link.exchange(data)
            except (RankFailed, RanksDisagree):
                # Who left in the last image, or is still in it and is told now, is met anew.
                if not (first and self._is_ahead(image)):
                    raise
                continue
            told = [pickle.loads(x) for x in everyones]
            images = [x for x, _, _ in told]
            if len(set(images)) == 1:
                break
            if not first or image < max(images):
                if not self._depth:  # nobody counts on: their next call is of the same image
                    self.image = max(images)
                self._apart("image number", images)
            # The others are told that they are in an image which this rank has left.
            self.exchanged = False
        if len({x for _, x, _ in told}) > 1:
            self._apart("the ranks exchange", [x for _, x, _ in told])
        return [x for _, _, x in told]

    def _is_ahead(self, image: int) -> bool:
        """Whether another rank of this epoch is in an earlier image, or has left it in one."""
        there = [s for s in self._states.values() if s["epoch"] == self._epoch]
        left = [s["left"] for s in there if s["left"] and s["left"]["epoch"] == self._epoch]
        return any(x["image"] < image for x in (*left, *there))

    def _apart(self, name: str, values: Sequence[Any]) -> NoReturn:
        lines = [f"the ranks are at different points:\n  {name}"]
        lines += [f"    rank {r}: {x}" for r, x in zip(self.members, values, strict=True)]
        lines.append("Every rank must make the same calls, in the same order")
        error = RanksDisagree("\n".join(lines))
        error.on_all_ranks = True
        raise error

    def close(self) -> None:
        """This rank takes no part any more. Called again, it does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        atexit.unregister(self.close)
        self._board.ask(lambda store: store.set(f"state/{self.rank}", json.dumps(self._state())))
        if self._link is not None:
            self._link.end()
            self._link.left.set()
            self._link = None
        self._board.close(1.0)
        if threading.current_thread() is not self._watch:
            self._watch.join(1.0)


def _is_of_link(error: RuntimeError) -> bool:
    """Whether a connection failed: others, such as want of memory, have types of their own."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _process() -> dict[str, Any]:
    """What tells this process from all others, on this host and elsewhere."""
    found: dict[str, Any] = {"host": None, "pid": os.getpid(), "began": None}
    with contextlib.suppress(OSError):  # no Linux: then only silence tells
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        found |= {"host": f"{socket.gethostname()} {boot} {space}", "began": _stat(os.getpid())[1]}
    return found


def _stat(pid: int) -> tuple[str, str]:
    """A process's state, one letter, and when it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _runs(process: Mapping[str, Any], me: Mapping[str, Any]) -> str:
    """Whether a process runs: 'yes', 'no', 'stopped', or 'unknown' of another host's."""
    if process["host"] is None or process["host"] != me["host"]:
        return "unknown"
    try:
        state, began = _stat(process["pid"])
    except OSError:
        return "no"
    if state in "ZX" or began != process["began"]:
        return "no"
    return "stopped" if state in "Tt" else "yes"
