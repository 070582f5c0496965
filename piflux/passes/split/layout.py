"""Decide which dimensions carry tokens, which nodes run on a part, and where the boundaries lie."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

import sympy
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from piflux.errors import CannotShard, NoAttention
from piflux.graph.nodes import attention_arguments, is_attention, mutates, op_name
from piflux.graph.plan import (
    Attention,
    Axis,
    Context,
    Layout,
    Plan,
    Segment,
    Value,
    axes,
    example_size,
    known,
    known_equal,
    less,
    ndim,
    near,
    operands,
    same,
    simplified,
    sizes,
    tensors,
)
from piflux.graph.values import memory_of
from piflux.passes.split.rules import Flow, Link, flow, foreign_ops, why_refused

# A run of tokens shorter than this is no segment of its own.
FEWEST_TOKENS = 2


def layout(gm: fx.GraphModule, ctx: Context) -> int:
    """Fill `ctx.plan`; edits nothing. Returns the number of nodes that run on a part.

    1. *Mark.* Every attention's query has tokens along its second last dimension. From there
       tokens are followed along the rules' links, up and down, to every dimension that shares them:

           x: (1, T, 64) -> linear -> q: (1, T, 48) -> view, transpose -> sdpa
                  ^ marked       ^ marked

    2. *Name.* From the top, a marked dimension that no link leads to is a new segment; the others
       take over the segments that their links bring. Where two meet in one op they are the same,
       and so are those of keys and values.

    3. *Place.* Upstream of all attention a node may run whole, for every rank has the inputs;
       between attentions it must run on a part; downstream of all it may again run whole, once its
       inputs are gathered. So the boundaries are as early and as late as the ops allow.

    Raises:
        NoAttention: the graph has no scaled_dot_product_attention.
        CannotShard: tokens are mixed between two attentions, an attention is causal or drops out,
            or a segment has fewer tokens than there are parts.
    """
    if not any(is_attention(node) for node in gm.graph.nodes):
        for node in foreign_ops(gm.graph):
            raise CannotShard(node, why_refused(node))
        raise NoAttention(
            "the graph has no scaled_dot_product_attention: piflux splits models at their "
            "attention. If the model has attention by other means, switch it to PyTorch's (in "
            "diffusers: model.set_attention_backend('native')); if the graph is a fragment, find "
            "the graph break with fullgraph=True"
        )
    flows = {n: flow(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method")}
    _check_attention(gm.graph)
    short = _begin_at_early_runs(gm.graph, flows, ctx.world_size)
    marked = _mark(gm.graph, flows)
    plan = Plan(layouts=_name(gm.graph, flows, marked))
    # Cut off from the short run, some attention's keys, values or queries may be tokens, not all.
    if short and (not _sharing(gm.graph, flows, plan) or _half_sharing(gm.graph, flows, plan)):
        first = min(short, key=list(gm.graph.nodes).index)
        raise _too_short(first, short[first], ctx.world_size)
    _place(gm.graph, flows, plan)
    _check_lengths(plan, ctx.world_size)
    ctx.plan = plan
    return len(plan.local)


def _check_attention(graph: fx.Graph) -> None:
    for node in filter(is_attention, graph.nodes):
        call = attention_arguments(node)
        if known(call.is_causal) is not False:
            raise CannotShard(node, "causal attention depends on the order of tokens over parts")
        if known(call.dropout_p) != 0:
            raise CannotShard(node, "attention with dropout: call .eval() on the model")


def _begin_at_early_runs(
    graph: fx.Graph, flows: dict[fx.Node, Flow], world_size: int
) -> dict[fx.Node, sympy.Expr]:
    """Let tokens be born where a run of them is taken or added, upstream of all attentions.

    What a run is taken out of there need not be tokens: a table of rotary frequencies is longer
    than any sequence, and serves text, height and width by overlapping runs. And a run too short
    to be cut is cut with those that it is added to: a token for the task, a little padding.

    Returns:
        The lengths of such short runs, by the node that adds them.
    """
    added: dict[fx.Node, sympy.Expr] = {}
    downstream = _reach(graph.nodes, set(filter(is_attention, graph.nodes)), "all_input_nodes")
    # In the graph's order: what is asked of sizes settles them, and with them what comes after.
    for node in (n for n in graph.nodes if n in flows and n not in downstream):
        found = flows[node]
        found.links = [link for link in found.links if _is_all(link)]
        short = {x.target: x.length for x in found.links if _is_short(node, x, world_size)}
        found.links = [link for link in found.links if link.target not in short]
        if short:
            added[node] = min(short.values(), key=lambda length: _example(node, length))
    return added


def _is_short(node: fx.Node, link: Link, world_size: int) -> bool:
    """Whether a link adds a run to others that can't be cut by itself."""
    target = link.target
    alone = known_equal(link.length, sizes(target.node, target.item)[target.dim])
    return not alone and less(node, link.length, max(world_size, FEWEST_TOKENS))


