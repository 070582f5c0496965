"""Write calls that hide several ops as those ops, which rules know."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C._functorch import is_batchedtensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from piflux.graph.nodes import (
    attention_arguments,
    is_attention,
    mutates,
    op_name,
    qualified_name,
    run_node,
)
from piflux.graph.plan import Context
from piflux.graph.sizes import expr, known_equal
from piflux.graph.values import known, tensors
from piflux.passes.split.lengths import Lengths

Meaning = Callable[..., Any]
"""A function of a node's arguments that calls other ops and returns what the node gives."""


def lower(gm: fx.GraphModule, ctx: Context) -> int:
    """Replace calls that Dynamo leaves closed. Returns how many.

    Those are calls of einops before 0.8.2, bodies of checkpoints, `nn.MultiheadAttention`,
    `nn.TransformerEncoderLayer`, flex attention that changes no score, and attention of other
    libraries without bias. Whatever is asked for beyond that stays, for `layout` to refuse. Tensors
    that are made like another (`x.new_zeros`) are made by themselves, since nothing of x is read.
    Padding downstream of an attention is a run of its own. On several ranks causal attention has a
    mask, whose rows can be cut.

    Before:

        r = rearrange(x, 'b l (h d) -> b h l d', h=2)
        z = x.new_zeros(8)

    After:

        x_1 = x.reshape([1, 6, 2, 4])
        r = x_1.permute([0, 2, 1, 3])
        z = zeros((8,), dtype=torch.float32, device=device(type='cpu'))
    """
    lowering = _Lowering(gm, ctx)
    node = next(iter(gm.graph.nodes))
    while node.op != "root":
        lowering.see(node)
        before = node.prev
        # What a call becomes may hold calls, too.
        node = before.next if lowering.open(node) else node.next
    if lowering.count:
        lowering.finish()
    return lowering.count


class _Lowering:
    """Writes into a graph.

    Attributes:
        count: the calls that were replaced.
    """

    def __init__(self, gm: fx.GraphModule, ctx: Context) -> None:
        self.count = 0
        self._gm = gm
        self._parts = ctx.world_size
        self._lengths = Lengths(gm.graph, ctx.world_size)
        self._replaced: dict[fx.Node, None] = {}
        self._downstream: set[fx.Node] = set()

    def see(self, node: fx.Node) -> None:
        """Nodes are seen in order, so that it is known what depends on an attention."""
        if is_attention(node) or not self._downstream.isdisjoint(node.all_input_nodes):
            self._downstream.add(node)

    def open(self, node: fx.Node) -> bool:
        """Write what `node` calls before it. Returns whether anything was."""
        if node in self._replaced or node.op not in ("call_function", "call_method"):
            return False
        body, meaning = _body(node), _meaning(self._gm, node, self._parts)
        if meaning is None and node in self._downstream and _pads_one_dim(node):
            meaning = _padded
        if body is None and meaning is None:
            return False
        with self._gm.graph.inserting_before(node):
            result = self._inlined(node, *body) if body else self._traced(node, meaning)
        self._replace(node, result)
        if node.target is torch.ops.higher_order.flex_attention:
            self._replaced |= dict.fromkeys(_made_for(node))
        self.count += 1
        return True

    def finish(self) -> None:
        """Erase what was replaced, which marked the places of others, and bodies nobody calls."""
        for node in reversed(self._gm.graph.nodes):
            if node in self._replaced or node.op == "get_attr" and not node.users:
                self._gm.graph.erase_node(node)
        self._gm.delete_all_unused_submodules()

    def _inlined(self, node: fx.Node, name: str, arguments: tuple[Any, ...]) -> Any:
        made: dict[fx.Node, Any] = {}
        given = iter(arguments)
        body = self._gm.get_submodule(name)
        assert isinstance(body, fx.GraphModule)
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                made[inner] = next(given)
            elif inner.op == "output":
                return fx.map_arg(inner.args[0], made.__getitem__)
            elif inner.op == "get_attr":
                made[inner] = self._gm.graph.get_attr(f"{name}.{inner.target}")
                made[inner].meta = dict(inner.meta)
            else:
                copy = made[inner] = self._gm.graph.create_node(
                    inner.op,
                    inner.target,
                    *fx.map_arg((inner.args, inner.kwargs), made.__getitem__),
                    name=inner.name,
                )
                copy.meta = dict(inner.meta)
                # The body of an equal block may be this one: each call has values of its own.
                if not isinstance(inner.target, torch._ops.HigherOrderOperator):
                    args, kwargs = fx.map_arg((copy.args, copy.kwargs), known)
                    with _fakes(node), torch.no_grad():
                        copy.meta["example_value"] = run_node(copy, args, kwargs)
        raise AssertionError(f"{name} returns nothing")

    def _traced(self, node: fx.Node, meaning: Meaning | None) -> Any:
        assert meaning is not None
        recorder = _Recorder(node, self._lengths)
        args, kwargs = fx.map_arg((node.args, node.kwargs), recorder.given)
        with _fakes(node), torch.no_grad(), enable_python_dispatcher(), recorder:
            return recorder.written(meaning(*args, **kwargs))

    def _replace(self, node: fx.Node, result: Any) -> None:
        """Let users of `node` read `result`: a node, a number or a tuple of them."""
        self._replaced[node] = None
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
            return
        for user in list(node.users):
            index = user.args[1] if user.target is operator.getitem else None
            if user.args[0] is node and isinstance(index, int):
                self._replace(user, result[index])
            else:
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs), lambda n: result if n is node else n
                )


