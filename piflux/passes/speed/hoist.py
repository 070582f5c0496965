"""Take what depends on the time alone out of the step, to be computed for all steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from piflux.graph.axes import axes
from piflux.graph.blocks import written
from piflux.graph.extract import extract
from piflux.graph.nodes import PRODUCTS, computes, op_name
from piflux.graph.plan import Context, Plan
from piflux.graph.roles import roles_of
from piflux.graph.values import known, tensors
from piflux.kernels.products import OfAllSteps

HOISTED = "hoisted"
"""The module's name."""

LEADING = "leading"
"""Within it: what leads to the last products."""


def hoist(gm: fx.GraphModule, ctx: Context) -> int:
    """Move matrix products of clocks, and what leads to them, into a module. Returns their number.

    In a diffusion transformer these are the modulations: every block multiplies the embedded time
    by weights of its own, a quarter of FLUX's, for one row of numbers. Steps whose times are known
    are rows of one product (`piflux.runtime.hoisted`). Only what ends in a product is moved: what
    follows is cheap, and part of other kernels.

    Before:

        s = silu(temb)                                           # (1, 64), of timestep and prompt
        m = linear(s, w)                                         # (1, 192)
        h = x * m.unsqueeze(1)
        return (h,)

    After:

        hoisted = hoisted(temb, w)
        m = hoisted[0]
        h = x * m.unsqueeze(1)
        return (h,)

    What leads to the last layers is a module within it. What carries tokens stays, and so does what
    depends on a size that is a symbol. A graph without such products stays as it is, and so does
    one that does more than compute, as for `enclose`.
    """
    if not computes(gm.graph):
        return 0
    nodes = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    timely = _timely(gm, ctx.plan)
    wanted = {n for n in timely if op_name(n) in PRODUCTS and timely[n]}
    if not wanted:
        return 0
    for node in reversed(nodes):
        if node in timely and any(user in wanted for user in node.users):
            wanted.add(node)
    moved = [n for n in nodes if n in wanted]
    read = [n for n in moved if any(user not in wanted for user in n.users)]
    if not all(isinstance(x := known(n), Tensor) and x.is_contiguous() for n in read):
        return 0
    count = sum(op_name(n) in PRODUCTS for n in moved)
    extract(gm, HOISTED, _merged(moved))
    hoisted = gm.get_submodule(HOISTED)
    assert isinstance(hoisted, fx.GraphModule)
    _lead(hoisted)
    return count


def _merged(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes without repetitions; whoever reads one reads the first of its kind.

    Each of a model's blocks applies silu to the time by itself, for one.
    """
    first: dict[tuple[str, Any, str], fx.Node] = {}
    for node in nodes:
        same = first.setdefault(written(node, None, lambda n: n.name), node)
        if same is not node:
            node.replace_all_uses_with(same)
            node.graph.erase_node(node)
    return list(first.values())


def _lead(hoisted: fx.GraphModule) -> None:
    """Move all but the last layers into a module of their own.

    The last, one or two for each block, take the rows of all steps as they do those of one. By
    `torch.vmap`, as what leads to them, each would take three kernels.
    """
    calls = [n for n in hoisted.graph.nodes if n.op.startswith("call")]
    call = extract(hoisted, LEADING, [n for n in calls if not _is_last(n)])
    values = map(known, call.all_input_nodes)
    dims = [x.dim() if isinstance(x, Tensor) else 0 for x in values]
    setattr(hoisted, LEADING, OfAllSteps(hoisted.get_submodule(LEADING), dims))
    hoisted.recompile()


def _is_last(node: fx.Node) -> bool:
    """Whether it is a linear layer of what was computed here, and nothing here reads its result."""
    if op_name(node) != "linear" or any(user.op != "output" for user in node.users):
        return False
    x, *parameters = node.all_input_nodes
    return x.op.startswith("call") and all(isinstance(known(p), nn.Parameter) for p in parameters)


def _timely(gm: fx.GraphModule, plan: Plan) -> dict[fx.Node, bool]:
    """What can be computed before the steps, once their times are known: whether it needs them."""
    roles = roles_of(gm, plan)
    inputs = gm.graph.find_nodes(op="placeholder")
    clocks = {inputs[i] for i in roles.clocks}
    latents = {inputs[i] for i in roles.latents}
    timely: dict[fx.Node, bool] = {}
    for node in gm.graph.nodes:
        values = tensors(node)
        if not values or any(map(is_traceable_wrapper_subclass, values)) or _carries(node, plan):
            continue
        if node.op in ("placeholder", "get_attr"):
            if node not in latents:
                timely[node] = node in clocks
        elif all(n in timely for n in node.all_input_nodes):
            timely[node] = any(timely[n] for n in node.all_input_nodes)
    return {n: needs for n, needs in timely.items() if n.op not in ("placeholder", "get_attr")}


def _carries(node: fx.Node, plan: Plan) -> bool:
    return node in plan.local or any(axis in plan.layouts for axis in axes(node))
