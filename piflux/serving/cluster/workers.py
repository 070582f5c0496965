"""Workers as actors of Ray, in the placement group of the replica that leads them.

Ray starts them, brings a message for each call, and takes what they tell to the leader. What ranks
send each other goes over piflux's own links.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from piflux.serving.messages import Command, Gone, Step, Told
from piflux.serving.processes import LOOPBACK, among_themselves, open_store
from piflux.serving.worker import Inbox, work

log = logging.getLogger(__name__)

ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Ranks of one host share memory, for which each has to see the others' GPUs."""


class RayWorkers:
    """Starts an actor a rank.

    Args:
        place: the replica's placement group, with a bundle for each host.
        ranks_a_host: the first so many are on the first bundle's host, and so on.
        hosts: how many bundles there are.
        gpus: of a rank.
        cpus: cores of a rank.
        cache: a folder where compiled code is kept; None for torch's own place.
    """

    def __init__(
        self,
        place: PlacementGroup,
        ranks_a_host: int,
        hosts: int,
        *,
        gpus: int,
        cpus: float,
        cache: Path | None = None,
    ) -> None:
        self._place, self._ranks_a_host, self._hosts = place, ranks_a_host, hosts
        self._gpus, self._cpus = gpus, cpus
        self._environment = {
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(cpus)))),
            **ALL_GPUS,
        }
        if hosts == 1:
            self._environment |= among_themselves()
        if cache is not None:
            self._environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._store: Any = None

    def open(self) -> tuple[str, int]:
        # On one host nobody else reaches it. On several it is open to the cluster's network.
        address = LOOPBACK if self._hosts == 1 else ray.util.get_node_ip_address()
        self._store, port = open_store(address)
        return address, port

    def start(self, number: int, hear: Callable[[Told], None]) -> RayWorker:
        kind: Any = _Rank  # which the decorator made Ray's
        actor = kind.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._place, placement_group_bundle_index=number // self._ranks_a_host
            ),
            runtime_env={"env_vars": self._environment},
        ).remote(number)
        return RayWorker(number, actor, hear)

    def prepare(self) -> None:
        """Nothing: the placement group has room for its ranks alone."""

    def close(self) -> None:
        self._store = None


class RayWorker:
    """One actor, as its leader has it. A thread of ours hears what it tells."""

    def __init__(self, number: int, actor: Any, hear: Callable[[Told], None]) -> None:
        self._number, self._actor, self._hear = number, actor, hear
        threading.Thread(target=self._listen, daemon=True, name=f"piflux-worker-{number}").start()

    def send(self, command: Command) -> None:
        self._actor.put.remote(command)

    def kill(self) -> None:
        ray.kill(self._actor)

    def _listen(self) -> None:
        reason = f"rank {self._number} has ended"
        try:
            for told in self._actor.life.remote():
                for each in ray.get(told):
                    self._hear(each)
        except ray.exceptions.RayActorError as error:
            reason = f"rank {self._number} was lost: {_first_line(error)}"
        except ray.exceptions.RayTaskError as error:
            reason = f"rank {self._number} failed: {error.cause}"
        finally:
            ray.kill(self._actor)  # what it holds is its successor's
            self._hear(Gone(reason))


@ray.remote(max_restarts=0, concurrency_groups={"commands": 1, "life": 1})
class _Rank:
    """A rank's process. Three threads: commands come, the rank draws, and what it tells goes.

    The rank waits for none of the others: a step costs it a word in a queue.
    """

    def __init__(self, number: int) -> None:
        os.environ["LOCAL_RANK"] = str(_own_gpu())
        logging.basicConfig(format=f"%(levelname)s rank {number}: %(message)s")
        self._inbox = Inbox()
        self._told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self._error: BaseException | None = None

    @ray.method(concurrency_group="commands")
    def put(self, command: Command) -> None:
        self._inbox.put(command)

    @ray.method(concurrency_group="life", num_returns="streaming")
    def life(self) -> Iterator[list[Told]]:
        """What it tells, from its first command to its end; raises what ended it."""
        threading.Thread(target=self._work, daemon=True, name="piflux-rank").start()
        while True:
            told = _latest(self._told)
            alive = told[-1] is not None
            yield [each for each in told if each is not None]
            if not alive:
                break
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            work(self._inbox, self._told.put)
        except BaseException as error:
            log.exception("it ended")
            self._error = error
        finally:
            self._told.put(None)


def _latest(told: queue.SimpleQueue[Told | None]) -> list[Told | None]:
    """What is there, once there is something; of steps in a row the last one."""
    found: list[Told | None] = [told.get()]
    while not told.empty():
        following = told.get()
        if isinstance(found[-1], Step) and isinstance(following, Step):
            found.pop()
        found.append(following)
    return found


def _own_gpu() -> int:
    """Of the GPUs that this process sees, the place of the one that Ray gave it; 0 if it has none.

    Raises:
        ValueError: it doesn't see the GPU.
    """
    mine = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not mine:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return int(mine[0]) if visible is None else visible.split(",").index(mine[0])


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
