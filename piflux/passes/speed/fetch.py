"""Let each repeated block's weights arrive while the block before it computes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from piflux.graph.plan import Context, Gathered
from piflux.graph.sizes import bytes_of
from piflux.graph.targets import FETCH
from piflux.graph.values import known, parts_of
from piflux.passes.speed.enclose import HEAD
from piflux.passes.speed.fuse_linears import WEIGHTS
from piflux.passes.speed.hoist import HOISTED

BUFFERS = 2

LIKE_A_BLOCK = 0.5
"""A later stretch that is no repeated one, such as a last block with what follows it, is taken for
one if its weights are at least this part of the smallest block's."""

Run = tuple[int, ...]
"""Positions among the program's inputs of weights that adjoin in memory."""


def fetch(gm: fx.GraphModule, ctx: Context) -> int:
    """Gather weights that ranks share, block by block. Returns how many groups of them there are.

    The first block's weights stay whole on every rank: while it computes, those of the second
    arrive, and so on, in two buffers that take turns. Weights that `hoist` moved are read for all
    steps of an image at once; they are gathered likewise, as many at a time as a buffer holds. What
    no block reads alone stays whole, too. The numbers under which weights are fetched stand for
    entries of `ctx.gathered`.

    Before, of three blocks that `outline` found:

        piece_0 = piece_0(x, w)
        a = piece_0[0]
        piece_0_1 = piece_0(a, w_1)
        a_1 = piece_0_1[0]
        piece_0_2 = piece_0(a_1, w_2)
        a_2 = piece_0_2[0]
        return (a_2,)

    After:

        fetch(None, 0)
        piece_0 = piece_0(x, w)
        a = piece_0[0]
        fetch(0, 1)
        piece_0_1 = piece_0(a, w_1)
        a_1 = piece_0_1[0]
        fetch(1, None)
        piece_0_2 = piece_0(a_1, w_2)
        a_2 = piece_0_2[0]
        return (a_2,)

    A graph without repeated blocks that have weights of their own stays as it is.
    """
    origins = _origins(gm)
    calls = {str(n.target): n for n in gm.graph.find_nodes(op="call_module")}
    head = _module(gm, HEAD) if HEAD in calls else gm
    inside = _inside(head, calls[HEAD], origins) if HEAD in calls else origins
    blocks = _blocks(head.graph, inside)
    if len(blocks) < 2:
        return 0
    first, *others = blocks
    with head.graph.inserting_before(first):
        _fetch(head.graph, None, len(ctx.gathered))
    _gather(head.graph, [(call, _own(call, inside)) for call in others], inside, ctx, False)
    head.recompile()
    if HOISTED in calls:
        hoisted = _module(gm, HOISTED)
        origin = _inside(hoisted, calls[HOISTED], origins)
        most = max(x.bytes for x in ctx.gathered)
        _gather(hoisted.graph, _packs(hoisted.graph, origin, most), origin, ctx, True)
        hoisted.recompile()
    return len(ctx.gathered)


def _module(gm: fx.GraphModule, name: str) -> fx.GraphModule:
    found = gm.get_submodule(name)
    assert isinstance(found, fx.GraphModule)
    return found


def _gather(
    graph: fx.Graph,
    groups: Sequence[tuple[fx.Node, Sequence[fx.Node]]],
    origins: dict[fx.Node, Run],
    ctx: Context,
    hoisted: bool,
) -> None:
    """Before each node fetch the weights that belong to it."""
    number = len(ctx.gathered)
    for i, (node, weights) in enumerate(groups):
        last = i == len(groups) - 1
        with graph.inserting_before(node):
            _fetch(graph, number + i, None if last else number + i + 1)
        runs = tuple(origins[x] for x in weights)
        count = sum(map(_bytes, weights))
        ctx.gathered.append(Gathered(runs, i % BUFFERS, count, hoisted))


def _fetch(graph: fx.Graph, group: int | None, following: int | None) -> None:
    graph.call_function(FETCH, (group, following)).meta["example_value"] = None


def _origins(gm: fx.GraphModule) -> dict[fx.Node, Run]:
    """Where the program's parameters come from, and what `fuse_linears` made of them."""
    inputs = gm.graph.find_nodes(op="placeholder")
    found: dict[fx.Node, Run] = {n: (i,) for i, n in enumerate(inputs) if _can_be_shared(n)}
    for call in gm.graph.find_nodes(op="call_module", target=WEIGHTS):
        module = _module(gm, WEIGHTS)
        inside = _inside(module, call, found)
        made: Any = module.graph.output_node().args[0]
        for item in call.users:
            assert item.target is operator.getitem
            joined: fx.Node = made[item.args[1]]
            if all(x in inside and len(x.users) == 1 for x in joined.all_input_nodes):
                found[item] = tuple(i for x in joined.all_input_nodes for i in inside[x])
    return found


def _can_be_shared(node: fx.Node) -> bool:
    """Whether it stays from call to call, and fills its memory."""
    value = known(node)
    return isinstance(value, nn.Parameter) and all(map(_is_dense, parts_of(value)))


def _is_dense(x: Tensor) -> bool:
    """Whether there are no gaps between its numbers, in whatever order they lie."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=operator.itemgetter(1)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _inside(
    module: fx.GraphModule, call: fx.Node, origins: dict[fx.Node, Run]
) -> dict[fx.Node, Run]:
    """The same of a module's inputs, as far as it alone reads them."""
    inputs = module.graph.find_nodes(op="placeholder")
    given = [n for n in call.args if isinstance(n, fx.Node)]
    return {
        x: origins[n]
        for x, n in zip(inputs, given, strict=True)
        if n in origins and n.users.keys() == {call}
    }


def _blocks(graph: fx.Graph, origins: dict[fx.Node, Run]) -> list[fx.Node]:
    """Calls of repeated stretches with weights of their own, and of others with about as much."""
    calls = graph.find_nodes(op="call_module")
    count = {call: sum(map(_bytes, _own(call, origins))) for call in calls}
    times = Counter(call.target for call in calls)
    repeated = [count[call] for call in calls if times[call.target] > 1 and count[call]]
    if not repeated:
        return []
    order = [n for n in graph.nodes if n in count]
    first = next(i for i, n in enumerate(order) if times[n.target] > 1 and count[n])
    return [call for call in order[first:] if count[call] >= LIKE_A_BLOCK * min(repeated)]


def _own(call: fx.Node, origins: dict[fx.Node, Run]) -> list[fx.Node]:
    """The weights that a call alone reads."""
    return [x for x in dict.fromkeys(call.all_input_nodes) if x in origins and len(x.users) == 1]


def _packs(
    graph: fx.Graph, origins: dict[fx.Node, Run], most: int
) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Weights in the order in which they are read, up to so many bytes at a time, each time with
    the first node that reads one."""
    packs: list[tuple[fx.Node, list[fx.Node]]] = []
    room = 0
    for node in graph.nodes:
        if node.op == "output":
            continue
        weights = _own(node, origins)
        count = sum(map(_bytes, weights))
        if not weights or count > most:
            continue
        if count > room:
            packs.append((node, []))
            room = most
        packs[-1][1].extend(weights)
        room -= count
    return packs


def _bytes(node: fx.Node) -> int:
    return sum(map(bytes_of, parts_of(known(node))))
