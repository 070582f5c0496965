"""Decide which dimensions carry tokens, which nodes run on a part, and where the boundaries lie."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import sympy
from torch import fx

from piflux.errors import CannotShard, NoAttention, NothingToShare
from piflux.graph.axes import Axis, Value, axes, operands
from piflux.graph.nodes import attention_arguments, is_attention, op_name
from piflux.graph.plan import Attention, Context, Layout, Plan
from piflux.graph.sizes import example_size, known_equal, less, same, sizes
from piflux.graph.values import known, ndim, near, tensors
from piflux.parts import part_length
from piflux.passes.split.rules import Flow, Link, flow, foreign_ops, runs, why_refused
from piflux.passes.split.segments import Segments, is_none
from piflux.passes.split.writes import Writes

MOST_FAMILIES = 4
"""Of so many all choices are tried, of more each by itself. Two were seen. Chosen, not measured."""
MOST_ALONE = 1 / 4
"""Of the attentions, or of their work, so much may be whole on every rank. Chosen, not measured."""
MOST_SHARES = 2
"""A part must be less than so many times as long as its share. Chosen, not measured."""


def layout(gm: fx.GraphModule, ctx: Context) -> int:
    """Fill `ctx.plan`; edits nothing. Returns the number of nodes that run on a part.

    1. *Mark.* Every attention's query has tokens along its second last dimension. From there
       tokens are followed along the rules' links, up and down, to every dimension that shares them:

           x: (1, T, 64) -> linear -> q: (1, T, 48) -> view, transpose -> sdpa
                  ^ marked       ^ marked

    2. *Name.* From the top, a marked dimension that no link leads to is a new segment; the others
       take over the segments that their links bring. Where two meet in one op they are the same,
       and so are those of keys and values, and of a run and what is written over it.

    3. *Place.* Upstream of all attention a node may run whole, for every rank has the inputs;
       between attentions it must run on a part; downstream of all it may again run whole, once its
       inputs are gathered. So the boundaries are as early and as late as the ops allow.

    Raises:
        NoAttention: the graph has no scaled_dot_product_attention.
        CannotShard: tokens are mixed between two attentions, an attention drops out, tokens meet
            their neighbours, a part that is written has another copy, or there are fewer tokens
            than parts.
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
    _check_attention(gm.graph)
    graph, writes = gm.graph, Writes(gm.graph)
    flows = {n: flow(n) for n in graph.nodes if n.op in ("call_function", "call_method")}
    flows = _born_at_early_runs(graph, flows, writes)
    plan = _decide_by_runs(graph, flows, writes)
    _check_lengths(plan, ctx.world_size)
    ctx.plan = plan
    return len(ctx.plan.local)


def _decide_by_runs(graph: fx.Graph, flows: dict[fx.Node, Flow], writes: Writes) -> Plan:
    """The plan, in which a row of tokens may be the same tokens time after time.

    Where a reshape stands in the way, it may put the tokens of each frame in a row, or take such a
    row apart; see `runs`. That is tried where it is needed only, for it makes segments shorter.
    """
    first: CannotShard | None = None
    attentions = set(filter(is_attention, graph.nodes))
    others = _reach(graph.nodes, attentions, writes.sources) & flows.keys()
    while True:
        refusals: list[CannotShard] = []
        try:
            return _decide(graph, flows, writes, refusals)
        except CannotShard as error:
            first = first or error
        names = {refusal.node for refusal in refusals}
        kinds = {_regroups(node) for node in others if node.name in names and runs(node)}
        alike = {node for node in others if kinds and _regroups(node) in kinds}
        if not alike:
            raise first
        others -= alike
        flows = flows | {
            node: replace(flows[node], links=[*flows[node].links, *runs(node)]) for node in alike
        }


def _regroups(node: fx.Node) -> tuple[object, ...]:
    """What a reshape makes of which sizes: those of all blocks do the same."""
    before = [tuple(sizes(n)) for n in node.all_input_nodes[:1] if tensors(n)]
    return *before, *(tuple(sizes(node, item)) for item in range(len(tensors(node))))


def _decide(
    graph: fx.Graph, flows: dict[fx.Node, Flow], writes: Writes, refusals: list[CannotShard]
) -> Plan:
    """The plan that cuts most families of tokens; for any number of ranks the same.

    All of them, as a rule. Where that is refused, an attention may be over something else than the
    tokens of the others (the frames at each place of a video, the layers of a text encoder). Where
    the others' tokens are rows of its batch it then runs on a part; a few that come before all
    others may run as a whole.
    """
    families = _families(graph, flows)
    for chosen in _choices(families):
        try:
            plan = _place(graph, flows, writes, _name(graph, flows, set().union(*chosen)))
        except CannotShard as error:
            refusals.append(error)
            continue
        if not refusals or _gains(graph, writes, plan):
            return plan
    raise refusals[0]


