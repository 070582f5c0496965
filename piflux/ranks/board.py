"""Where ranks leave word for each other, beside the data: a store that is asked with a deadline.

A store's client waits for its server, and no timeout of torch's counts if the server's host has
stopped: then the call never returns. So it is called from a thread of its own, which may be left
behind.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class Silent(Exception):
    """No answer within the time that was given."""


class Answer(Generic[Result]):
    """What another thread is finding out."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def is_there(self) -> bool:
        return self._done.is_set()

    def found(self, act: Callable[[], Result]) -> None:
        """Keep what `act` returns or raises."""
        try:
            self._result = act()
        except BaseException as error:  # raised again by `get`, in the thread that asked
            self._error = error
        self._done.set()

    def get(self, within_s: float) -> Result:
        """Raises Silent if it isn't there by then, or else what was raised."""
        if not self._done.wait(within_s):
            raise Silent(f"no answer within {within_s:.3g} s")
        if self._error is not None:
            raise self._error
        result: Result = self._result
        return result


def bounded(act: Callable[[], Result], within_s: float) -> Result:
    """Call what may never return.

    Raises:
        Silent: it had not returned in time. The thread that it runs in is left behind.
    """
    answer: Answer[Result] = Answer()
    threading.Thread(target=answer.found, args=(act,), daemon=True, name="piflux-bounded").start()
    return answer.get(within_s)


class Board:
    """A store that is asked in a thread of its own, one question after the other.

    Args:
        store: nobody else's client, since one question waits for the other.
    """

    def __init__(self, store: dist.Store) -> None:
        self._questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._store = store
        self._since: float | None = None  # when the question that is being answered was put
        self._thread = threading.Thread(target=self._work, daemon=True, name="piflux-board")
        self._thread.start()

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            self._since = time.monotonic()
            question()
            self._since = None

    def ask(self, act: Callable[[dist.Store], Result]) -> Answer[Result]:
        """Returns at once."""
        answer: Answer[Result] = Answer()
        self._questions.put(lambda: answer.found(lambda: act(self._store)))
        return answer

    def find(self, act: Callable[[dist.Store], Result], within_s: float) -> Result:
        """Waits for what `ask` gives.

        Raises:
            Silent: it isn't there by then. At once, where a question that was put earlier has
                waited for so long.
            Exception: what `act` raises.
        """
        since, now = self._since, time.monotonic()
        waited_s = 0.0 if since is None else now - since
        return self.ask(act).get(max(0.0, within_s - waited_s))

    def close(self, within_s: float) -> None:
        """Once all that was asked is answered, or the time is over."""
        self._questions.put(None)
        if threading.current_thread() is not self._thread:  # where Python may collect what closes
            self._thread.join(within_s)
