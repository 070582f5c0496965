"""What every test may ask for."""

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As ranks have it: models this small lose their time between threads that wait for each other.

    Before each test, since a command that runs in this process may take what cores there are.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks: `ranks(n, fn, *args)` returns the n results of `fn(rank, group, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()