def _gains(graph: fx.Graph, writes: Writes, plan: Plan) -> bool:
    """Whether the attentions that run as a whole are few, and upstream of those that are split."""
    attentions = {node for node in graph.nodes if is_attention(node)}
    alone = attentions - plan.local
    downstream = _reach(graph.nodes, attentions - alone, writes.sources)
    few = any(
        sum(map(cost, alone)) <= MOST_ALONE * sum(map(cost, attentions))
        for cost in (lambda node: 1, _work)
    )
    return few and alone.isdisjoint(downstream)


def _work(attention: fx.Node) -> int:
    """What the layers around an attention grow with: the rows of its queries."""
    query = attention_arguments(attention).query
    return math.prod(_example(query, size) for size in sizes(query)[:-1])


def _choices(families: list[dict[Axis, None]]) -> Iterator[Sequence[dict[Axis, None]]]:
    """All families, then fewer of them, the first ones rather than the last."""
    yield families
    fewer = range(len(families) - 1, 0, -1) if len(families) <= MOST_FAMILIES else (1,)
    for count in fewer if len(families) > 1 else ():
        yield from combinations(families, count)


def _check_attention(graph: fx.Graph) -> None:
    for node in filter(is_attention, graph.nodes):
        call = attention_arguments(node)
        if not isinstance(known(call.is_causal), bool):
            raise CannotShard(node, "is causal or not, as data say: no rank knows in advance")
        if known(call.dropout_p) != 0:
            raise CannotShard(node, "attention with dropout: call .eval() on the model")


def _born_at_early_runs(
    graph: fx.Graph, flows: dict[fx.Node, Flow], writes: Writes
) -> dict[fx.Node, Flow]:
    """The flows, with tokens born where a run of them is taken, upstream of all attentions.

    What a run is taken out of there need not be tokens: a table of rotary frequencies is longer
    than any sequence, and serves text, height and width by overlapping runs.
    """
    attentions = set(filter(is_attention, graph.nodes))
    downstream = _reach(graph.nodes, attentions, writes.sources)
    return {
        node: found
        if node in downstream
        else replace(found, links=[link for link in found.links if _leads_all(link)])
        for node, found in flows.items()
    }


def _leads_all(link: Link) -> bool:
    """Whether a link leads all tokens of its source, not a run of them."""
    return known_equal(link.length, sizes(link.source.node, link.source.item)[link.source.dim])


def _families(graph: fx.Graph, flows: dict[fx.Node, Flow]) -> list[dict[Axis, None]]:
    """The dimensions that share tokens with attentions' queries, by the tokens that they share.

    Those that serve most attentions come first, then those of most tokens.
    """
    neighbours: dict[Axis, list[Axis]] = defaultdict(list)

    def are_neighbours(a: Axis, b: Axis) -> None:
        neighbours[a].append(b)
        neighbours[b].append(a)

    for found in flows.values():
        for link in found.links:
            are_neighbours(link.source, link.target)
        if found.attended:  # a key and its value are one token's, wherever they come from
            are_neighbours(*found.attended)
    queries = [_tokens_of_queries(node) for node in filter(is_attention, graph.nodes)]
    families: list[dict[Axis, None]] = []
    for query in queries:
        if any(query in family for family in families):
            continue
        family = {query: None}
        todo = deque(family)
        while todo:
            for axis in neighbours[todo.popleft()]:
                if axis not in family:
                    family[axis] = None
                    todo.append(axis)
        families.append(family)

    def served(family: dict[Axis, None]) -> tuple[int, int]:
        mine = [query for query in queries if query in family]
        return len(mine), max(_example(q.node, sizes(q.node, q.item)[q.dim]) for q in mine)

    return sorted(families, key=served, reverse=True)


def _tokens_of_queries(attention: fx.Node) -> Axis:
    query = attention_arguments(attention).query
    return Axis(query, ndim(query) - 2)


