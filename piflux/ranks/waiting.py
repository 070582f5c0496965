"""Waiting for other ranks, no longer than it is of use.

The main thread waits in a collective, or for a GPU that does, and can't be reached there. So the
watch calls it back as soon as another rank has stopped, died, or waits for something else: it ends
the link, the collective raises, and what is raised in the end says what happened.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from piflux.errors import RankLost
from piflux.ranks.epochs import Epochs
from piflux.ranks.links import Link
from piflux.ranks.presence import BEAT_S, HURRY_S, Presence, Wait, Word
from piflux.ranks.reasons import Reason, apart, excluded, late, line_of, lost

SURE = 3
"""After so many beats at one place a rank is taken to stay there."""

LOOK_S = 0.0005
"""How often the host looks whether a GPU is done."""

DEVICE = "the device"


class Waiting:
    """What one rank's main thread waits for.

    Args:
        presence: who is there.
        epochs: whose connections it waits for.
        rank: of this process.
        timeout_s: how long a rank is waited for that lives.

    Attributes:
        wait: what the main thread waits for now, a device excepted.
        waited: whether it has waited for others since this was last set to False.
    """

    def __init__(self, presence: Presence, epochs: Epochs, rank: int, timeout_s: float) -> None:
        self.wait: Wait | None = None
        self.waited = False
        self._presence, self._epochs = presence, epochs
        self._rank, self._timeout_s = rank, timeout_s
        self._still: dict[int, tuple[int, int]] = {}  # since which beat a rank is in which wait
        self._device: Wait | None = None  # the watch's own, while a device is what waits
        self._lock = threading.Lock()

    # --- the main thread -------------------------------------------------------------------------

    @contextlib.contextmanager
    def awaiting(self, what: str) -> Iterator[None]:
        """Inside the main thread waits for what others send over the link.

        Raises:
            RankLost, RankFailed, RanksDisagree: in place of what the link raises.
        """
        epoch, presence = self._epochs.present, self._presence
        epoch.waits += 1
        doing = presence.say().doing
        wait = Wait(what, epoch.waits, doing, time.monotonic(), presence.beat)
        self.wait = wait
        try:
            yield
        except RuntimeError as error:
            if not _is_of_link(error):
                raise
            self._explain(wait, error)
        finally:
            with self._lock:
                self.wait = None
        self.waited = True

    def start(self, whole: Tensor, piece: Tensor, what: str) -> Sequence[dist.Work]:
        """Start to gather everyone's piece, (bytes,), into (members, bytes); both of uint8.

        Raises: see `awaiting`.
        """
        link = self._epochs.link()
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
        """A prediction's; see `Predictions.compare`.

        Raises:
            RanksDisagree: they differ. On a GPU `settle` raises it.
        """
        self._refuse(self._epochs.present.predictions.compare(headers))

    def wished(self) -> bool:
        """Whether any rank wants the image to end: after the same prediction on all ranks."""
        predictions = self._epochs.present.predictions
        while not (predictions.wishes_known() or self._is_broken()):
            time.sleep(LOOK_S)
        return predictions.wished()

    def settle(self) -> None:
        """An image ends: see `Ranks.settle`."""
        epoch = self._epochs.present
        while epoch.predictions.is_device_busy() and not self._is_broken():
            time.sleep(LOOK_S)
        if epoch.link is not None and epoch.link.broken:
            with self.awaiting(DEVICE):
                raise RuntimeError("the connections between ranks have been ended")
        self._refuse(epoch.predictions.differing())

    def _is_broken(self) -> bool:
        """While it is not the host looks for the device, rather than wait where nothing could call
        it back."""
        link = self._epochs.present.link
        return link is None or link.broken

    def _refuse(self, differing: str | None) -> None:
        if differing is not None:
            reason = Reason("disagree", differing)
            self._epochs.leave(reason)
            raise reason.error()

    def _explain(self, wait: Wait, error: Exception) -> NoReturn:
        """Raise what the link's error comes of."""
        presence, epoch = self._presence, self._epochs.present
        until = time.monotonic() + 2 * presence.silence_s
        why, unanswered = epoch.why, 0
        while why is None and time.monotonic() < until:
            try:
                presence.look()
            except Exception:
                unanswered += 1
                if unanswered > 2:
                    break
            # What was said before what was not: who is slow to speak need not be lost.
            why = self._reason(wait)
            if why is None and (gone := presence.gone(2 * BEAT_S)):
                why = lost(gone)
            if why is None:
                time.sleep(HURRY_S)
        if why is None:
            if unanswered and len(epoch.members) == 2:
                # Who held the store was the other one: nobody is left to agree with.
                (other,) = (rank for rank in epoch.members if rank != self._rank)
                self._epochs.alone()
                text = f"rank {other} is gone, and with it the store of the process group"
                raise RankLost(text, [other]) from error
            where = "; the store of the process group is gone, too" if unanswered else ""
            text = f"a connection between ranks broke{where}: {line_of(error)}"
            why = Reason("failed", text)
        self._epochs.leave(why)
        raise why.error(presence.gone(2 * BEAT_S), resumable=not epoch.spoiled) from error

    # --- the watch -------------------------------------------------------------------------------

    def waits(self) -> Wait | None:
        """What this rank waits for, be it by its device."""
        epoch, wait = self._epochs.present, self.wait
        if wait is not None or not epoch.predictions.is_device_busy():
            return wait
        presence, since = self._presence, epoch.predictions.progress
        if self._device is None or self._device.since != since:  # it has come further
            self._device = Wait(DEVICE, -1, presence.say().doing, since, presence.beat)
        return self._device

    def call_back(self, wait: Wait) -> None:
        """End the link if it is no use to wait any longer."""
        epoch, why = self._epochs.present, self._reason(wait)
        if why is None or epoch.link is None:
            return
        with self._lock:
            if self.wait is wait or wait.what == DEVICE:
                epoch.why = epoch.why or why
                epoch.spoiled = epoch.predictions.is_device_busy()
                epoch.link.end()

    def _reason(self, wait: Wait) -> Reason | None:
        """What speaks against waiting on."""
        presence, epoch = self._presence, self._epochs.present
        words = presence.words
        if any(word.epoch > epoch.number for word in words.values()):
            return excluded(self._rank)
        if gone := presence.gone():
            return lost(gone)
        for rank, word in words.items():
            if word.left is not None and word.left.epoch == epoch.number:
                return Reason(word.left.kind, word.left.text)
            theirs = word.wait if word.epoch == epoch.number else None
            if theirs and theirs.number == wait.number and theirs.what != wait.what:
                return apart({self._rank: wait, rank: theirs})
        waits = {r: word.wait for r, word in words.items() if word.epoch == epoch.number}
        all_ = {rank: theirs for rank, theirs in waits.items() if theirs is not None}
        all_wait = len(all_) == len(epoch.members) - 1
        if self._stuck(wait, all_ if all_wait else {}, words):
            return apart({self._rank: wait, **all_})
        allowed, now = self._epochs.allowed([*words.values()]), time.monotonic()
        if now - wait.since > allowed:
            others = [rank for rank in epoch.members if rank != self._rank]
            silent = now - presence.answered > presence.silence_s
            where = f"{wait.doing}, {wait.what}"
            return late(allowed, where, others, words, board_is_silent=silent)
        return None

    def _stuck(self, mine: Wait, theirs: Mapping[int, Wait], words: Mapping[int, Word]) -> bool:
        """Whether all wait, for different things, and have done so for long.

        `theirs`: by rank; none if not all wait.

        Not at once: what one waits for may still be on its way, while another has it already. How
        long is counted in beats, which a machine that is busy with other things makes fewer of.
        """
        long = self._timeout_s / 4 / HURRY_S
        beats = [words[rank].beat - wait.beat for rank, wait in theirs.items()]
        beats.append(self._presence.beat - mine.beat)
        if min(beats) < long or all(wait.what == mine.what for wait in theirs.values()):
            self._still = {}
            return False
        # Nor by what was written long ago: who has been slow since may have gone on.
        for rank, wait in theirs.items():
            if self._still.get(rank, (0, -1))[1] != wait.number:
                self._still[rank] = words[rank].beat, wait.number
        return all(words[rank].beat - beat >= SURE for rank, (beat, _) in self._still.items())


def _is_of_link(error: RuntimeError) -> bool:
    """Whether a connection failed: others, such as want of memory, have types of their own."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
