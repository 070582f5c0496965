"""What a rank holds in memory, by arithmetic, and what a device has left. Runs nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, fx

from piflux.graph.roles import is_of_the_model
from piflux.graph.sizes import bytes_of
from piflux.graph.values import memory_of, parts_of, tensors


class Own(NamedTuple):
    """Bytes that no policy changes.

    Attributes:
        weights: parameters and buffers that the graph reads, as they are stored.
        step: most that is alive at once of what a step computes, op by op. A compiler that computes
            several ops at once keeps less; recorded steps have as much of their own.
    """

    weights: int
    step: int

    @classmethod
    def of(cls, graph: fx.Graph) -> Own:
        """Of a graph that the passes have run on, as long as Dynamo compiles it."""
        inputs = graph.find_nodes(op="placeholder")
        # Weights that a program has joined lie in one memory, one behind the other.
        places = {
            (memory_of(x), x.storage_offset()): bytes_of(x)
            for node in inputs
            if is_of_the_model(node)
            for x in _plain(node)
        }
        return cls(sum(places.values()), _alive(graph))


def free_bytes(device: torch.device) -> float:
    """What this process can still take of a GPU; infinite on other devices.

    That is what nobody has, within torch's own limit, with what torch keeps for later.
    """
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    limit = total * torch.cuda.get_per_process_memory_fraction(device) - reserved
    return min(free, limit) + reserved - torch.cuda.memory_allocated(device)


def held_bytes(device: torch.device) -> int:
    """What this process has on a GPU."""
    return torch.cuda.memory_allocated(device)


def _alive(graph: fx.Graph) -> int:
    """Most bytes at once of what nodes make and later nodes read; views of it count once."""
    given = {memory_of(x) for node in graph.find_nodes(op="placeholder") for x in _plain(node)}
    last: dict[object, fx.Node] = {}
    for node in graph.nodes:
        for read in (node, *node.all_input_nodes):
            last |= {memory_of(x): node for x in _plain(read)}
    held: dict[object, int] = {}
    most = 0
    for node in graph.nodes:
        for x in _plain(node):
            where = memory_of(x)
            if where not in given:
                held[where] = max(held.get(where, 0), bytes_of(x))
        most = max(most, sum(held.values()))
        held = {where: count for where, count in held.items() if last[where] is not node}
    return most


def _plain(node: fx.Node) -> list[Tensor]:
    """The fake tensors that a node gives, of a quantized one what it is made of."""
    return [part for x in tensors(node) for part in parts_of(x)]