class _Recorder(TorchFunctionMode):
    """Writes down the torch functions that are called, as Dynamo would."""

    def __init__(self, node: fx.Node, lengths: Lengths) -> None:
        super().__init__()
        self._node = node
        self._lengths = lengths
        # Tensors by identity, kept alive; an item of a tuple becomes a node when it is read.
        self._made: dict[int, tuple[Tensor, Callable[[], fx.Node]]] = {}

    def given(self, node: fx.Node) -> Any:
        """An argument's value, which will be known as that node's."""
        value = known(node)
        if isinstance(value, Tensor):
            self._made[id(value)] = value, lambda: node
        return value

    def written(self, value: Any) -> Any:
        """A value as it stands in a graph."""
        if isinstance(value, Tensor):
            return self._made[id(value)][1]()
        if isinstance(value, torch.SymInt):
            return self._lengths.full(expr(value))
        if isinstance(value, Mapping):
            return {key: self.written(x) for key, x in value.items()}
        if isinstance(value, (tuple, list)):
            return (
                type(value)(map(self.written, value))
                if type(value) in (tuple, list)
                else tuple(map(self.written, value))
            )
        return value

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        value = function(*args, **kwargs)
        items = value if isinstance(value, (tuple, list)) else [value]
        if value is None:
            raise NotImplementedError(f"{function} writes in place")
        if not any(isinstance(x, Tensor) for x in items):
            return value  # such as a size
        name = getattr(function, "__name__", "")
        if name.startswith("__"):
            function = getattr(operator, name)  # x[..], which Dynamo writes so
        method = function is getattr(Tensor, name, None)
        node = self._node.graph.create_node(
            "call_method" if method else "call_function",
            name if method else function,
            self.written(tuple(args)),
            self.written(kwargs),
        )
        node.meta = dict(self._node.meta) | {"example_value": value}
        if items is not value:
            self._made[id(value)] = value, lambda: node
            return value
        for i, x in enumerate(items):
            if isinstance(x, Tensor):
                self._made[id(x)] = x, lambda x=x, i=i: self._item(node, i, x)  # type: ignore[misc]
        return value

    def _item(self, node: fx.Node, i: int, value: Tensor) -> fx.Node:
        item = self._node.graph.call_function(operator.getitem, (node, i))
        item.meta = dict(self._node.meta) | {"example_value": value}
        self._made[id(value)] = value, lambda: item
        return item