def _name(graph: fx.Graph, flows: dict[fx.Node, Flow], marked: set[Axis]) -> dict[Axis, Layout]:
    segments = Segments()
    layouts: dict[Axis, Layout] = {}
    for node in graph.nodes:
        arriving: dict[Axis, list[Link]] = defaultdict(list)
        for link in _flow(node, flows).links:
            if link.target in marked:
                arriving[link.target].append(link)
        for axis in axes(node):
            if axis in arriving:
                layouts[axis] = _arrive(node, arriving[axis], layouts, segments)
            elif axis in marked:
                layouts[axis] = segments.born(node, sizes(node, axis.item)[axis.dim])
        for axis in arriving:
            if axis.node is not node:  # an operand that the node writes into
                for link in arriving[axis]:
                    _land(node, link, layouts, segments)
        attended = [layouts[axis] for axis in _flow(node, flows).attended if axis in layouts]
        if attended:
            segments.unite(node, *attended)
    return {axis: segments.refined(layout) for axis, layout in layouts.items()}


def _arrive(
    node: fx.Node, links: list[Link], layouts: dict[Axis, Layout], segments: Segments
) -> Layout:
    """The layout of a dimension from the runs of tokens that arrive in it, left to right."""
    runs: dict[sympy.Expr, Layout] = {}
    ends: dict[sympy.Expr, sympy.Expr] = {}
    for link in links:
        if is_none(node, link.length):
            continue
        run = segments.take(node, layouts[link.source], link.start, link.length)
        at = next((other for other in runs if same(node, other, link.at)), link.at)
        runs[at] = segments.unite(node, runs[at], run) if at in runs else run
        ends[at] = sympy.expand(at + link.length)
    found: Layout = ()
    at = sympy.Integer(0)
    for _ in range(len(runs)):
        here = next((other for other in runs if same(node, other, at)), None)
        if here is None:
            raise CannotShard(node, "the runs of tokens that meet here leave gaps or overlap")
        found, at = found + runs[here], ends[here]
    return found


def _land(node: fx.Node, link: Link, layouts: dict[Axis, Layout], segments: Segments) -> None:
    """A run of tokens is written over another, so both are the same tokens."""
    run = segments.take(node, layouts[link.source], link.start, link.length)
    segments.unite(node, segments.take(node, layouts[link.target], link.at, link.length), run)


def _example(node: fx.Node, length: sympy.Expr) -> int:
    return example_size(length, near(node))


def _sharing(graph: fx.Graph, flows: dict[fx.Node, Flow], plan: Plan) -> set[fx.Node]:
    """The attentions whose keys and values are of tokens that queries have."""
    return {
        node
        for node in filter(is_attention, graph.nodes)
        if all(axis in plan.layouts for axis in flows[node].attended)
    }


def _place(
    graph: fx.Graph, flows: dict[fx.Node, Flow], writes: Writes, layouts: dict[Axis, Layout]
) -> Plan:
    """Choose the nodes that run on a part, the attentions to rewrite, and the boundary edges."""
    plan = Plan(layouts=layouts)
    sharing = _sharing(graph, flows, plan)
    if not sharing:
        for node in foreign_ops(graph):
            raise CannotShard(node, why_refused(node))
        first = next(filter(is_attention, graph.nodes))
        raise NothingToShare(
            first,
            _why_one_token(first, plan)
            or "no attention reads keys and values of the tokens it serves: the model mixes them "
            "by other means, such as linear attention or convolutions, which piflux can't split",
        )
    downstream = _reach(graph.nodes, sharing, writes.sources)
    upstream = _reach(reversed(graph.nodes), sharing, writes.users)
    whole = _run_whole(graph, flows, writes, plan, downstream)
    plan.local = {n for n in graph.nodes if n not in whole and _touches(n, plan)}
    for node in graph.nodes:
        between = node in downstream and node in upstream
        if node in whole and between and _touches(node, plan):
            raise CannotShard(node, _why_one_token(node, plan) or why_refused(node))
        for operand in operands(node):
            _edge(node, operand, _flow(node, flows), plan, whole)
    writes.check(plan)
    for slot, node in enumerate(n for n in graph.nodes if n in sharing):
        keys, values = flows[node].attended
        for axis in (axis for n in node.all_input_nodes for axis in axes(n)):
            attended = axis in (keys, values) or axis.dim == ndim(axis.node) - 2
            if axis in plan.layouts and not attended and axis not in flows[node].whole:
                raise CannotShard(node, f"%{axis.node.name} carries tokens along two dimensions")
        plan.attentions.append(Attention(node, slot, keys, values))
    return plan


def _why_one_token(node: fx.Node, plan: Plan) -> str:
    """Where an op reads a dimension of a single token: what is refused is that, not the op."""
    read = [axis for n in node.all_input_nodes for axis in axes(n) if axis in plan.layouts]
    if not any(sizes(axis.node, axis.item)[axis.dim] == 1 for axis in read):
        return ""
    return (
        "has a single token here, fewer than two ranks could share, and a dimension of one can't "
        "be told from one without tokens: give the model more (a larger picture, a longer prompt)"
    )


