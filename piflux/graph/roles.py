"""What a graph's inputs are: latents, clocks, conditions, or the model's own."""

from __future__ import annotations

from torch import Tensor, fx

from piflux.graph.axes import Axis
from piflux.graph.nodes import op_name, plain_name
from piflux.graph.plan import Plan
from piflux.graph.values import tensors
from piflux.runtime.streams import Roles


def roles_of(gm: fx.GraphModule, plan: Plan) -> Roles:
    """Sort the graph's inputs: what the output's tokens come from is latent, small ones are clocks.

    Read off the plan, so that it holds for any model: the segments of a joined output name the
    places where they were born, and the inputs upstream of those are the latents.
    """
    output_segments = {
        segment
        for _, value in plan.joins
        for dim in plan.joins[_, value]
        for segment in plan.layouts[Axis(value.node, dim, value.item)]
    }
    births = {
        value.node
        for (_, value), dims in plan.cuts.items()
        if any(
            segment in output_segments
            for dim in dims
            for segment in plan.layouts[Axis(value.node, dim, value.item)]
        )
    }
    upstream = set(births)
    for node in reversed(gm.graph.nodes):
        if any(user in upstream for user in node.users):
            upstream.add(node)
    latents: list[int] = []
    clocks: list[int] = []
    conditions: list[int] = []
    names: dict[int, str] = {}
    for position, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        if not tensors(node) or is_of_the_model(node):
            continue
        names[position] = plain_name(node)
        if _is_a_number_an_entry(tensors(node)[0]) and not _is_looked_up(node):
            clocks.append(position)
        else:
            (latents if node in upstream else conditions).append(position)
    return Roles(tuple(latents), tuple(clocks), tuple(conditions), names)


def _is_a_number_an_entry(x: Tensor) -> bool:
    """Of a batch: (), (B,), or (B, 1, ...), as LTX-Video and Cosmos have their times."""
    return all(isinstance(size, int) and size == 1 for size in x.shape[1:])


def _is_looked_up(node: fx.Node) -> bool:
    """Whether an input indexes a table, as the labels of classes do and no clock."""
    return any(
        op_name(user) == "embedding"
        or op_name(user) in ("getitem", "index_select")
        and user.args[0] is not node
        for user in node.users
    )


def is_of_the_model(node: fx.Node) -> bool:
    """Whether an input is a module's tensor, or a Python number that Dynamo made a tensor.

    A parameter need not be the model's: prompts are learned, too.
    """
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    module = source is not None and "MODULE" in source.guard_source.name
    return module or getattr(argument, "pass_arg_as_tensor", False)