def _fakes(node: fx.Node) -> Any:
    """The mode of a graph's example values."""
    values = (x for n in node.graph.nodes for x in tensors(n))
    return next(x.fake_mode for x in values if isinstance(x, FakeTensor))


def _body(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """The graph that a higher-order op only calls, by name, and what it calls it with."""
    if node.target is torch.ops.higher_order.tag_activation_checkpoint:
        called, *arguments = node.args
    elif node.target is torch.ops.higher_order.invoke_subgraph:
        called, _, *arguments = node.args  # the second is a name for the graph
    else:
        return None
    assert isinstance(called, fx.Node)
    return str(called.target), tuple(arguments)


def _meaning(gm: fx.GraphModule, node: fx.Node, parts: int) -> Meaning | None:
    """What a call is in terms of other ops, if it is one that is known."""
    target: Any = node.target
    if op_name(node) in _NEW:
        # Inside of a `vmap` what is made like another is mapped, too.
        return None if is_batchedtensor(known(node)) else _NEW[op_name(node)]
    if is_attention(node):
        return _causal if parts > 1 and known(attention_arguments(node).is_causal) is True else None
    if node.op != "call_function":
        return None
    if (getattr(target, "__module__", None) or "").split(".")[0] == "einops":
        return target
    if target is F.multi_head_attention_forward:
        return _multi_head if _is_plain_multi_head(node) else None
    if target is torch._transformer_encoder_layer_fwd:
        unmasked = all(x is None for x in (*node.args[18:], *node.kwargs.values()))
        return _encoder_layer if unmasked else None
    if target is torch.ops.higher_order.flex_attention:
        return _flex if _only_first_is_read(node) and _changes_no_score(gm, node) else None
    if qualified_name(target) in _FOREIGN:
        return _foreign(node)
    return None


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: Any = 0.0,
    is_causal: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Attention to earlier tokens, by a mask of where queries and keys stand."""
    queries, keys = (torch.arange(x.shape[-2], device=query.device) for x in (query, key))
    mask = torch.ge(queries.unsqueeze(1), keys)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, **kwargs)


def _new(make: Callable[..., Tensor], values: int = 0) -> Meaning:
    """`x.new_..(size, *values)` by `make`."""

    def made(x: Tensor, *args: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        args = (*args, *(kwargs.pop(k) for k in ("size", "fill_value") if k in kwargs))
        count = len(args) - values
        sizes, rest = args[:count], args[count:]
        shape = (
            tuple(sizes[0]) if sizes and not isinstance(sizes[0], (int, torch.SymInt)) else sizes
        )
        like = {"dtype": dtype or x.dtype, "device": device or x.device}
        return make(shape, *rest, **like, **kwargs)

    return made


_NEW = {
    "new_zeros": _new(torch.zeros),
    "new_ones": _new(torch.ones),
    "new_empty": _new(torch.empty),
    "new_full": _new(torch.full, values=1),
}


def _pads_one_dim(node: fx.Node) -> bool:
    """Whether this is constant padding of one dimension, which is not the last."""
    if op_name(node) != "pad":
        return False
    given = inspect.signature(_padded).bind(*node.args, **node.kwargs).arguments
    if given.get("mode", "constant") != "constant":
        return False
    sizes = [expr(known(width)) for width in given["pad"]]
    padded = {number // 2 for number, size in enumerate(sizes) if size != 0}
    return len(padded) == 1 and 0 not in padded and all(size.is_nonnegative for size in sizes)


def _padded(input: Tensor, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Tensor:
    """As `F.pad`, of one dimension."""
    x = input
    number = next(i for i, width in enumerate(pad) if width != 0) // 2
    dim = x.dim() - 1 - number

    def run(width: Any) -> list[Tensor]:
        shape = [*x.shape[:dim], width, *x.shape[dim + 1 :]]
        made = [] if width == 0 else [torch.full(shape, value or 0, dtype=x.dtype, device=x.device)]
        return made

    return torch.cat([*run(pad[2 * number]), x, *run(pad[2 * number + 1])], dim)


def _only_first_is_read(node: fx.Node) -> bool:
    """Whether only the first of a node's values is read."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _is_plain_multi_head(node: fx.Node) -> bool:
    """Whether this is attention over batched sequences of which nobody reads the weights."""
    given = _MULTI_HEAD.bind(*node.args, **node.kwargs).arguments
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    return (
        _only_first_is_read(node)
        and known(given["query"]).dim() == 3
        # One that pools a sequence into one token has nothing to split: it runs whole.
        and expr(known(given["query"]).shape[0]) != 1
        and all(given.get(name) is None for name in extra)
        and not given["add_zero_attn"]
    )


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As `F.multi_head_attention_forward`: (tokens, batch, channels) in and out."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    heads, bias = a["num_heads"], a["in_proj_bias"]
    weights: tuple[Any, ...]
    biases: tuple[Any, ...]
    if a["use_separate_proj_weight"]:
        weights = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    else:
        weights = torch.chunk(a["in_proj_weight"], 3)
    biases = (None, None, None) if bias is None else torch.chunk(bias, 3)
    query, key, value = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip((a["query"], a["key"], a["value"]), weights, biases, strict=True)
    )
    mask = _additive(a["attn_mask"], query.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    padding = _additive(a["key_padding_mask"], query.dtype)
    if padding is not None:
        padding = padding.unsqueeze(1).unsqueeze(1)
        mask = padding if mask is None else torch.add(mask, padding)
    dropout = a["dropout_p"] if a["training"] else 0.0
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    out = out.permute(2, 0, 1, 3).flatten(2)
    return F.linear(out, a["out_proj_weight"], a["out_proj_bias"]), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to scores; a bool of it says that a key is hidden."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _encoder_layer(
    x: Tensor,
    embed_dim: int,
    heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    *parameters: Any,
) -> Tensor:
    """As the fast path of `nn.TransformerEncoderLayer` without masks, x (batch, tokens, ..)."""
    w1, b1, w2, b2, up, up_bias, down, down_bias, *_ = parameters

    def attend(y: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in F.linear(y, in_weight, in_bias).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return F.linear(attended.transpose(1, 2).flatten(2), out_weight, out_bias)

    def feed(y: Tensor) -> Tensor:
        y = F.linear(y, up, up_bias)
        return F.linear(F.gelu(y) if gelu else F.relu(y), down, down_bias)

    def first(y: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), w1, b1, eps)

    def second(y: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), w2, b2, eps)

    if norm_first:
        x = torch.add(x, attend(first(x)))
        return torch.add(x, feed(second(x)))
    x = first(torch.add(x, attend(x)))
    return second(torch.add(x, feed(x)))