def _run_whole(
    graph: fx.Graph,
    flows: dict[fx.Node, Flow],
    writes: Writes,
    plan: Plan,
    downstream: set[fx.Node],
) -> set[fx.Node]:
    """The nodes that run on all tokens: those that must and, upstream, what leads to them."""

    def must(node: fx.Node) -> bool:
        ends = node.op in ("placeholder", "get_attr", "output")
        found = _flow(node, flows)
        return ends or _mixes(node, found, plan) or _born(node, found, plan)

    def is_read_whole(node: fx.Node) -> bool:
        return any(
            user in whole
            and user not in downstream
            or any(axis.node is node and axis in plan.layouts for axis in _flow(user, flows).whole)
            for user in node.users
        )

    def is_written_whole(node: fx.Node) -> bool:
        return any(n in whole and n not in downstream for n in writes.written_with(node))

    whole = set(filter(must, graph.nodes))
    # Upstream of attention a whole value is computed from whole ones, not gathered.
    upstream = [n for n in reversed(graph.nodes) if n not in downstream and _touches(n, plan)]
    grows = True
    while grows:
        before = len(whole)
        for node in upstream:
            if _carries(node, plan) and is_read_whole(node) or is_written_whole(node):
                whole.add(node)
        grows = len(whole) > before
    for node in graph.nodes:
        # Only a tensor can be cut, not the tuple it comes in.
        if op_name(node) == "getitem" and node.args[0] in whole and _in_tuple(node):
            whole.add(node)
    return whole


def _edge(node: fx.Node, operand: Value, found: Flow, plan: Plan, whole: set[fx.Node]) -> None:
    """Decide whether `operand` is cut or joined on its way into `node`."""
    if operand in found.unread:
        return
    # A run of no tokens is as long on a part.
    dims = [
        d for d in range(ndim(*operand)) if plan.layouts.get(Axis(operand.node, d, operand.item))
    ]
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


def _reach(
    nodes: Iterable[fx.Node], seeds: set[fx.Node], along: dict[fx.Node, set[fx.Node]]
) -> set[fx.Node]:
    """The seeds and every node that has one of those reached before it `along` its edges."""
    reached = set(seeds)
    for node in nodes:
        if not reached.isdisjoint(along[node]):
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


def _born(node: fx.Node, found: Flow, plan: Plan) -> bool:
    """Whether some token dimension of the node's value comes from none of its inputs'."""
    arriving = {link.target for link in found.links if link.source in plan.layouts}
    return any(axis in plan.layouts and axis not in arriving for axis in axes(node))


def _mixes(node: fx.Node, found: Flow, plan: Plan) -> bool:
    """Whether an operand has a token dimension that does not reappear in the node's value."""
    allowed = {link.source for link in found.links} | {*found.attended, *found.whole}
    allowed -= {*found.mixed}
    return any(
        axis in plan.layouts
        and axis not in allowed
        # Every part has all of one token, and of none: it may be spread over others.
        and not (_carries(node, plan) and sizes(*value)[axis.dim] in (0, 1))
        for value in operands(node)
        if value not in found.unread
        for axis in (Axis(value.node, dim, value.item) for dim in range(ndim(*value)))
    )


def _check_lengths(plan: Plan, world_size: int) -> None:
    """Refuse to compute most tokens on several ranks, as happens to runs of few tokens."""
    for attention in plan.attentions:
        if world_size > 1 and 0 in (shape := sizes(attention.node)):
            raise CannotShard(
                attention.node,
                f"is empty, of shape {tuple(shape)}: {world_size} ranks have nothing to share. "
                "Give the model inputs that hold something",
            )
        lengths = plan.lengths(attention.keys)
        total = sympy.expand(sum(lengths, sympy.Integer(0)))
        if less(attention.keys.node, total, world_size):
            raise _too_short(attention.node, total, world_size)
        part = sum(part_length(_example(attention.node, n), world_size) for n in lengths)
        share = part_length(_example(attention.node, total), world_size)
        if part >= MOST_SHARES * share:
            raise CannotShard(
                attention.node,
                f"attends to {len(lengths)} runs of tokens, too short ones to be cut into "
                f"{world_size} parts: a part would have {part} tokens where {share} are its share",
            )


def _too_short(node: fx.Node, length: sympy.Expr, world_size: int) -> CannotShard:
    return CannotShard(
        node,
        f"has {_tokens(_example(node, length))}, fewer than {world_size} ranks have parts for: use "
        "fewer ranks or more tokens",
    )


def _tokens(count: int) -> str:
    return f"{count} token" + "s" * (count != 1)
