"""How tokens flow through each kind of op: one rule per kind, in one table.

A rule gets a node and its arguments and answers with a `Flow`: which runs of which input dimension
reappear, in order, along which output dimension. What a rule does not mention is mixed: an input
dimension that reappears nowhere was consumed, an output dimension that comes from nowhere was born
here. So an op without a rule mixes everything, and `layout` refuses it where that matters.

Rules know nothing of segments or ranks, and match targets by the names that
`piflux.graph.nodes` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from piflux.graph.axes import Axis, Value
from piflux.graph.nodes import SDPA, is_foreign, is_pointwise, mutates, op_name
from piflux.graph.sizes import example_size, expr, known_equal, less, same, sizes
from piflux.graph.values import known, ndim, tensors
from piflux.passes.refusals import refusing


class Link(NamedTuple):
    """`length` tokens that stand at `start` along `source` stand at `at` along `target`.

    The target is an axis of the node's value, or of an operand that the node writes into.
    """

    source: Axis
    target: Axis
    length: sympy.Expr
    start: sympy.Expr = sympy.Integer(0)
    at: sympy.Expr = sympy.Integer(0)


@dataclass
class Flow:
    """A rule's answer.

    Attributes:
        links: how tokens move.
        whole: input dimensions that the op needs whole even where it runs on a part.
        attended: dimensions of keys and values: read across tokens, as only attention may.
        mixed: dimensions that the op sums or searches along, though they be linked: the same value
            may be another operand, too, of which they remain.
        unread: tensors of which the op takes the dtype or device only.
        resize: the node's arguments when it runs on parts, given the local size of each of its
            axes, and the local start of each link; None where no argument holds a size.
    """

    links: list[Link] = field(default_factory=list)
    whole: list[Axis] = field(default_factory=list)
    attended: list[Axis] = field(default_factory=list)
    mixed: list[Axis] = field(default_factory=list)
    unread: list[Value] = field(default_factory=list)
    resize: Callable[[Resizer], tuple[tuple[Any, ...], dict[str, Any]]] | None = None


class Resizer(NamedTuple):
    """What `Flow.resize` may ask: sizes and positions as they are on one part.

    Attributes:
        size: the local size of an axis that carries tokens, else None.
        position: where the token at a full position of an axis stands on a part.
    """

    size: Callable[[Axis], Any]
    position: Callable[[Axis, sympy.Expr], Any]


MOST_RUNS = 64
"""Into more a dimension is not taken apart: such runs are short. Chosen, not measured."""

Rule = Callable[..., Flow]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def flow(node: fx.Node) -> Flow:
    """How tokens flow through `node`.

    Raises:
        CannotShard: the rule for the op fails at these arguments.
    """
    found = _find(node)
    if found is None:
        return Flow()
    args, kwargs = node.args, dict(node.kwargs)
    for name in ("input", "self"):  # what torch calls an op's first argument
        if name in kwargs:
            args = (kwargs.pop(name), *args)
    with refusing(lambda: node):
        return found(node, *args, **kwargs)


def why_refused(node: fx.Node) -> str:
    """Why no part of a node's value can be told from parts of its operands."""
    if _find(node) is dropout:
        return "drops out at random, on each rank something else: call .eval() on the model"
    if _find(node) is not None:
        return "mixes tokens between two attentions, where no rank holds all of them"
    if not is_foreign(node):
        return (
            "is an op that piflux has no rule for, so that nothing is known of where it takes "
            "tokens: write it in terms of others, or add a rule (CONTRIBUTING.md says how)"
        )
    return (
        "is another library's op, so that nothing is known of where it takes tokens: if it is "
        "attention, let the model call scaled_dot_product_attention (in diffusers: "
        "model.set_attention_backend('native'))"
    )


def foreign_ops(graph: fx.Graph) -> list[fx.Node]:
    """The calls that may be another attention: of another library, or flex attention with masks."""
    flex = torch.ops.higher_order.flex_attention
    return [n for n in graph.nodes if (is_foreign(n) or n.target is flex) and tensors(n)]


def _find(node: fx.Node) -> Rule | None:
    name = op_name(node)
    in_place = mutates(node) and RULES.get(name.removesuffix("_")) is pointwise
    return RULES.get(name) or (pointwise if in_place or is_pointwise(name) else None)


# --- helpers -------------------------------------------------------------------------------------


