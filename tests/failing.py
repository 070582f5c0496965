"""What ranks are started with that fail; apart, so that they need import little else."""

import os
import signal
from typing import NoReturn

from piflux.errors import CannotSave


def fails() -> NoReturn:
    raise ValueError("on purpose")


def says() -> NoReturn:
    raise CannotSave("the folder is full: empty it")


def loses_the_first() -> list[str]:
    """Rank 0 dies where the ranks have met; the others meet once more."""
    import torch.distributed as dist

    from piflux.launch import join
    from piflux.ranks.processes import ProcessRanks

    join()
    assert dist.group.WORLD is not None
    rank = dist.get_rank()
    ranks = ProcessRanks.of(dist.group.WORLD)
    ranks.exchange(rank, "ranks")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left = ranks.surviving(lambda: ranks.exchange(rank, "ranks"), "the test")
    return [f"rank {each} of {ranks.size}" for each in left]