def _changes_no_score(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether flex attention has a score_mod that returns its argument, and no block mask."""
    score_mod, block_mask = node.args[3], node.args[4]
    assert isinstance(block_mask, tuple)
    score, mask = _graph_of(gm, score_mod), _graph_of(gm, block_mask[-1])
    hidden = mask.output_node().args[0]
    hides_nothing = isinstance(hidden, fx.Node) and op_name(hidden) == "new_ones"
    return hides_nothing and score.output_node().args[0] is next(iter(score.nodes))


def _graph_of(gm: fx.GraphModule, function: Any) -> fx.Graph:
    body = gm.get_submodule(function.target)
    assert isinstance(body, fx.GraphModule)
    return body.graph


def _made_for(node: fx.Node) -> set[fx.Node]:
    """What was made for nothing but the block mask of a flex attention.

    Where the model gives none, flex attention makes one that hides nothing, by `vmap` and in place.
    """
    made: set[fx.Node] = set()
    todo = [node]
    while todo:
        reader = todo.pop()
        read: list[fx.Node] = []
        fx.map_arg(reader.args[4] if reader is node else reader.args, read.append)
        writers = [user for user in reader.users if user.op != "output" and mutates(user)]
        new = {n for n in (*read, *writers) if n.op.startswith("call_")} - made - {node}
        made |= new
        todo += new

    def elsewhere(n: fx.Node) -> bool:
        into = n.args[0] if mutates(n) else None
        return not {*n.users} <= made | {node} or isinstance(into, fx.Node) and into not in made

    while outside := set(filter(elsewhere, made)):
        made -= outside
    mapping = [n for n in node.graph.nodes if _module(n) == "torch._functorch.predispatch"]
    alone = all(n in made for n in mapping if n.all_input_nodes)
    return made | {n for n in mapping if alone}


def _module(node: fx.Node) -> str:
    return getattr(node.target, "__module__", None) or ""


def _flex(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, None, None]:
    """As flex attention, (batch, heads, tokens, channels)."""
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=args[2], enable_gqa=gqa)
    return out, None, None


_FOREIGN = {
    "flash_attn::_flash_attn_forward",
    "_diffusers_flash_attn_3::_flash_attn_forward",
    "flash_attn.flash_attn_interface.flash_attn_func",
    "flash_attn_interface.flash_attn_func",
    "sageattention.core.sageattn",
    "xformers.ops.fmha.memory_efficient_attention",
}
"""Attention by other libraries: operators, and functions that Dynamo was told to leave closed."""

_NAMES = {
    "query": ("q", "query"),
    "key": ("k", "key"),
    "value": ("v", "value"),
    "dropout_p": ("dropout_p", "p"),
    "is_causal": ("causal", "is_causal"),
    "scale": ("softmax_scale", "sm_scale", "scale"),
}
"""What their arguments are called that mean what PyTorch's do."""

_NEUTRAL = {"window_size_left": -1, "window_size_right": -1, "window_size": (-1, -1)}
"""With these values of others nothing is hidden; else with None or 0."""

_ONLY_SPEED = {"num_splits", "pack_gqa", "deterministic", "sm_margin", "op", "kwargs"}
"""What changes how attention is computed, not what it is."""

_RETURNS_MORE = {"return_softmax", "return_lse", "return_attn_probs"}


def _foreign(node: fx.Node) -> Meaning | None:
    """What another library's attention is, where it is plain attention."""
    target: Any = node.target

    def named(*args: Any, **kwargs: Any) -> dict[str, Any]:
        operator = getattr(target, "default", target)
        if isinstance(operator, torch._ops.OpOverload):
            schema = operator._schema.arguments
            given = {x.name: x.default_value for x in schema if x.has_default_value()}
            return given | dict(zip((x.name for x in schema), args, strict=False)) | kwargs
        bound = inspect.signature(target).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    meant = {name for names in _NAMES.values() for name in names}
    given = named(*node.args, **node.kwargs)
    neutral = meant | _ONLY_SPEED | _RETURNS_MORE | {"tensor_layout"}
    others = {name: value for name, value in given.items() if name not in neutral}
    if any(value not in (None, False, 0, _NEUTRAL.get(name)) for name, value in others.items()):
        return None
    several = isinstance(known(node), (tuple, list))
    query = next(given[name] for name in _NAMES["query"] if name in given)
    if known(query).dim() != 4 or several and not _only_first_is_read(node):
        return None
    heads_first = given.get("tensor_layout") == "HND"
    key = next(given[name] for name in _NAMES["key"] if name in given)
    if any(given.get(name) not in (None, False) for name in _NAMES["is_causal"]):
        tokens = 2 if heads_first else 1
        if not known_equal(*(expr(known(x).shape[tokens]) for x in (query, key))):
            return None  # which of several queries and keys are aligned differs

    def attention(*args: Any, **kwargs: Any) -> Any:
        found = named(*args, **kwargs)
        call = {key: found[n] for key, names in _NAMES.items() for n in names if n in found}
        inputs = [call.pop(key) for key in ("query", "key", "value")]
        q, k, v = inputs if heads_first else [x.transpose(1, 2) for x in inputs]
        out = F.scaled_dot_product_attention(q, k, v, **call, enable_gqa=q.shape[1] != k.shape[1])
        out = out if heads_first else out.transpose(1, 2)
        return (out,) if several else out

    return attention