def _is_all(link: Link) -> bool:
    """Whether a link leads all tokens of its source, not a run of them."""
    return known_equal(link.length, sizes(link.source.node, link.source.item)[link.source.dim])


def _mark(graph: fx.Graph, flows: dict[fx.Node, Flow]) -> set[Axis]:
    """Every dimension that shares tokens with some attention's query."""
    neighbours: dict[Axis, list[Axis]] = defaultdict(list)
    for found in flows.values():
        for link in found.links:
            neighbours[link.source].append(link.target)
            neighbours[link.target].append(link.source)
    queries = [attention_arguments(n).query for n in graph.nodes if is_attention(n)]
    todo = deque(Axis(query, ndim(query) - 2) for query in queries)
    marked = set(todo)
    while todo:
        for axis in neighbours[todo.popleft()]:
            if axis not in marked:
                marked.add(axis)
                todo.append(axis)
    return marked


def _name(graph: fx.Graph, flows: dict[fx.Node, Flow], marked: set[Axis]) -> dict[Axis, Layout]:
    layouts: dict[Axis, Layout] = {}
    for node in graph.nodes:
        arriving: dict[Axis, list[Link]] = defaultdict(list)
        for link in _flow(node, flows).links:
            if link.target in marked:
                arriving[link.target].append(link)
        for axis in axes(node):
            if axis in arriving:
                layouts[axis] = _arrive(node, arriving[axis], layouts)
            elif axis in marked:
                layouts[axis] = (Segment(sizes(node, axis.item)[axis.dim]),)
        for axis in arriving:
            if axis.node is not node:
                arrived = _arrive(node, arriving[axis], layouts)
                layouts[axis] = _unify(node, _resolved(layouts[axis]), arrived)
        attended = [layouts[axis] for axis in _flow(node, flows).attended if axis in layouts]
        if len(attended) == 2:  # a key and its value are one token's, wherever they come from
            _unify(node, *(_resolved(segments) for segments in attended))
    return layouts


def _arrive(node: fx.Node, links: list[Link], layouts: dict[Axis, Layout]) -> Layout:
    """The layout of a dimension from the runs of tokens that arrive in it, left to right."""
    runs: dict[sympy.Expr, Layout] = {}
    ends: dict[sympy.Expr, sympy.Expr] = {}
    for link in links:
        run = _take(node, _resolved(layouts[link.source]), link.start, link.length)
        at = next((other for other in runs if same(node, other, link.at)), link.at)
        runs[at] = _unify(node, runs[at], run) if at in runs else run
        ends[at] = sympy.expand(at + link.length)
    found: Layout = ()
    at = sympy.Integer(0)
    for _ in range(len(runs)):
        here = next((other for other in runs if same(node, other, at)), None)
        if here is None:
            raise CannotShard(node, "the runs of tokens that meet here leave gaps or overlap")
        found, at = found + runs[here], ends[here]
    return found


def _resolved(segments: Iterable[Segment]) -> Layout:
    return tuple(s for segment in segments for s in segment.resolve())


def _split(node: fx.Node, segment: Segment, first: sympy.Expr) -> Layout:
    """Refine a segment, at the request of `node`, into its first tokens and the others."""
    rest = sympy.expand(segment.length - first)
    for piece in (first, rest):
        # Also what ends the refinement where an op shifts tokens by a few.
        if less(node, piece, FEWEST_TOKENS):
            raise CannotShard(
                node,
                f"takes a run of {_example(node, piece)} tokens out of "
                f"{_example(node, segment.length)}: this mixes tokens or leaves too few "
                "to cut (use fewer ranks or more tokens)",
            )
    segment.stands_for = (Segment(first), Segment(rest))
    return segment.stands_for


def _example(node: fx.Node, length: sympy.Expr) -> int:
    return example_size(length, near(node))


