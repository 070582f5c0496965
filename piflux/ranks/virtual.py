"""Several ranks in one process, which take turns."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from piflux.ranks.protocol import Gathering, Result


class VirtualRanks:
    """Several ranks in one process on one device, to see how far a policy's images drift.

    Each rank is a thread that runs what a real rank runs, in sync steps too. One runs at a time: at
    a gather whose pieces are not all there it hands on to the next, so a step is the same every
    time, and on a GPU all of it is in one stream.
    """

    in_one_process = True
    epoch = 0
    wish = False

    def __init__(self, size: int) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"virtual_ranks needs at least 1 rank, got {size!r}")
        self.size = size
        self.rank = 0
        self.doing, self.busy = "", False
        self._turns: _Turns | None = None
        self.calling = threading.RLock()

    def image(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def at(self) -> tuple[int, int]:
        return 0, 0

    def settle(self) -> None:
        pass  # nothing was left

    def calls(self) -> str:
        return ""

    def surviving(self, act: Callable[[], Result], what: str) -> Result:
        return act()  # none is lost

    def stop(self, error: BaseException) -> None:
        pass  # nobody waits for it

    def gather(self, piece: Tensor, header: Tensor | None = None) -> Gathering:
        return _Letters(self, piece.contiguous())

    def persistent_gather(self, count: int, device: torch.device) -> Gathering:
        return _Letters(self, torch.empty(count, dtype=torch.uint8, device=device))

    def any(self, flag: bool) -> bool:
        return flag

    def least(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def agree(self, fingerprint: Mapping[str, Any]) -> None:
        pass  # with itself

    @property
    def turns(self) -> _Turns:
        """Raises RuntimeError outside of `run`: there the other ranks are not under way."""
        if self._turns is None:
            raise RuntimeError("virtual ranks gather within a step only, where all are under way")
        return self._turns

    def run(self, step: Callable[[], Result]) -> Result:
        self._turns = turns = _Turns(self)
        try:
            return cast(Result, turns.take(step))
        finally:
            self._turns, self.rank = None, 0


class _Abandoned(BaseException):
    """Another rank failed: this one ends, and has nothing to say."""


class _Turns:
    """One step of all virtual ranks."""

    def __init__(self, ranks: VirtualRanks) -> None:
        self._ranks = ranks
        self._handed_on = threading.Condition()
        self._under_way = list(range(ranks.size))
        self._mail: list[list[Tensor | None]] = []
        self._posted = [0] * ranks.size
        self._progress = 0
        self._error: BaseException | None = None

    def take(self, step: Callable[[], Any]) -> Any:
        """Run `step` for every rank: the first in this thread. Returns what the first returned.

        Raises:
            BaseException: the first that any rank raised.
        """
        enter = _thread_state()
        results: dict[int, Any] = {}

        def other(rank: int) -> None:
            with enter():
                self._run(rank, step, results)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(other, rank), daemon=True)
            for rank in range(1, self._ranks.size)
        ]
        self._ranks.rank = 0
        for thread in threads:
            thread.start()
        self._run(0, step, results)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return results[0]

    def _run(self, rank: int, step: Callable[[], Any], results: dict[int, Any]) -> None:
        try:
            self._await(rank)
            results[rank] = step()
        except _Abandoned:
            pass
        except BaseException as error:
            # The first is what the step raises; of the others it may be the cause.
            self._error = self._error or error
        with self._handed_on:
            following = self._after(rank)
            self._under_way.remove(rank)
            self._progress += 1
            self._ranks.rank = following
            self._handed_on.notify_all()

    def post(self, piece: Tensor) -> list[Tensor | None]:
        """Send a copy of the rank's piece. Returns one per rank, None where one is yet to come."""
        rank = self._ranks.rank
        number = self._posted[rank]
        self._posted[rank] += 1
        if number == len(self._mail):
            self._mail.append([None] * self._ranks.size)
        self._mail[number][rank] = piece.clone()
        self._progress += 1
        return self._mail[number]

    def until_all(self, pieces: Sequence[Tensor | None]) -> None:
        """Let other ranks run until all pieces are there.

        Raises:
            RuntimeError: none of them can go on, as they gather different things.
        """
        rank = self._ranks.rank
        while any(piece is None for piece in pieces):
            before = self._progress
            with self._handed_on:
                self._ranks.rank = self._after(rank)
                self._handed_on.notify_all()
            self._await(rank)
            if self._progress == before:
                missing = [r for r, piece in enumerate(pieces) if piece is None]
                raise RuntimeError(f"rank {rank} waits for ranks {missing}, which don't send")

    def _after(self, rank: int) -> int:
        """The next rank that is under way, itself if it is the last."""
        later = [r for r in self._under_way if r > rank]
        return (later or [r for r in self._under_way if r < rank] or [rank])[0]

    def _await(self, rank: int) -> None:
        """Until it is this rank's turn."""
        try:
            with self._handed_on:
                self._handed_on.wait_for(lambda: self._ranks.rank == rank or self._error)
        except (
            BaseException
        ) as error:  # the first rank's thread is also the one that is interrupted
            self._error = self._error or error
            with self._handed_on:
                self._handed_on.notify_all()
            raise
        if self._error is not None:
            raise _Abandoned


class _Letters:
    """A gather from the same memory into the same each time, as between processes."""

    # As theirs: all ranks or none.
    recordable = False

    def __init__(self, ranks: VirtualRanks, piece: Tensor) -> None:
        self.piece = piece
        whole = piece.new_empty((ranks.size, *piece.shape))
        self.whole: Tensor | None = whole
        self.pieces: Sequence[Tensor] = whole.unbind(0)
        self._ranks = ranks
        self._arriving: Sequence[Tensor | None] = []

    def start(self) -> Gathering:
        self._arriving = self._ranks.turns.post(self.piece)
        return self

    def wait(self) -> Sequence[Tensor]:
        if any(piece is None for piece in self._arriving):
            self._ranks.turns.until_all(self._arriving)
        for to, of in zip(self.pieces, self._arriving, strict=True):
            assert of is not None
            to.copy_(of)
        return self.pieces


def _thread_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What PyTorch keeps for each thread, as it is here; to be entered in another one."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    casts = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in devices
    ]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype, enabled in casts:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return enter


def virtual_ranks(size: int) -> VirtualRanks:
    """`size` ranks in this process, for `parallelize(..., group=piflux.virtual_ranks(4))`.

    Every rank's cache is held here, and steps take as long as all ranks' together: it shows the
    images that real ranks would make, not their speed. Each call serves one `parallelize`.

    Raises:
        ValueError: fewer than one rank.
    """
    return VirtualRanks(size)
