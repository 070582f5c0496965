"""What a step costs, by arithmetic, and the policy that follows. Runs nothing.

Of a graph are counted linear layers, matrix products, the attentions that share their tokens over
the ranks, bytes sent and the all-gathers that send them. Norms, pointwise ops and launching are
not: a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from piflux.graph.nodes import PRODUCTS, op_name
from piflux.graph.plan import Attention, Context, Plan
from piflux.graph.sizes import example_size
from piflux.graph.targets import SEND
from piflux.graph.values import tensors
from piflux.parts import part_length
from piflux.policies.policy import TokenBytes
from piflux.policies.schedule import PolicyName, Schedule, Sync

PRICE_OF_EXACT = 0.05
"""'auto' accepts images that take longer by this share for exact keys and values, where an image
has USUAL_STEPS. Of fewer steps the more, in proportion: the further apart two steps are, the less
is remembered keys and values like those that it takes (docs/policies.md). Chosen, not measured."""

USUAL_STEPS = 28

WORTH_A_GRAPH = 0.8
"""Of a gathered sync step's time: what a recomputed one may take to be chosen. It needs a second
graph, and more of its work is not counted."""


@dataclass(frozen=True)
class Rates:
    """What a device and its links do.

    Attributes:
        linear_tflops: of a matrix product of the model's shape.
        attention_tflops: of an attention of the model's shape.
        link_gbs: GB/s that a rank sends while all ranks gather.
        latency_s: seconds that an all-gather takes however little it sends; 0 where `link_gbs` was
            measured on gathers of the model's size, and so holds it.
    """

    linear_tflops: float
    attention_tflops: float
    link_gbs: float
    latency_s: float = 0.0

    def gather_s(self, count: int, gathers: int) -> float:
        """Seconds until a rank has sent `count` bytes in so many all-gathers, one by one."""
        return count / self.link_gbs / 1e9 + gathers * self.latency_s


@dataclass(frozen=True)
class Layer:
    """What one rank does from one attention, excluded, to the next, included.

    Attributes:
        linear_flops: of matrix products; after the last attention, they count as its layer's.
        attention_flops: of the attention.
        kv_bytes: what a rank sends for the others to have its keys and values.
        beside_flops: of the matrix products, those that are computed while keys and values travel.
        gathers: the all-gathers in which they do.
    """

    linear_flops: int
    attention_flops: int
    kv_bytes: int
    beside_flops: int = 0
    gathers: int = 0

    def compute_s(self, rates: Rates) -> float:
        linear, attention = self.linear_flops, self.attention_flops
        return (linear / rates.linear_tflops + attention / rates.attention_tflops) / 1e12

    def gather_s(self, rates: Rates) -> float:
        return rates.gather_s(self.kv_bytes, self.gathers)

    def wait_s(self, rates: Rates) -> float:
        """How long the attention waits for keys and values, after what is computed beside."""
        return max(0.0, self.gather_s(rates) - self.beside_flops / rates.linear_tflops / 1e12)


@dataclass(frozen=True)
class SyncChoice:
    """How sync steps come by all keys and values.

    Attributes:
        sync: 'gather' or 'recompute'.
        reason: why, with its numbers.
    """

    sync: Sync
    reason: str


def choose_sync(part: Sequence[Layer], whole: Sequence[Layer], rates: Rates) -> SyncChoice:
    """'recompute' if a sync step is clearly faster that way, see WORTH_A_GRAPH, else 'gather'.

    Args:
        part: what a rank of several does.
        whole: what a rank does that computes all tokens.
        rates: of the slowest rank.
    """
    gathered = sum(layer.compute_s(rates) + layer.wait_s(rates) for layer in part)
    recomputed = sum(layer.compute_s(rates) for layer in whole)
    reason = (
        f"at {rates.link_gbs:.3g} GB/s a sync step that gathers takes {gathered * 1000:.3g} ms, "
        f"one that computes all tokens {recomputed * 1000:.3g} ms"
    )
    worth = recomputed <= WORTH_A_GRAPH * gathered
    return SyncChoice("recompute" if worth else "gather", reason)


@dataclass(frozen=True)
class Choice:
    """The policy for a model on these ranks.

    Attributes:
        policy: 'gather', 'displaced' or 'rotate'.
        reason: why, with its numbers.
        gather_s: seconds a step that keys and values travel.
        compute_s: seconds a step that a rank computes.
    """

    policy: PolicyName
    reason: str
    gather_s: float
    compute_s: float


def choose(
    layers: Sequence[Layer], rates: Rates, steps: int | None = None, syncs: int = 0
) -> Choice:
    """The policy with the freshest keys and values that an image can afford.

    'gather', where attention waits in each step for what the work beside it does not hide, if the
    image takes longer by PRICE_OF_EXACT at most than one whose steps wait in sync steps only; else
    'displaced', where keys and values travel while the step computes, if that takes as long; else
    'rotate', which sends none.

    Args:
        layers: what a rank does in a step.
        rates: of the slowest rank.
        steps: of an image; None for as many as usual, with few sync steps among them.
        syncs: how many of these are sync steps in any case.
    """
    gather = sum(layer.gather_s(rates) for layer in layers)
    wait = sum(layer.wait_s(rates) for layer in layers)
    compute = sum(layer.compute_s(rates) for layer in layers)
    price, longer = PRICE_OF_EXACT, wait / compute
    if steps is not None:
        price *= max(1.0, USUAL_STEPS / steps)
        longer = (steps - syncs) * wait / (steps * compute + syncs * wait)
    share = gather / compute
    travel = (
        f"keys and values travel {gather * 1000:.3g} ms a step at {rates.link_gbs:.3g} GB/s, "
        f"{f'{share:.1%} of' if share < 1 else f'{share:.3g} times'} its {compute * 1000:.3g} ms "
        "of compute, and attention waits "
        f"for {wait * 1000:.3g} ms of them"
    )
    if steps is not None:
        travel += f", which makes an image of {steps} steps {longer:.1%} longer"
    policy: PolicyName
    if longer <= price:
        policy, why = "gather", "worth it for an exact picture"
    elif gather <= compute:
        policy, why = (
            "displaced",
            "too long to wait for, but they hide behind the compute",
        )
    else:
        policy, why = "rotate", "too long to hide, so none are sent"
    return Choice(policy, f"{travel}: {why}", gather, compute)


@dataclass(frozen=True)
class KeysAndValues:
    """The keys and values of one attention.

    Attributes:
        pair: fake tensors, each (.., tokens, head dim).
        part: tokens of a part.
        whole: tokens of all parts together, each counted once.
        sent_bytes: what a rank sends for all others to have its part's, uncompressed.
    """

    pair: Sequence[Tensor]
    part: int
    whole: int
    sent_bytes: int

    def token_bytes(self, schedule: Schedule) -> TokenBytes:
        """Of one token."""
        version = held = sent = 0
        for x in self.pair:
            width, itemsize = example_size(x.shape[-1], x), x.element_size()
            token = token_bytes(x, -2)
            heads = token // (width * itemsize)
            version += token
            held += heads * schedule.slots.held_bytes(width, itemsize) if schedule.order else token
            sent += heads * schedule.slots.sent_bytes(width, itemsize)
        return TokenBytes(version, held, sent)


def keys_and_values(plan: Plan, found: Attention, world_size: int) -> KeysAndValues:
    """Count them in a captured graph. Cutting its tensors does not change the counts."""
    axes = (found.keys, found.values)
    pair = [tensors(axis.node)[axis.item] for axis in axes]
    lengths = [example_size(length, pair[0]) for length in plan.lengths(found.keys)]
    part = sum(part_length(length, world_size) for length in lengths)
    sent = sum(token_bytes(x, -2) for x in pair) * part * (world_size - 1)
    return KeysAndValues(pair, part, sum(lengths), sent)


def token_bytes(x: Tensor, dim: int) -> int:
    """Bytes of `x` that belong to one index along `dim`."""
    sizes = [example_size(size, x) for size in x.shape]
    return x.element_size() * math.prod(sizes) // sizes[dim]


def layers_of(gm: fx.GraphModule, ctx: Context) -> tuple[Layer, ...]:
    """One layer for each depth of attention in a graph that all passes have run on.

    Parallel attentions make one layer. For a graph rewritten for one rank nothing is sent.
    """
    attentions = {found.node: found for found in ctx.plan.attentions}
    level: dict[fx.Node, int] = {}  # how many attentions stand upstream, one after the other
    for node in gm.graph.nodes:
        above = max((level[x] + (x in attentions) for x in node.all_input_nodes), default=0)
        level[node] = above
    depth = 1 + max(level[node] for node in attentions)

    linear, attended, sent, beside, gathers = ([0] * depth for _ in range(5))
    under_way: set[int] = set()  # at these levels keys and values travel
    for node, found in attentions.items():
        query = node.all_input_nodes[0]
        lengths = [example_size(n, tensors(node)[0]) for n in ctx.plan.lengths(found.keys)]
        attended[level[node]] += 2 * sum(lengths) * (_numel(query) + _numel(node))
        if ctx.world_size > 1:
            gathers[level[node]] += 1
            sent[level[node]] += keys_and_values(ctx.plan, found, ctx.world_size).sent_bytes
    for node in gm.graph.nodes:
        if node.target is SEND:
            under_way.add(level[node])
        elif node in attentions:
            under_way.discard(level[node])
        elif op_name(node) in PRODUCTS:
            left = tensors(node.all_input_nodes[0])[0]
            flops = 2 * _numel(node) * example_size(left.shape[-1], left)
            linear[min(level[node], depth - 1)] += flops
            for waiting in under_way:
                beside[waiting] += flops
    return tuple(map(Layer, linear, attended, sent, beside, gathers))


def _numel(node: fx.Node) -> int:
    (x,) = tensors(node)
    return math.prod(example_size(size, x) for size in x.shape)