def _take(node: fx.Node, layout: Layout, start: sympy.Expr, length: sympy.Expr) -> Layout:
    """The segments of layout[start : start + length], refining those cut in two."""
    if start == 0 and known_equal(length, sum((s.length for s in layout), sympy.Integer(0))):
        return layout  # most links lead all tokens
    for edge in (start, sympy.expand(start + length)):
        at = sympy.Integer(0)
        for segment in layout:
            end = sympy.expand(at + segment.length)
            if same(node, edge, at) or same(node, edge, end):
                break
            if less(node, edge, end):
                _split(node, segment, sympy.expand(edge - at))
                break
            at = end
        layout = _resolved(layout)
    taken: list[Segment] = []
    at = sympy.Integer(0)
    inside = False
    for segment in layout:
        inside = inside or same(node, at, start)
        if inside and same(node, at, start + length):
            break
        if inside:
            taken.append(segment)
        at = sympy.expand(at + segment.length)
    return tuple(taken)


def _unify(node: fx.Node, a: Layout, b: Layout) -> Layout:
    """Two layouts of the same tokens become one."""
    left, right = deque(a), deque(b)
    merged: list[Segment] = []
    while left and right:
        x, y = _next(left), _next(right)
        if x is not y and same(node, x.length, y.length):
            y.stands_for = (x,)
        elif x is not y and less(node, x.length, y.length):
            right.appendleft(y)
            _split(node, y, x.length)
            left.appendleft(x)
            continue
        elif x is not y:
            left.appendleft(x)
            _split(node, x, y.length)
            right.appendleft(y)
            continue
        merged.append(x)
    if left or right:
        raise CannotShard(node, "two operands have different numbers of tokens")
    return tuple(merged)


def _next(layout: deque[Segment]) -> Segment:
    """The first segment, as far refined as it is by now."""
    first, *others = layout.popleft().resolve()
    layout.extendleft(reversed(others))
    return first


def _sharing(graph: fx.Graph, flows: dict[fx.Node, Flow], plan: Plan) -> set[fx.Node]:
    """The attentions whose keys and values are of tokens that queries have."""
    return {
        node
        for node in filter(is_attention, graph.nodes)
        if all(axis in plan.layouts for axis in flows[node].attended)
    }


def _half_sharing(graph: fx.Graph, flows: dict[fx.Node, Flow], plan: Plan) -> list[fx.Node]:
    """The attentions of which either the keys or the values are of tokens that queries have."""
    return [
        node
        for node in filter(is_attention, graph.nodes)
        if len({axis in plan.layouts for axis in flows[node].attended}) == 2
    ]


def _place(graph: fx.Graph, flows: dict[fx.Node, Flow], plan: Plan) -> None:
    """Choose the nodes that run on a part, the attentions to rewrite, and the boundary edges."""
    sharing = _sharing(graph, flows, plan)
    if not sharing:
        for node in foreign_ops(graph):
            raise CannotShard(node, why_refused(node))
        first = next(filter(is_attention, graph.nodes))
        raise CannotShard(
            first,
            "no attention reads keys and values of the tokens it serves: the model mixes them by "
            "other means, such as linear attention or convolutions, which piflux can't split",
        )
    for node in _half_sharing(graph, flows, plan):
        raise CannotShard(node, "only one of keys and values carries tokens that queries have")
    downstream = _reach(graph.nodes, sharing, "all_input_nodes")
    upstream = _reach(reversed(graph.nodes), sharing, "users")
    mixed = {node: _mixed(node, _flow(node, flows), plan) for node in graph.nodes}

    whole: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        # Upstream of attention a whole value is computed from whole ones, not gathered.
        wanted = node not in downstream and any(
            user in whole
            and user not in downstream
            or any(axis.node is node and axis in plan.layouts for axis in _flow(user, flows).whole)
            for user in node.users
        )
        ends = node.op in ("placeholder", "get_attr", "output")
        if ends or mixed[node] or _born(node, flows, plan) or wanted and _carries(node, plan):
            whole.add(node)
    for node in graph.nodes:
        # Only a tensor can be cut, not the tuple it comes in.
        if op_name(node) == "getitem" and node.args[0] in whole and _in_tuple(node):
            whole.add(node)

    plan.local = {n for n in graph.nodes if n not in whole and _touches(n, plan)}
    for node in graph.nodes:
        between = node in downstream and node in upstream
        if node in whole and between and _touches(node, plan):
            raise CannotShard(node, why_refused(node))
        for operand in operands(node):
            _edge(node, operand, _flow(node, flows), plan, whole)
    _check_mutations(graph, plan, downstream)
    for slot, node in enumerate(n for n in graph.nodes if n in sharing):
        keys, values = flows[node].attended
        plan.attentions.append(Attention(node, slot, keys, values))