def _dim(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _dims(dims: int | Sequence[int] | None, rank: int) -> set[int]:
    if dims is None:
        return set(range(rank))
    return {_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}


def _is_dim(dim: Any) -> TypeGuard[int]:
    return isinstance(dim, int) and not isinstance(dim, bool)


def _same(
    source: fx.Node, target: fx.Node, pairs: Iterable[tuple[int, int]], item: int = 0
) -> list[Link]:
    """Dimension s of `source` is dimension t of `target`, token for token, for each (s, t)."""
    shape = sizes(source)
    return [Link(Axis(source, s), Axis(target, t, item), shape[s]) for s, t in pairs]


def _broadcast(source: fx.Node, target: fx.Node, skip: Iterable[int] = ()) -> list[Link]:
    """Dimensions aligned from the right; a size of 1 that is spread carries no tokens.

    `skip`: dimensions of `source`, counted from the right (-1, -2, ..), that don't reappear.
    """
    shape, out = sizes(source), sizes(target)
    shift = len(out) - len(shape)
    pairs = [
        (d, d + shift)
        for d in range(len(shape))
        if d - len(shape) not in skip and d + shift >= 0 and (shape[d] != 1 or out[d + shift] == 1)
    ]
    return _same(source, target, pairs)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and bool(tensors(x))


def _flatten(sizes: tuple[Any, ...]) -> list[Any]:
    """Tensor.reshape(2, 3) and Tensor.reshape((2, 3)) alike."""
    return (
        list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)
    )


# --- one token in, one token out -----------------------------------------------------------------


