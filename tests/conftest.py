"""What every test may ask for.

torch is imported where it is needed, since the process that hands tests to others needs none.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ranks import Ranks

# As ranks have it, here and in commands: models this small lose their time between threads that
# wait for each other. Read when torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# Dynamo looks for garbage after each capture, of which there are hundreds.
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"

LONGEST = (
    *("pipelines", "cli", "faults", "serving_engine", "numerics", "two_hosts", "replay", "shares"),
    *("serving_cluster", "model_zoo", "quality", "errors", "outline", "skipped", "hoist", "copies"),
    *("bench", "serving_http", "pipeline", "products"),
)
"""The files that take longest, in order: begun last, one would leave a core without work.

Those that wait more than they compute, `faults`, `two_hosts` and the servers', begin one after the
other beside others. `cli` stands beside `pipelines`: others have more ranks at once, and it counts
seconds until a command ends.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(x) if (x := item.path.stem) in names else len(names))


def pytest_collection_finish() -> None:
    """What takes a capture's time and tells no test anything is off; ranks are alike (`warm`).

    For any handler of torch's logger of traces each pass writes its graph down, and pytest gives a
    handler to each logger that doesn't propagate, as torch has set this one.

    And what was imported by now stays: Python need not look through it for garbage, nor as often as
    for 700 new objects, of which a capture makes hundreds of thousands.
    """
    logging.getLogger("torch.__trace").propagate = True
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Before what runs the tests, or is told by another process which to run."""
    if session.items:  # the process that hands tests to others has none
        from ranks import fork_server

        fork_server()


@pytest.fixture
def captured_once() -> Iterator[None]:
    """Models that are alike are captured once in this process; see `captures`."""
    from captures import captured_once

    with captured_once():
        yield


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch, captured_once: None) -> None:
    """What loads the demo's model in this process has three of its ten blocks."""
    from models import small_demo

    from piflux.pipelines import folders

    monkeypatch.setattr(folders, "demo_pipeline", small_demo)


@pytest.fixture
def virtual() -> "Callable[..., list[Any]]":
    """Ranks in this process, called as `ranks` are: `virtual(n, fn, *args)`.

    `fn(rank, group, *args)` runs once, for all of them; the list has its one result. They run what
    real ranks run, and a model is captured and compiled once: for all that isn't about processes.
    """
    from ranks import virtual

    return virtual


@pytest.fixture(scope="session")
def ranks() -> "Iterator[Ranks]":
    """Real gloo ranks: `ranks(n, fn, *args)` returns the n results of `fn(rank, group, *args)`."""
    from ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()
