"""Workers as actors of Ray, in the placement group of the replica that leads them.

Ray starts them, brings a message for each call, and takes what they tell to the leader. What ranks
send each other goes over piflux's own links.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from piflux import __version__
from piflux.serving.fork_server import Forked, ForkServer
from piflux.serving.messages import Command, Gone, Load, Step, Told
from piflux.serving.processes import LOOPBACK, LocalWorker, Store, among_themselves

ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
"""Ranks of one host share memory, for which each has to see the others' GPUs."""

FOUND_S = 60.0
"""How long a rank's actor looks for its node's fork server, if one after another has just ended."""

FOUND_PAUSE_S = 0.2
"""Before it looks again."""


class RayWorkers:
    """Starts an actor a rank, whose process is forked from the fork server of its node.

    Args:
        load: what ranks will be told to load.
        place: the replica's placement group, with a bundle for each host.
        ranks_a_host: the first so many are on the first bundle's host, and so on.
        hosts: how many bundles there are.
        gpus: of a rank.
        cpus: cores of a rank.
        cache: a folder where compiled code is kept; None for torch's own place.
    """

    def __init__(
        self,
        load: Load,
        place: PlacementGroup,
        ranks_a_host: int,
        hosts: int,
        *,
        gpus: int,
        cpus: float,
        cache: Path | None = None,
    ) -> None:
        self._place, self._ranks_a_host, self._hosts = place, ranks_a_host, hosts
        self._load, self._gpus, self._cpus = load, gpus, cpus
        self._environment = {
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(cpus)))),
            **ALL_GPUS,
        }
        if hosts == 1:
            self._environment |= among_themselves()
        if cache is not None:
            self._environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        self._store: Store | None = None

    def open(self) -> tuple[str, int]:
        # On one host nobody else reaches it. On several it is open to the cluster's network.
        address = LOOPBACK if self._hosts == 1 else ray.util.get_node_ip_address()
        self._store = Store(address)
        return address, self._store.port

    def start(self, number: int, hear: Callable[[Told], None]) -> RayWorker:
        kind: Any = _Rank  # which the decorator made Ray's
        actor = kind.options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._place, placement_group_bundle_index=number // self._ranks_a_host
            ),
            # Where it needs none of its own, Ray has a process at hand.
            runtime_env={"env_vars": ALL_GPUS} if self._gpus else None,
        ).remote(number, self._load, self._environment)
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
        gone = Gone(f"rank {self._number} has ended")
        try:
            for batch in self._actor.life.remote():
                for told in ray.get(batch):
                    if isinstance(told, Gone):
                        gone = told
                    else:
                        self._hear(told)
        except ray.exceptions.RayActorError as error:
            gone = Gone(f"rank {self._number} was lost: {_first_line(error)}")
        finally:
            ray.kill(self._actor)  # what it holds is its successor's
            self._hear(gone)


@ray.remote(max_restarts=0, concurrency_groups={"commands": 1, "life": 1})
class _Rank:
    """Ray's side of a rank, whose own process ends with this one.

    The rank waits for none of the others: a step costs it a word on a socket.
    """

    def __init__(self, number: int, load: Load, environment: dict[str, str]) -> None:
        self._told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        process = _born(load, environment)
        self._rank = LocalWorker(number, _own_gpu(), process, self._told.put)

    @ray.method(concurrency_group="commands")
    def put(self, command: Command) -> None:
        self._rank.send(command)

    @ray.method(concurrency_group="life", num_returns="streaming")
    def life(self) -> Iterator[list[Told]]:
        """What it tells, from its first command to its end."""
        alive = True
        while alive:
            told = _latest(self._told)
            alive = not isinstance(told[-1], Gone)
            yield told


def _latest(told: queue.SimpleQueue[Told]) -> list[Told]:
    """What is there, once there is something; of steps in a row the last one."""
    found: list[Told] = [told.get()]
    while not told.empty():
        following = told.get()
        if isinstance(found[-1], Step) and isinstance(following, Step):
            found.pop()
        found.append(following)
    return found


@ray.remote(num_cpus=0, num_gpus=0, max_restarts=0)
class _ForkServer:
    """A node's fork server, which outlives replicas, and ends a while after their last rank."""

    def __init__(self, load: Load) -> None:
        self._server = ForkServer(load)
        self._me = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end, daemon=True, name="piflux-forksrv").start()

    def place(self) -> str:
        return self._server.place

    def _end(self) -> None:
        self._server.wait()
        ray.kill(self._me)


def _born(load: Load, environment: dict[str, str]) -> Forked:
    """A rank's process, of the fork server that all ranks on this node have that are alike."""
    node = ray.get_runtime_context().get_node_id()
    alike = pickle.dumps((load, sorted(environment.items()), sys.path, os.getcwd(), __version__))
    kind: Any = _ForkServer  # which the decorator made Ray's
    options = kind.options(
        name=f"piflux fork server {node} {hashlib.sha256(alike).hexdigest()[:16]}",
        namespace="piflux",
        get_if_exists=True,
        lifetime="detached",
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        runtime_env={"env_vars": environment},
    )
    until = time.monotonic() + FOUND_S
    while True:
        try:
            return Forked(ray.get(options.remote(load).place.remote()), load)
        except (ray.exceptions.RayActorError, OSError):  # the one that was found has ended
            if time.monotonic() > until:
                raise
            time.sleep(FOUND_PAUSE_S)


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
