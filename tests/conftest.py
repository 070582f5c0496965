"""What every test may ask for."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks: `ranks(n, fn, *args)` returns the n results of `fn(rank, group, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()