@rule(
    "float", "double", "half", "bfloat16", "int", "long", "bool", "type", "cpu", "cuda",
    "contiguous", "detach", "alias", "copy", "truediv", "floordiv", "and_", "or_", "invert", "not_",
    "rsub", "polar", "complex", "real", "imag", "conj", "zeros_like", "ones_like", "full_like",
    "empty_like", "where", "masked_fill", "hardswish", "iadd", "isub", "imul", "itruediv",
    "positive", "pos", "_to_copy", "copy_", "fill_", "zero_", "masked_fill_",
)  # fmt: skip
def pointwise(node: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    inputs = [n for n in node.all_input_nodes if _is_tensor(n)]
    return Flow([link for n in inputs for link in _broadcast(n, node)])


@rule("to", "type_as")
def converted(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    others = [Value(n) for n in (*args, kwargs.get("other")) if _is_tensor(n) and n is not x]
    return Flow(_broadcast(x, node), unread=others)


@rule("max", "min")
def extremum(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    if _is_tensor(kwargs.get("other", args[0] if args else None)):
        return pointwise(node)
    return extremum_along(node, x, *args, **kwargs)


@rule("dropout", "dropout1d", "dropout2d", "alpha_dropout")
def dropout(
    node: fx.Node, x: fx.Node, p: Any = 0.5, training: Any = True, inplace: bool = False
) -> Flow:
    # Random numbers differ between a part and the whole, so a dropout that drops has no rule.
    return pointwise(node) if known(training) is False or known(p) == 0 else Flow()


@rule("linear")
def linear(node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> Flow:
    rank = ndim(x)
    mixed = [Axis(weight, d) for d in range(ndim(weight))]
    return Flow(_same(x, node, [(d, d) for d in range(rank - 1)]), mixed=mixed)


@rule("layer_norm", "rms_norm")
def layer_norm(
    node: fx.Node, input: fx.Node, normalized_shape: Sequence[Any], *args: Any, **kwargs: Any
) -> Flow:
    kept = ndim(input) - len(normalized_shape)
    return Flow(_same(input, node, [(d, d) for d in range(kept)]))


_DIM = {"normalize": (1, 1), "glu": (0, -1), "topk": (1, -1), "sort": (0, -1), "argsort": (0, -1)}
"""Which argument after the first names the dimension, and its default; else the next, and none."""


@rule(
    "softmax", "log_softmax", "softmin", "normalize", "glu", "cumsum", "cumprod", "logcumsumexp",
    "cummax", "cummin", "topk", "sort", "argsort",
)  # fmt: skip
def along_one_dim(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    position, default = _DIM.get(op_name(node), (0, None))  # without a dim softmax picks one
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    rank = ndim(x)
    if not _is_dim(dim):
        return Flow()
    pairs = [(d, d) for d in range(rank) if d != _dim(dim, rank)]
    return Flow([k for i in range(len(tensors(node))) for k in _same(x, node, pairs, i)])


@rule("argmax", "argmin", "median", "nanmedian", "mode")
def extremum_along(
    node: fx.Node, x: fx.Node, dim: Any = None, keepdim: Any = False, **kwargs: Any
) -> Flow:
    if not _is_dim(dim) and op_name(node) != "mode":
        return Flow()  # over everything
    rank = ndim(x)
    kept = [d for d in range(rank) if d != _dim(dim if _is_dim(dim) else -1, rank)]
    pairs = [(d, d if keepdim else i) for i, d in enumerate(kept)]
    return Flow([k for i in range(len(tensors(node))) for k in _same(x, node, pairs, i)])


@rule("gather", "take_along_dim")
def gather(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    along = "gather" in op_name(node)
    named = dict(zip(("dim", "index") if along else ("indices", "dim"), args, strict=False))
    named |= kwargs
    dim, index = named.get("dim"), named["index" if along else "indices"]
    rank = ndim(x)
    if not _is_dim(dim) or ndim(index) != rank:
        return Flow()
    taken, shape, out = _dim(dim, rank), sizes(x), sizes(node)
    # Of dimensions that `gather` cuts short or `take_along_dim` spreads nothing is said.
    kept = [(d, d) for d in range(rank) if d != taken and known_equal(shape[d], out[d])]
    alike = [(d, d) for d in range(rank) if known_equal(sizes(index)[d], out[d])]
    links = _same(x, node, kept) + _same(index, node, alike)
    return Flow(links, mixed=[Axis(x, taken)])


@rule("flip", "roll")
def turned(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    rank, shifted = ndim(x), op_name(node) == "roll"
    dims = kwargs.get("dims", (args[1:] if shifted else _flatten(args)) or None)
    if shifted and isinstance(dims, tuple) and len(dims) == 1:
        (dims,) = dims
    if dims in (None, ()):
        return Flow()  # `roll` takes all numbers in one row
    return Flow(_same(x, node, [(d, d) for d in range(rank) if d not in _dims(dims, rank)]))


@rule("one_hot")
def one_hot(node: fx.Node, x: fx.Node, num_classes: Any = -1) -> Flow:
    # Without a number there are as many classes as the tokens at hand have.
    if known(num_classes) == -1:
        return Flow()
    return Flow(_same(x, node, [(d, d) for d in range(ndim(x))]))


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "prod", "all", "any", "logsumexp")
def reduction(
    node: fx.Node, x: fx.Node, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any
) -> Flow:
    if args and op_name(node) in ("mean", "sum", "amax", "amin", "logsumexp", "all", "any"):
        keepdim = args[0]
    elif args or not isinstance(dim, (int, tuple, list)) or isinstance(dim, bool):
        return Flow()  # over everything, or a spelling that this rule can't read
    if op_name(node) == "norm" and len(node.args) > 1:
        return Flow()  # its second argument is an exponent
    rank = ndim(x)
    gone = _dims(dim, rank)
    kept = [d for d in range(rank) if d not in gone]
    return Flow(_same(x, node, [(d, d if keepdim else i) for i, d in enumerate(kept)]))


@rule("conv1d", "conv2d", "conv3d")
def convolution(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    return Flow(_same(x, node, [(0, 0)]))  # the batch; everything else is mixed


@rule("embedding")
def embedding(node: fx.Node, input: fx.Node, weight: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    if node.target is not F.embedding:
        input = weight  # torch.embedding has the table first, and no limit for its rows
    elif kwargs.get("max_norm", args[1] if len(args) > 1 else None) is not None:
        return Flow()  # it shortens the rows that are looked up, in the table itself
    return Flow(_same(input, node, [(d, d) for d in range(ndim(input))]))


@rule("matmul", "bmm", "mm", "mv", "__matmul__")
def matmul(node: fx.Node, a: fx.Node, b: fx.Node) -> Flow:
    rank_a, rank_b = ndim(a), ndim(b)
    mixed = [Axis(a, rank_a - 1), Axis(b, max(rank_b - 2, 0))]
    if rank_b == 1:
        return Flow(_same(a, node, [(d, d) for d in range(rank_a - 1)]), mixed=mixed)
    if rank_a == 1:
        pairs = [(d, d) for d in range(rank_b - 2)]
        return Flow(_same(b, node, [*pairs, (rank_b - 1, rank_b - 2)]), mixed=mixed)
    return Flow(_broadcast(a, node, skip=[-1]) + _broadcast(b, node, skip=[-2]), mixed=mixed)


@rule("addmm")
def addmm(node: fx.Node, bias: fx.Node, a: fx.Node, b: fx.Node, **kwargs: Any) -> Flow:
    links = _same(a, node, [(0, 0)]) + _same(b, node, [(1, 1)]) + _broadcast(bias, node)
    return Flow(links, mixed=[Axis(a, 1), Axis(b, 0)])


@rule("baddbmm")
def baddbmm(node: fx.Node, bias: fx.Node, a: fx.Node, b: fx.Node, **kwargs: Any) -> Flow:
    links = _same(a, node, [(0, 0), (1, 1)]) + _same(b, node, [(0, 0), (2, 2)])
    return Flow(links + _broadcast(bias, node), mixed=[Axis(a, 2), Axis(b, 1)])


@rule("einsum")
def einsum(node: fx.Node, equation: Any, *inputs: Any) -> Flow:
    if not isinstance(equation, str):
        return Flow()  # dimensions by numbers
    nodes = _flatten(inputs)
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = [_labels(x, ndim(n)) for x, n in zip(left.split(","), nodes, strict=True)]
    if arrow:
        output = _labels(right, ndim(node))
    else:
        every = [label for labels in operands for label in labels]
        spread = sorted({x for x in every if isinstance(x, int)})
        output = [*spread, *sorted(x for x in every if isinstance(x, str) and every.count(x) == 1)]
    out = sizes(node)
    links: list[Link] = []
    mixed: list[Axis] = []
    for x, labels in zip(nodes, operands, strict=True):
        # Of what is repeated a diagonal is taken.
        gone = [d for d, k in enumerate(labels) if labels.count(k) > 1 or k not in output]
        mixed += [Axis(x, d) for d in gone]
        shape = sizes(x)
        pairs = [(d, output.index(label)) for d, label in enumerate(labels) if d not in gone]
        links += _same(x, node, [(s, t) for s, t in pairs if shape[s] != 1 or out[t] == 1])
    return Flow(links, mixed=mixed)


def _labels(letters: str, rank: int) -> list[str | int]:
    """What each dimension is called; those that '...' stands for by their distance to its end."""
    before, dots, after = letters.partition("...")
    spread = rank - len(before) - len(after)
    return [*before, *(range(-spread, 0) if dots else ()), *after]


@rule("outer")
def outer(node: fx.Node, a: fx.Node, b: fx.Node) -> Flow:
    return Flow(_same(a, node, [(0, 0)]) + _same(b, node, [(0, 1)]))


# --- dimensions change places --------------------------------------------------------------------


def _moved(node: fx.Node, x: fx.Node, order: Sequence[int]) -> Flow:
    """Output dimension i is input dimension order[i]."""
    return Flow(_same(x, node, [(s, t) for t, s in enumerate(order)]))


@rule("transpose", "swapaxes", "swapdims")
def transpose(node: fx.Node, x: fx.Node, *dims: int, **kwargs: int) -> Flow:
    order = list(range(ndim(x)))
    a, b = (_dim(d, len(order)) for d in (*dims, *kwargs.values()))  # dim0 or axis0
    order[a], order[b] = order[b], order[a]
    return _moved(node, x, order)


@rule("t", "T", "H")
def t(node: fx.Node, x: fx.Node, *args: Any) -> Flow:
    return _moved(node, x, list(reversed(range(ndim(x)))))


@rule("mT", "mH", "adjoint")
def matrix_transpose(node: fx.Node, x: fx.Node, *args: Any) -> Flow:
    return transpose(node, x, -1, -2)


@rule("permute")
def permute(node: fx.Node, x: fx.Node, *dims: Any) -> Flow:
    return _moved(node, x, [_dim(d, ndim(x)) for d in _flatten(dims)])


@rule("movedim", "moveaxis")
def movedim(node: fx.Node, x: fx.Node, source: Any, destination: Any) -> Flow:
    rank = ndim(x)
    single = isinstance(source, int)
    pairs = [(source, destination)] if single else zip(source, destination, strict=True)
    moved = {_dim(t, rank): _dim(s, rank) for s, t in pairs}
    others = (d for d in range(rank) if d not in moved.values())
    return _moved(node, x, [moved[t] if t in moved else next(others) for t in range(rank)])


@rule("unsqueeze")
def unsqueeze(node: fx.Node, x: fx.Node, dim: int) -> Flow:
    rank = ndim(node)
    new = _dim(dim, rank)
    return Flow(_same(x, node, enumerate(d for d in range(rank) if d != new)))


@rule("squeeze")
def squeeze(node: fx.Node, x: fx.Node, dim: Any = None) -> Flow:
    shape = sizes(x)
    asked = _dims(dim, len(shape))
    kept = [
        d for d in range(len(shape)) if not (d in asked and known_equal(shape[d], sympy.Integer(1)))
    ]
    gone = tuple(d for d in range(len(shape)) if d not in kept)
    # A part may have one token where the whole has more.
    return Flow(
        _same(x, node, [(d, i) for i, d in enumerate(kept)]), resize=lambda _: ((x, gone), {})
    )


# --- shapes with sizes in their arguments --------------------------------------------------------


def _regrouped(x: fx.Node, node: fx.Node) -> list[tuple[int, int]]:
    """The dimensions that a row-major reshape leaves as they are."""
    groups = _groups(x, node)
    return [(before[0], after[0]) for before, after in groups if len(before) == len(after) == 1]


def runs(node: fx.Node) -> list[Link]:
    """What else a reshape does: one dimension is what another is time after time.

    Of what is put together or taken apart, the last dimension lies in runs side by side: the places
    of each frame in a row of tokens, or of each picture of a batch. All runs are taken for the same
    tokens, so a part has the same window of each.
    """
    if _find(node) not in (reshape, flatten, unflatten):
        return []
    x = node.args[0]
    assert isinstance(x, fx.Node)
    links: list[Link] = []
    for before, after in _groups(x, node, lambda a, b: known_equal(a, b) or _are_equal(node, a, b)):
        source, target = Axis(x, before[-1]), Axis(node, after[-1])
        many, few = sizes(x)[source.dim], sizes(node)[target.dim]
        takes_apart = example_size(many, tensors(x)[0]) > example_size(few, tensors(x)[0])
        many, few = (many, few) if takes_apart else (few, many)
        count = example_size(many, tensors(x)[0]) // example_size(few, tensors(x)[0])
        if not 1 < count <= MOST_RUNS or not _are_equal(node, many, count * few):
            continue
        for number in range(count):
            edge = sympy.expand(number * few)
            links.append(
                Link(source, target, few, start=edge)
                if takes_apart
                else Link(source, target, few, at=edge)
            )
    return links


def _are_equal(node: fx.Node, a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sizes that are equal here are so by algebra, or become so by a guard."""
    near = tensors(node)[0]
    return example_size(a, near) == example_size(b, near) and same(node, a, b)


def _groups(
    x: fx.Node, node: fx.Node, equal: Callable[[Any, Any], bool] = known_equal
) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of a value and of its reshape are the same taken together.

    Both shapes are read from the left; as soon as as many elements were read on both sides, what
    was read is a group.
    """
    a = [(d, s) for d, s in enumerate(sizes(x)) if s != 1]
    b = [(d, s) for d, s in enumerate(sizes(node)) if s != 1]
    near = tensors(x)[0]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start_i, start_j = i, j
        left, right = a[i][1], b[j][1]
        while not equal(left, right):
            # Which side is behind is asked of the example sizes; equality is proved.
            behind = example_size(left, near) < example_size(right, near)
            if behind and i + 1 < len(a):
                i += 1
                left = left * a[i][1]
            elif j + 1 < len(b):
                j += 1
                right = right * b[j][1]
            else:
                return groups
        i, j = i + 1, j + 1
        groups.append(([d for d, _ in a[start_i:i]], [d for d, _ in b[start_j:j]]))
    return groups


def _resized(
    node: fx.Node, shape: Sequence[Any], *lead: Any, **kwargs: Any
) -> Callable[[Resizer], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Rewrites a full list of output sizes, which stands behind `lead`; -1 stays -1."""

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = []
        for dim, size in enumerate(shape):
            cut = local.size(Axis(node, dim))
            new.append(size if cut is None or size == -1 else cut)
        return (*lead, tuple(new)), kwargs

    return resize


@rule("reshape", "view", "_unsafe_view", "view_copy")
def reshape(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    shape = _flatten(args) if args else list(kwargs.get("shape", kwargs.get("size", ())))
    if not shape or isinstance(shape[0], torch.dtype):
        return Flow()
    links = _same(x, node, _regrouped(x, node))
    return Flow(links, resize=_resized(node, shape, x))


@rule("flatten", "ravel")
def flatten(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    return Flow(_same(x, node, _regrouped(x, node)))


@rule("unflatten")
def unflatten(node: fx.Node, x: fx.Node, dim: int, sizes: Sequence[Any]) -> Flow:
    first = _dim(dim, len(tensors(x)[0].shape))

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = []
        for i, size in enumerate(sizes):
            cut = local.size(Axis(node, first + i))
            new.append(size if cut is None or size == -1 else cut)
        return (x, dim, tuple(new)), {}

    return Flow(_same(x, node, _regrouped(x, node)), resize=resize)


@rule("expand", "broadcast_to")
def expand(node: fx.Node, x: fx.Node, *shape: Any, **kwargs: Any) -> Flow:
    asked = _flatten(shape) if shape else list(kwargs["size"])
    return Flow(_broadcast(x, node), resize=_resized(node, asked, x))


@rule("expand_as", "view_as", "reshape_as")
def expand_as(node: fx.Node, x: fx.Node, other: fx.Node) -> Flow:
    return Flow(_broadcast(x, node) + _broadcast(other, node))


@rule("repeat", "tile")
def repeat(node: fx.Node, x: fx.Node, *repeats: Any) -> Flow:
    times = _flatten(repeats)
    shift = ndim(node) - ndim(x)
    ones = [d for d, n in enumerate(times) if known(n) == 1]
    return Flow(_same(x, node, [(d - shift, d) for d in ones if d >= shift]))


@rule("repeat_interleave")
def repeat_interleave(
    node: fx.Node, x: fx.Node, repeats: Any, dim: int | None = None, **kwargs: Any
) -> Flow:
    if dim is None:
        return Flow()
    rank = ndim(x)
    return Flow(_same(x, node, [(d, d) for d in range(rank) if d != _dim(dim, rank)]))


@rule("view_as_real")
def view_as_real(node: fx.Node, x: fx.Node) -> Flow:
    return Flow(_same(x, node, [(d, d) for d in range(ndim(x))]))


@rule("view_as_complex")
def view_as_complex(node: fx.Node, x: fx.Node) -> Flow:
    return Flow(_same(x, node, [(d, d) for d in range(ndim(node))]))


@rule("pad")
def pad(node: fx.Node, x: fx.Node, pad: Sequence[Any], *args: Any, **kwargs: Any) -> Flow:
    rank = ndim(x)
    padded = {rank - 1 - i // 2 for i, n in enumerate(pad) if known(n) != 0}
    return Flow(_same(x, node, [(d, d) for d in range(rank) if d not in padded]))


# --- runs of tokens are joined and taken apart ---------------------------------------------------


@rule("cat", "concat", "concatenate")
def cat(node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0, **kwargs: Any) -> Flow:
    along = _dim(kwargs.get("axis", dim), ndim(node))
    links: list[Link] = []
    at = sympy.Integer(0)
    for x in tensors:
        shape = sizes(x)
        if len(shape) != ndim(node):
            return Flow()  # torch.cat skips legacy empty tensors; no model here does
        links += _same(x, node, [(d, d) for d in range(len(shape)) if d != along])
        links.append(Link(Axis(x, along), Axis(node, along), shape[along], at=at))
        at = at + shape[along]
    return Flow(links)


@rule("stack")
def stack(node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> Flow:
    rank = ndim(node)
    new = _dim(dim, rank)
    kept = [d for d in range(rank) if d != new]
    return Flow([link for x in tensors for link in _same(x, node, enumerate(kept))])


@rule("pad_sequence")
def pad_sequence(
    node: fx.Node, tensors: Sequence[fx.Node], batch_first: bool = False, *args: Any, **kwargs: Any
) -> Flow:
    rank = ndim(node)
    length = 1 if batch_first else 0
    order = [length, *range(2, rank)]  # the dimensions of a sequence, as the batch has them
    # A part would be padded to the length of another's part, or of another as a whole.
    padded = any(not same(node, sizes(x)[0], sizes(node)[length]) for x in tensors)
    pairs = [(s, t) for s, t in enumerate(order) if not (padded and s == 0)]
    return Flow([link for x in tensors for link in _same(x, node, pairs)])


def _pieces(node: fx.Node, x: fx.Node, dim: int) -> list[Link]:
    """Output i takes up along `dim` where output i - 1 ended."""
    along = _dim(dim, ndim(x))
    links: list[Link] = []
    start = sympy.Integer(0)
    for item in range(len(tensors(node))):
        shape = sizes(node, item)
        links += _same(x, node, [(d, d) for d in range(len(shape)) if d != along], item)
        if op_name(node) != "chunk":  # whose pieces need not be equal on a part
            links.append(Link(Axis(x, along), Axis(node, along, item), shape[along], start=start))
        start = start + shape[along]
    return links


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def split(node: fx.Node, x: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    spec = args[0] if args else None
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    along = _dim(dim, ndim(x))
    named = {k: v for k, v in kwargs.items() if k != "dim"}
    if op_name(node) == "tensor_split" or (spec is None and not named):
        return Flow()

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cuts = [local.size(Axis(node, along, item)) for item in range(len(tensors(node)))]
        if None in cuts:
            return node.args, dict(node.kwargs)
        return (x, cuts, along), {}

    return Flow(_pieces(node, x, dim), resize=resize)


@rule("unbind")
def unbind(node: fx.Node, x: fx.Node, dim: int = 0) -> Flow:
    rank = ndim(x)
    kept = [d for d in range(rank) if d != _dim(dim, rank)]
    items = range(len(tensors(node)))
    return Flow([k for i in items for k in _same(x, node, [(d, e) for e, d in enumerate(kept)], i)])


@rule("narrow")
def narrow(node: fx.Node, x: fx.Node, dim: int, start: Any, length: Any) -> Flow:
    rank = ndim(x)
    along = _dim(dim, rank)
    link = _run(node, x, along, along, known(start))
    kept = _same(x, node, [(d, d) for d in range(rank) if d != along])

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if local.size(Axis(x, along)) is None:
            return node.args, dict(node.kwargs)
        return (x, dim, local.position(link.source, link.start), local.size(link.target)), {}

    return Flow([*kept, link], resize=resize)


@rule("select")
def select(node: fx.Node, x: fx.Node, dim: int, index: Any) -> Flow:
    rank = ndim(x)
    kept = [d for d in range(rank) if d != _dim(dim, rank)]
    return Flow(_same(x, node, [(d, i) for i, d in enumerate(kept)]))


@rule("index_select")
def index_select(node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> Flow:
    rank = ndim(x)
    return Flow(_same(x, node, [(d, d) for d in range(rank) if d != _dim(dim, rank)]))


def _run(node: fx.Node, x: fx.Node, s: int, t: int, start: Any) -> Link:
    """The run of x from `start` on along dimension s, which is dimension t of the output."""
    length = sizes(x)[s]
    first = sympy.Integer(0) if start is None else expr(start)
    if first.is_negative:
        first = length + first
    return Link(Axis(x, s), Axis(node, t), sizes(node)[t], start=first)


def _entries(index: Any, rank: int) -> list[Any] | None:
    """What x[index] takes of each dimension, without an ellipsis; None if it indexes by tensors."""
    entries = list(index) if isinstance(index, tuple) else [index]
    plain = (slice, int, torch.SymInt, type(None), type(...))
    if any(not isinstance(known(e), plain) for e in entries):
        return None
    if ... in entries:
        at = entries.index(...)
        missing = rank - sum(e is not None and e is not ... for e in entries)
        entries[at : at + 1] = [slice(None)] * missing
    return entries


@rule("getitem")
def getitem(node: fx.Node, x: fx.Node, index: Any) -> Flow:
    if not tensors(x):
        return Flow()  # an item of a tuple that holds more than tensors
    if isinstance(known(x), (tuple, list)):
        if not tensors(x):
            return Flow()  # with None among them, as multi_head_attention_forward has it
        rank = ndim(node) if tensors(node) else 0
        shape = sizes(node) if rank else []
        item = index if index >= 0 else index + len(tensors(x))
        return Flow([Link(Axis(x, d, item), Axis(node, d), shape[d]) for d in range(rank)])
    shape = sizes(x)
    entries = _entries(index, len(shape))
    if entries is None:
        return Flow()
    links: list[Link] = []
    runs: dict[int, Link] = {}  # position in `entries` -> the run it takes
    s = t = 0
    for position, entry in enumerate(entries):
        if entry is None:
            t += 1
        elif isinstance(entry, slice):
            if entry.step in (None, 1):
                link = _run(node, x, s, t, known(entry.start))
                links.append(link)
                if entry != slice(None):
                    runs[position] = link
            s, t = s + 1, t + 1
        else:
            s += 1
    links += _same(x, node, [(s + i, t + i) for i in range(len(shape) - s)])

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = list(entries)
        for position, link in runs.items():
            entry = new[position]
            if local.size(link.source) is not None:
                stop = link.start + link.length
                new[position] = slice(
                    None if entry.start is None else local.position(link.source, link.start),
                    None if entry.stop is None else local.position(link.source, stop),
                )
        return (x, tuple(new)), {}

    return Flow(links, resize=resize if runs else None)


@rule("setitem")
def setitem(node: fx.Node, x: fx.Node, index: Any, value: Any) -> Flow:
    shape = sizes(x)
    entries = _entries(index, len(shape))
    if entries is None:
        return Flow()
    entries += [slice(None)] * (len(shape) - sum(e is not None for e in entries))
    kept = [e for e in entries if e is None or isinstance(e, slice)]  # dimensions of x[index]
    positions = [i for i, e in enumerate(entries) if e is not None]  # of x's dimensions
    taken = [entries[i] for i in positions]
    written = [d for d, e in enumerate(taken) if isinstance(e, slice)]
    runs = {d: _taken(node, shape[d], e) for d, e in enumerate(taken)}
    links = [k for k in _same(x, x, [(d, d) for d in runs]) if runs[k.source.dim] is not None]
    # What is written over is a run of its own, whatever is written.
    links += [
        Link(Axis(x, d), Axis(x, d), length, start=start, at=start)
        for d, (start, length) in ((d, run) for d, run in runs.items() if run is not None)
        if not known_equal(length, shape[d])
    ]
    if _is_tensor(value) and None not in entries:
        shift = len(kept) - ndim(value)
        for t, size in enumerate(sizes(value)):
            run = runs[d := written[t + shift]]
            if run is not None and (size != 1 or run[1] == 1):
                links.append(Link(Axis(value, t), Axis(x, d), size, at=run[0]))

    def resize(local: Resizer) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = list(entries)
        for d, run in runs.items():
            entry, axis = new[positions[d]], Axis(x, d)
            if run is None or entry == slice(None) or local.size(axis) is None:
                continue
            start, stop = local.position(axis, run[0]), local.position(axis, run[0] + run[1])
            new[positions[d]] = slice(start, stop) if isinstance(entry, slice) else start
        return (x, tuple(new), value), {}

    return Flow(links, resize=resize)


def _taken(node: fx.Node, size: sympy.Expr, entry: Any) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Where the run begins that an index takes, and its length; None for no run."""
    if not isinstance(entry, slice):
        at = expr(known(entry))
        return (size + at if at.is_negative else at), sympy.Integer(1)
    if entry.step not in (None, 1):
        return None
    edges = []
    for edge, default in ((entry.start, sympy.Integer(0)), (entry.stop, size)):
        at = default if edge is None else expr(known(edge))
        at = sympy.expand(size + at) if at.is_negative else at
        edges.append(size if less(node, size, at) else at)
    start, stop = edges
    return start, sympy.Integer(0) if less(node, stop, start) else sympy.expand(stop - start)


# --- attention -----------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(node: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    call = SDPA(*args, **kwargs)
    rank = ndim(node)
    links = _same(call.query, node, [(d, d) for d in range(rank - 1)])
    links += _broadcast(call.key, node, skip=[-1, -2])
    links += _broadcast(call.value, node, skip=[-2])
    tokens = rank - 2
    found = Flow(links, attended=[Axis(call.key, tokens), Axis(call.value, tokens)])
    if _is_tensor(call.attn_mask):
        found.links += _broadcast(call.attn_mask, node, skip=[-1])
        found.whole.append(Axis(call.attn_mask, ndim(call.attn_mask) - 1))
    return found
