"""What ops that write in place do to a graph: values depend on more than their operands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from piflux.errors import CannotShard
from piflux.graph.axes import Value, operands
from piflux.graph.nodes import mutates
from piflux.graph.plan import Plan
from piflux.graph.values import memory_of, tensors


class Writes:
    """Who writes into which memory, and who reads it.

    Dynamo's graphs go on reading a tensor by the node that made it, or by a view of it, after
    another node has written into it:

        x = linear(h, w)
        v = x[:, :4]
        setitem(v, .., y)
        z = x + 1            # depends on y

    Attributes:
        order: each node's place in the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self._writers: dict[StorageWeakRef, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for memory in {_storage(value) for value in _written(node)}:
                self._writers[memory].append(node)
        # The nodes that give or read a tensor in memory that is written.
        self._owners: dict[StorageWeakRef, list[fx.Node]] = defaultdict(list)
        self._readers: dict[StorageWeakRef, list[fx.Node]] = defaultdict(list)
        self.sources: dict[fx.Node, set[fx.Node]] = {}
        self.users: dict[fx.Node, set[fx.Node]] = {node: set(node.users) for node in graph.nodes}
        for node in graph.nodes if self._writers else ():
            for memory in {_storage(Value(node, i)) for i in range(len(tensors(node)))}:
                if memory in self._writers:
                    self._owners[memory].append(node)
            for memory in {_storage(value) for value in operands(node)}:
                if memory in self._writers:
                    self._readers[memory].append(node)
        for node in graph.nodes:
            self.sources[node] = set(node.all_input_nodes)
        for memory, writers in self._writers.items():
            for reader in self._readers[memory]:
                before = {n for n in writers if self.order[n] < self.order[reader]}
                self.sources[reader] |= before
                for writer in before:
                    self.users[writer].add(reader)

    def written_with(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that give, or write into, memory that `node` gives or writes into, too."""
        for memory, writers in self._writers.items():
            if node in writers or node in self._owners[memory]:
                yield from writers
                yield from self._owners[memory]

    def check(self, plan: Plan) -> None:
        """Leave in the plan where copies are made of what is written, parts of it or its whole.

        A value may be written before it is copied. Of a value that is cut, the copy may be
        written, if nobody sees the value itself any more: what needs it whole gets it put together.

        Raises:
            CannotShard: a write would reach only one of two copies that are read.
        """
        for memory, writers in self._writers.items():
            for node in writers:
                if node in plan.local:
                    self._check_part(node, memory, plan)
                else:
                    self._check_whole(node, memory, plan)
            self._place(memory, plan)

    def _check_whole(self, node: fx.Node, memory: StorageWeakRef, plan: Plan) -> None:
        cuts, joins = _copies(plan.cuts, memory), _copies(plan.joins, memory)
        late = any(self.order[consumer] < self.order[node] for consumer, _ in cuts)
        # Ranks in one process would write into the caller's tensor once each.
        if joins or late or cuts and self._is_given(memory):
            raise _refused(node)

    def _check_part(self, node: fx.Node, memory: StorageWeakRef, plan: Plan) -> None:
        cuts = _copies(plan.cuts, memory)
        if cuts:
            self._check_only_copy(node, memory, plan)
        joins = _copies(plan.joins, memory)
        if any(self.order[consumer] < self.order[node] for consumer, _ in joins):
            raise _refused(node)

    def _check_only_copy(self, node: fx.Node, memory: StorageWeakRef, plan: Plan) -> None:
        """A part is written: it must be the one copy of a value that is this graph's own."""
        copied = {(value, dims) for (_, value), dims in plan.cuts.items() if _in(value, memory)}
        (value, dims), *others = copied
        if others or self._is_given(memory):
            raise _refused(node)
        for reader in self._readers[memory]:
            if self.order[reader] <= self.order[node]:
                continue
            for read in operands(reader):
                if not _in(read, memory) or read.node in plan.local or (reader, read) in plan.cuts:
                    continue
                shares = reader in plan.local or reader in self._owners[memory]
                if read != value or len(dims) != 1 or shares:
                    raise CannotShard(
                        reader,
                        f"reads %{read.node.name} as a whole, of which a part was written in "
                        "place: write out of place",
                    )
                plan.joins[reader, value] = dims

    def _is_given(self, memory: StorageWeakRef) -> bool:
        """Whether it is an input's or the model's own."""
        return any(n.op in ("placeholder", "get_attr") for n in self._owners[memory])

    def _place(self, memory: StorageWeakRef, plan: Plan) -> None:
        for copies, places, writers in (
            (plan.cuts, plan.cut_after, [n for n in self._writers[memory] if n not in plan.local]),
            (plan.joins, plan.join_after, self._writers[memory]),
        ):
            for _, value in _copies(copies, memory):
                last = max([value.node, *writers], key=self.order.__getitem__)
                if last is not value.node:
                    places[value] = last


def _written(node: fx.Node) -> list[Value]:
    """The tensors that a node writes into."""
    if not mutates(node):
        return []
    given = node.kwargs.get("out")
    outs = [given] if isinstance(given, fx.Node) else list(given or ())  # type: ignore[arg-type]
    return [v for v in operands(node) if v.node in outs] if outs else operands(node)[:1]


def _copies(
    edges: dict[tuple[fx.Node, Value], tuple[int, ...]], memory: StorageWeakRef
) -> list[tuple[fx.Node, Value]]:
    return [(consumer, value) for consumer, value in edges if _in(value, memory)]


def _in(value: Value, memory: StorageWeakRef) -> bool:
    return _storage(value) == memory


def _storage(value: Value) -> StorageWeakRef:
    return memory_of(tensors(value.node)[value.item])


def _refused(node: fx.Node) -> CannotShard:
    return CannotShard(node, "writes in place into a value that is cut: write out of place")
