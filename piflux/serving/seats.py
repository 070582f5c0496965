"""Ranks' processes: started, heard, ended, and started anew where one is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from piflux.serving.calls import Call
from piflux.serving.messages import Command, End, Gone, Load, Told, Worker, Workers

log = logging.getLogger(__name__)

WORKERS_END_S = 3.0
"""How long workers may take to end by themselves."""

RANK_STARTS = 3
"""Of a rank in a row, that come to nothing: then an engine that starts has failed."""

STARTS_LATER = 10
"""Likewise of all ranks of an engine that was ready."""

START_PAUSE_S = 1.0
"""Before a rank is started that came to nothing; twice as long each time."""

LONGEST_PAUSE_S = 60.0


@dataclass(eq=False)
class Seat:
    """One rank's place.

    Attributes:
        number: the rank's.
        incarnation: how many processes there have been before the present one.
        worker: the present one.
        loaded: whether it can draw.
        call: what it draws.
        failures: processes in a row that ended before they had drawn.
        memory: bytes in use.
    """

    number: int
    incarnation: int = -1
    worker: Worker | None = None
    loaded: bool = False
    call: Call | None = None
    failures: int = 0
    memory: int = 0

    @property
    def is_free(self) -> bool:
        return self.loaded and self.call is None

    def send(self, command: Command) -> None:
        if self.worker is not None:
            self.worker.send(command)

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.kill()


class Seats:
    """The ranks' places, by number.

    Args:
        ranks: how many.
        workers: how processes are started.
        load: each one's first command.
        hear: what a rank tells of itself and its call.
        lose: a rank is gone, and with it its part of the call, if it drew.
        fail: ranks come to nothing again and again: no more are started.

    Attributes:
        ready: whether the ranks have served: then more of them may come to nothing.
        replaced: how many were started in place of others.
        store: host and port where ranks meet.
    """

    def __init__(
        self,
        ranks: int,
        workers: Workers,
        load: Load,
        *,
        hear: Callable[[Seat, Told], None],
        lose: Callable[[Seat, Call | None], None],
        fail: Callable[[str], None],
    ) -> None:
        self._seats = [Seat(number) for number in range(ranks)]
        self._workers, self._load = workers, load
        self._tell, self._lose, self._fail = hear, lose, fail
        self._replacing: set[asyncio.Task[None]] = set()
        self._over = False
        self.ready = False
        self.replaced = 0
        self.store = ("", 0)

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats)

    def __len__(self) -> int:
        return len(self._seats)

    def __getitem__(self, number: int) -> Seat:
        return self._seats[number]

    async def open(self) -> None:
        """Start them all."""
        self.store = self._workers.open()
        for seat in self._seats:
            self._start(seat)

    def prepare(self) -> None:
        """Have a process at hand that takes a lost one's place, once all have loaded."""
        if not self._over and all(seat.loaded for seat in self._seats):
            self._workers.prepare()

    def stop_replacing(self) -> None:
        """From now on none is started."""
        self._over = True
        for task in self._replacing:
            task.cancel()

    async def close(self) -> None:
        """End them all."""
        self.stop_replacing()
        alive = [seat for seat in self._seats if seat.worker is not None]
        for seat in alive:
            seat.send(End())
        until = time.monotonic() + WORKERS_END_S
        while any(seat.worker is not None for seat in alive) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for seat in alive:
            seat.kill()
        while any(seat.worker is not None for seat in alive):
            await asyncio.sleep(0.01)
        self._workers.close()

    def _start(self, seat: Seat) -> None:
        seat.incarnation += 1
        loop, incarnation = asyncio.get_running_loop(), seat.incarnation

        def hear(told: Told) -> None:
            # The loop may have ended before the last worker.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._hear, seat, incarnation, told)

        seat.worker = self._workers.start(seat.number, hear)
        seat.worker.send(self._load)

    def _hear(self, seat: Seat, incarnation: int, told: Told) -> None:
        if incarnation != seat.incarnation:
            return
        if isinstance(told, Gone):
            self._lost(seat, told)
        else:
            self._tell(seat, told)

    def _lost(self, seat: Seat, told: Gone) -> None:
        was_loaded, call = seat.loaded, seat.call
        seat.failures += 1
        seat.worker, seat.loaded, seat.call = None, False, None
        if not self._over:
            log.warning("%s", told.reason)
            starts = STARTS_LATER if self.ready else RANK_STARTS
            fails = [each.failures >= starts for each in self._seats]
            if all(fails) or not self.ready and any(fails):
                self._over = True
                self._fail(f"{told.reason}, {starts} times in a row: see its messages")
            else:
                again = seat.failures - was_loaded  # the first time nothing is against a new one
                self._replace_after(seat, _pause_s(again))
        self._lose(seat, call)

    def _replace_after(self, seat: Seat, pause_s: float) -> None:
        async def replace() -> None:
            await asyncio.sleep(pause_s)
            self.replaced += 1
            self._start(seat)

        task = asyncio.ensure_future(replace())
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)


def _pause_s(failures: int) -> float:
    return min(LONGEST_PAUSE_S, START_PAUSE_S * 2 ** (failures - 1)) if failures else 0.0