def _edge(node: fx.Node, operand: Value, found: Flow, plan: Plan, whole: set[fx.Node]) -> None:
    """Decide whether `operand` is cut or joined on its way into `node`."""
    if operand in found.unread:
        return
    rank = ndim(*operand)
    dims = [d for d in range(rank) if Axis(operand.node, d, operand.item) in plan.layouts]
    needed = {axis.dim for axis in found.whole if Value(axis.node, axis.item) == operand}
    if node in plan.local and operand.node in whole:
        if cut := tuple(d for d in dims if d not in needed):
            plan.cuts[node, operand] = cut
    elif node in plan.local and needed & set(dims):
        raise CannotShard(node, f"needs dimension {min(needed)} of %{operand.node.name} whole")
    elif node in whole and operand.node in plan.local and dims:
        if len(dims) > 1:
            raise CannotShard(node, f"%{operand.node.name} carries tokens along {dims}")
        plan.joins[node, operand] = tuple(dims)


def _check_mutations(graph: fx.Graph, plan: Plan, downstream: set[fx.Node]) -> None:
    """Refuse what writes in place into a value of which there are copies: its parts, or its whole.

    A value may be written before it is copied.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        written = next(iter(operands(node)), None)
        if written is None or not mutates(node):
            continue
        storage = _storage(written)
        cuts, joins = (
            [(consumer, value) for consumer, value in edges if _storage(value) == storage]
            for edges in (plan.cuts, plan.joins)
        )
        local = node in plan.local
        if (
            (cuts if local else joins)  # the copy would be written
            or any(order[consumer] < order[node] for consumer, _ in cuts + joins)
            or not local
            and node in downstream
            and _touches(node, plan)
        ):
            raise CannotShard(node, "writes in place into a value that is cut: write out of place")
        plan.writers.update((value, node) for _, value in cuts + joins)


def _storage(value: Value) -> StorageWeakRef:
    return memory_of(tensors(value.node)[value.item])


def _reach(nodes: Iterable[fx.Node], seeds: set[fx.Node], along: str) -> set[fx.Node]:
    """The seeds and every node that has one of those reached before it `along` its edges."""
    reached = set(seeds)
    for node in nodes:
        if any(other in reached for other in getattr(node, along)):
            reached.add(node)
    return reached


def _flow(node: fx.Node, flows: dict[fx.Node, Flow]) -> Flow:
    return flows.get(node, Flow())


def _in_tuple(node: fx.Node) -> bool:
    return isinstance(known(node.args[0]), (tuple, list))


def _carries(node: fx.Node, plan: Plan) -> bool:
    return any(axis in plan.layouts for axis in axes(node))


def _touches(node: fx.Node, plan: Plan) -> bool:
    return _carries(node, plan) or any(_carries(n, plan) for n in node.all_input_nodes)


def _born(node: fx.Node, flows: dict[fx.Node, Flow], plan: Plan) -> bool:
    """Whether some token dimension of the node's value comes from none of its inputs'."""
    arriving = {link.target for link in _flow(node, flows).links if link.source in plan.layouts}
    return any(axis in plan.layouts and axis not in arriving for axis in axes(node))


def _mixed(node: fx.Node, found: Flow, plan: Plan) -> set[Value]:
    """The node's operands with a token dimension that does not reappear in the node's value."""
    allowed = {link.source for link in found.links} | {*found.attended, *found.whole}
    allowed -= {*found.mixed}
    return {
        value
        for value in operands(node)
        if value not in found.unread
        for dim in range(ndim(*value))
        if (axis := Axis(value.node, dim, value.item)) in plan.layouts and axis not in allowed
    }


def _check_lengths(plan: Plan, world_size: int) -> None:
    first: dict[Segment, Axis] = {}
    for axis in plan.layouts:
        for segment in plan.layout(axis):
            first.setdefault(segment, axis)
    for segment, axis in first.items():
        length = simplified(segment.length, axis.node)
        if less(axis.node, length, world_size):
            raise _too_short(axis.node, length, world_size)


def _too_short(node: fx.Node, length: sympy.Expr, world_size: int) -> CannotShard:
    return CannotShard(
        node,
        f"a run of {_example(node, length)} tokens can't be cut into {world_size} parts: use fewer "
        "ranks or more tokens",
    )
