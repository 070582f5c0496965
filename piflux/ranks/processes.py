"""A rank a process: the images that ranks draw together, and what they send each other."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.errors import RankFailed, RankLost, RanksDisagree
from piflux.ranks.agreement import check_agreement
from piflux.ranks.alive import Process
from piflux.ranks.collectives import Collective, Filling
from piflux.ranks.copies import Copies, Peers, reach
from piflux.ranks.environment import DEFAULT_TIMEOUT_S, timeout_asked, timeout_s
from piflux.ranks.epochs import Epochs
from piflux.ranks.links import Link
from piflux.ranks.meeting import Meeting
from piflux.ranks.presence import Presence, Word
from piflux.ranks.protocol import Filled, Gathering, Result
from piflux.ranks.reasons import Reason, line_of
from piflux.ranks.waiting import Waiting

_RANKS: WeakKeyDictionary[dist.ProcessGroup | Meeting, ProcessRanks] = WeakKeyDictionary()


class ProcessRanks:
    """The ranks of a group, whatever models of this process they share; see `Ranks`, and `of`.

    Of the group come only the membership and the store: what ranks send to each other goes over
    connections of piflux's own, new ones in each epoch. The group is held weakly: who destroys it
    means to, and that ends them.

    Attributes:
        backends: by the type of a device, which of torch's backends serves it.
    """

    in_one_process = False

    @classmethod
    def of(cls, group: dist.ProcessGroup | Meeting) -> ProcessRanks:
        """Those of a group: there is one such object in a process, until the group's end."""
        if group not in _RANKS:
            if isinstance(group, Meeting):
                # Not the meeting itself, which is to end when nobody else holds it.
                store = dist.PrefixStore(group.name, group.store)  # others meet there, too
                meeting = replace(group, store=store)
                within_s = timeout_asked() or DEFAULT_TIMEOUT_S
            else:
                meeting, within_s = Meeting.of(group), timeout_s(group)
            _RANKS[group] = ranks = cls(meeting, within_s)
            weakref.finalize(group, ranks.close).atexit = False
        return _RANKS[group]

    def __init__(self, meeting: Meeting, timeout_s: float) -> None:
        """`timeout_s`: how long a rank is waited for that lives."""
        self.doing = "the beginning"
        self.busy = False
        self.calling = threading.RLock()
        self.wish = False
        self.backends = meeting.backends
        self._rank = meeting.rank
        self._process = Process.own()
        self._image = self._calls = 0  # how many have begun; of models, in the last of them
        self._depth = 0  # of images, one inside another
        self._is_over = False  # whether the latest image that was begun as such has ended
        self._given_up: tuple[int, str] | None = None
        self._ended = False
        self._peers: dict[torch.device, Peers | None] = {}
        self._peers_of: Link | None = None
        self._presence = Presence(meeting, timeout_s, self._word)
        self._epochs = Epochs(meeting, self._presence, timeout_s)
        self._waiting = Waiting(self._presence, self._epochs, meeting.rank, timeout_s)
        self._presence.watch(self._waiting.waits, self._waiting.call_back)
        atexit.register(self.close)

    def _word(self) -> Word:
        wait = self._waiting.wait
        return Word(
            process=self._process,
            epoch=self._epochs.present.number,
            image=self._image,
            doing=self.doing,
            busy=self.busy and wait is None,
            wait=wait,
            left=self._epochs.left,
            here=self._epochs.here,
            given_up=self._given_up,
            ended=self._ended,
        )

    def close(self) -> None:
        """This rank takes no part any more. Called again, it does nothing.

        Nor where this rank's process was forked: the connections are the rank's, which goes on.
        """
        if self._ended or not self._is_here():
            return
        self._ended = True
        atexit.unregister(self.close)
        self._presence.close()
        link = self._epochs.present.link
        if link is not None:
            self._epochs.end(link)

    def _is_here(self) -> bool:
        """Whether this is the rank's own process, not one that was forked of it."""
        return self._process.pid == os.getpid()

    # --- who they are ----------------------------------------------------------------------------

    @property
    def members(self) -> tuple[int, ...]:
        """Those of the present epoch, by their ranks in the group."""
        return self._epochs.present.members

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def rank(self) -> int:
        """This one's number among the members."""
        return self.members.index(self._rank)

    @property
    def link(self) -> Link:
        """Of the present epoch; ranks that are in none meet first.

        Raises:
            RuntimeError: the group has ended, or this process was forked of a rank's.
            RankFailed, RankLost, Excluded: see `Epochs.link`.
        """
        if not self._is_here():
            raise RuntimeError(
                f"this process was forked of rank {self._rank}'s, and is no rank: call the model "
                "in the rank's own process, or start another process by 'spawn'"
            )
        if self._ended:
            raise RuntimeError(
                "the process group of this model was destroyed: parallelize it again in a new one"
            )
        self._enter()
        return self._epochs.link()

    @property
    def epoch(self) -> int:
        """Ranks that are in none meet first."""
        assert self.link is not None, "raises"
        return self._epochs.present.number

    # --- images ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def image(self) -> Iterator[None]:
        if not self._depth:
            self._begin()
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self.stop(error)
            raise
        finally:
            self._depth -= 1
            self._is_over = not self._depth

    def _enter(self) -> None:
        """What comes after an image is not of it, even if it begins none."""
        if self._is_over:
            self._begin()

    def _begin(self) -> None:
        self._is_over = False
        self._image += 1
        self._calls = 0
        self._waiting.waited = False
        self.wish = False
        self._epochs.present.predictions.begin()

    def at(self) -> tuple[int, int]:
        return self._image, self._calls

    def calls(self) -> str:
        self._enter()
        self._calls += 1
        return f"call {self._calls} of image {self._image}"

    def settle(self) -> None:
        self._waiting.settle()

    def wished(self) -> bool:
        """Whether any rank wants the image to end: all ranks know it after the same step."""
        return self._waiting.wished()

    def stop(self, error: BaseException) -> None:
        told = vars(error).setdefault("told_to_ranks", [])
        if id(self) in told or not self._is_here():
            return
        told.append(id(self))
        if not getattr(error, "on_all_ranks", False):
            inner = getattr(error, "inner_exception", error)  # what Dynamo wraps of its backend's
            what = type(inner).__name__ + (f": {line_of(inner)}" if str(inner) else "")
            text = f"rank {self._rank} stopped in {self.doing} by {what}"
            self._given_up = self._image, text
            if self._epochs.present.link is not None:
                self._epochs.leave(Reason("stopped", text))
        if not self._depth:  # no more of an image whose beginning was inferred
            self._begin()

    def surviving(self, act: Callable[[], Result], what: str) -> Result:
        while True:
            try:
                return act()
            except RankLost as error:
                if not error.resumable:
                    raise
                lost = error
            while True:
                try:
                    told = self.exchange(what, "points to go on from")
                    break
                except RankLost as error:
                    lost = error
            if len(set(told)) > 1:
                failed = RankLost(
                    f"{lost}\nThe ranks that are left were at different points ("
                    f"{', '.join(sorted(set(told)))}), so that this image has to be drawn again",
                    lost.ranks,
                    resumable=False,
                )
                failed.on_all_ranks = True
                raise failed from lost

    # --- what they send --------------------------------------------------------------------------

    def gather(self, piece: Tensor, header: Tensor | None = None) -> Gathering:
        what = "pieces" if header is None else "the prediction"
        return Collective(piece, self.size, self._waiting, what, header)

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        peers = self._reached(device)
        if peers is not None:
            return Copies(count, peers)
        piece = torch.empty(count, dtype=torch.uint8, device=device)
        return Collective(piece, self.size, self._waiting, "keys and values")

    def filled(self, count: int, device: torch.device) -> Filled:
        """Memory that is filled in the background, with up to `count` bytes of every rank.

        All ranks make as many, in one order, and anew in each epoch.
        """
        peers = self._reached(device)
        if peers is not None:
            return Copies(count, peers, urgent=False)
        return Filling(count, self.rank, self.size, self._waiting, device)

    def _reached(self, device: torch.device) -> Peers | None:
        link = self.link
        if self._peers_of is not link:
            self._peers_of, self._peers = link, {}
            link.at_end(self._peers.clear)  # with the memory that they share
        if device not in self._peers:
            self._peers[device] = reach(link, device, self.exchange)
        return self._peers[device]

    def exchange(self, mine: Any, what: str) -> list[Any]:
        """Everyone's, by rank; picklable.

        The first of an image finds all ranks, too: those that stopped in the last image after this
        one had ended it are met anew.

        Raises:
            RanksDisagree: on all ranks, which are here for something else.
            RankLost, RankFailed: see `Waiting.awaiting`.
        """
        while True:
            first = not self._waiting.waited
            link, image = self.link, self._image
            if link.size == 1:
                return [mine]
            data = pickle.dumps((image, what, mine))
            try:
                with self._waiting.awaiting(f"exchange of {what}"):
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
                self._image = max(images) - 1  # the next one is that in which the others wait
                self._refuse("image number", images)
            # The others are told that they are in an image which this rank has left.
            self._waiting.waited = False
        if len({x for _, x, _ in told}) > 1:
            self._refuse("the ranks exchange", [x for _, x, _ in told])
        return [x for _, _, x in told]

    def _is_ahead(self, image: int) -> bool:
        """Whether another rank of this epoch is in an earlier image, or has left it in one."""
        number = self._epochs.present.number
        there = [word for word in self._presence.words.values() if word.epoch == number]
        left = [word.left for word in there if word.left and word.left.epoch == number]
        return min([x.image for x in there] + [x.image for x in left], default=image) < image

    def _refuse(self, name: str, values: Sequence[Any]) -> NoReturn:
        lines = [f"the ranks are at different points:\n  {name}"]
        lines += [f"    rank {r}: {x}" for r, x in zip(self.members, values, strict=True)]
        lines.append("Every rank must make the same calls, in the same order")
        error = RanksDisagree("\n".join(lines))
        error.on_all_ranks = True
        raise error

    def any(self, flag: bool) -> bool:
        return any(self.exchange(flag, "votes"))

    def least(self, values: Sequence[float]) -> list[float]:
        everyones = self.exchange(list(values), "numbers")
        return [min(several) for several in zip(*everyones, strict=True)]

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        check_agreement(self.exchange(dict(fingerprint), "fingerprints"))

    def run(self, step: Callable[[], Result]) -> Result:
        return step()
