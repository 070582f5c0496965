"""The `piflux` command whose ranks draw nothing: they gather for ever, or meet once.

Run as `python tests/command.py meet|gather generate ...`; gathered-R beside --out says that rank
R's first all-gather is done.
"""

import multiprocessing
import sys

import torch
import torch.distributed as dist

from piflux.launch import join
from piflux.tools import cli
from piflux.tools import generate as work
from piflux.tools.generate import Made, Picture, Request


def meet(request: Request) -> Made | None:
    join()
    whole: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(whole, dist.get_rank())
    assert request.out is not None
    (request.out.parent / f"gathered-{dist.get_rank()}").touch()
    if dist.get_rank() != 0:
        return None
    assert whole == list(range(len(whole)))
    picture = Picture("p.png", "", 0, torch.get_num_threads(), 0)
    return Made("demo", "cpu", len(whole), {}, None, "none", (picture,))


def gather(request: Request) -> None:
    lock = multiprocessing.RLock()  # as progress bars have one; whoever is killed leaves it behind
    meet(request)
    assert lock
    while True:
        dist.barrier()


if __name__ == "__main__":
    work.generate = {"meet": meet, "gather": gather}[sys.argv.pop(1)]
    cli.app()
