"""Give every node the example value that it has on one part."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache
from torch.multiprocessing.reductions import StorageWeakRef

from piflux.errors import CannotShard
from piflux.graph.axes import axes
from piflux.graph.nodes import mutates, run_node
from piflux.graph.plan import Context
from piflux.graph.sizes import example_size
from piflux.graph.targets import SHARD, UNSHARD
from piflux.graph.values import known, memory_of, tensors
from piflux.parts import part_length


def propagate(gm: fx.GraphModule, ctx: Context) -> int:
    """Run the graph on fakes from the first boundary on. Returns the number of values that changed.

    Before: `h` of a rewritten graph still says (1, 48, 96). After, on 2 ranks: (1, 24, 96). It is
    also the proof that the rewritten graph fits together.

    Raises:
        CannotShard: an op does not accept its operands' part sizes, or gives another shape than
            the plan has: a net under the rules.
    """
    # The mode of the captured values; the tracing context has a new one for the inner compiler.
    mode = next(
        x.fake_mode for n in gm.graph.nodes for x in tensors(n) if isinstance(x, FakeTensor)
    )
    # Where sizes are symbols, torch takes longer to look up what an op on fakes gave before than to
    # run it: half of the time of all passes.
    symbolic = any(isinstance(known(node), torch.SymInt) for node in gm.graph.nodes)
    aliases = _aliases(gm.graph)
    changed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if (
            not _is_ours(node)
            and node not in ctx.plan.local
            and changed.isdisjoint(node.all_input_nodes)
        ):
            continue
        cache = disable_fake_tensor_cache(mode) if symbolic else nullcontext()
        args = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        want = _part_shapes(node, ctx)
        try:
            # Of symbolic sizes some ops have no kernel for fakes, but a decomposition in Python.
            with cache, mode, enable_python_dispatcher(), torch.no_grad():
                node.meta["example_value"] = run_node(node, *args)
        except Exception as error:
            raise CannotShard(node, f"a part does not fit this op: {error}") from error
        got = [tuple(example_size(size, x) for size in x.shape) for x in tensors(node)]
        if not _is_ours(node) and got != want:
            raise CannotShard(node, f"on a part this op gives {got} where the plan has {want}")
        changed.add(node)
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    for node, shared in _aliases(gm.graph).items():
        # Strides decide whether a reshape copies, and those of a part are others. What is made
        # after the write has it, copied or not.
        others = {n for n in shared ^ aliases[node] if order[n] < order[node]}
        if others and node in ctx.plan.local:
            other = min(others, key=order.__getitem__)
            raise CannotShard(
                node,
                f"writes in place, and only {'on a part' if other in shared else 'as a whole'} it "
                f"shares memory with %{other.name}: write out of place",
            )
    return len(changed)


def _part_shapes(node: fx.Node, ctx: Context) -> list[tuple[int, ...]]:
    """The shapes of the node's tensors on a part, from their whole shapes and the plan."""
    shapes = [[example_size(size, x) for size in x.shape] for x in tensors(node)]
    for axis in axes(node) if node in ctx.plan.local else ():
        if axis in ctx.plan.layouts:
            near = tensors(node)[axis.item]
            lengths = [example_size(length, near) for length in ctx.plan.lengths(axis)]
            shapes[axis.item][axis.dim] = sum(part_length(n, ctx.world_size) for n in lengths)
    return [tuple(shape) for shape in shapes]


def _aliases(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node that writes in place, those whose memory it writes to."""
    owners: dict[StorageWeakRef, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        for x in tensors(node):
            owners[memory_of(x)].add(_original(node))
    return {
        node: {n for x in tensors(written) for n in owners[memory_of(x)]}
        for node in graph.nodes
        if mutates(node) and (written := next(iter(node.all_input_nodes), None)) is not None
    }


def _original(node: fx.Node) -> fx.Node:
    """What a boundary cuts or joins; any other node is itself."""
    boundary = node.target in (SHARD, UNSHARD)
    return _original(node.all_input_nodes[0]) if boundary else node


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "piflux"
