"""The ops that passes put into graphs, with their fakes.

Shapes: a token dimension of segments `lengths` (L1, L2, ...) is L1 + L2 + ... long as a whole and
ceil(L1 / N) + ceil(L2 / N) + ... long as a part, N being `world_size`. The ops find the step that
is under way by themselves, so that a model's graph is the same as that of every model like it;
outside of a call of a model they raise RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.parts import join, part_length
from piflux.policies.step import current


@torch.library.custom_op(
    "piflux::shard",
    mutates_args=(),
    schema="(Tensor x, int dim, SymInt[] lengths, int world_size) -> Tensor",
)
def shard(x: Tensor, dim: int, lengths: Sequence[int], world_size: int) -> Tensor:
    """This rank's part of `x` at this step: (.., sum(lengths), ..) -> (.., part tokens, ..)."""
    return x.index_select(dim, current().places(lengths, x.device).index)


@shard.register_fake
def _(x: Tensor, dim: int, lengths: Sequence[int], world_size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(part_length(length, world_size) for length in lengths)
    return x.new_empty(shape)


@torch.library.custom_op(
    "piflux::unshard",
    mutates_args=(),
    schema="(Tensor x, int dim, SymInt[] lengths, int world_size) -> Tensor",
)
def unshard(x: Tensor, dim: int, lengths: Sequence[int], world_size: int) -> Tensor:
    """The whole from the ranks' parts: (.., part tokens, ..) -> (.., sum(lengths), ..)."""
    context = current()
    pieces = context.ranks.gather(x, context.header).start().wait()
    return join(pieces, context.step.parts, dim, lengths)


@unshard.register_fake
def _(x: Tensor, dim: int, lengths: Sequence[int], world_size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(lengths)
    return x.new_empty(shape)


@torch.library.custom_op(
    "piflux::send_kv",
    mutates_args=(),
    schema="(Tensor key, Tensor value, int slot, int world_size) -> Tensor",
)
def send_kv(key: Tensor, value: Tensor, slot: int, world_size: int) -> Tensor:
    """Start to send this rank's keys and values, where `cached_sdpa` awaits those of all ranks.

    Args: as for `cached_sdpa`.

    Returns:
        (1,) of uint8: a token without content, for `cached_sdpa` to depend on.
    """
    _send(slot, (key, value), world_size)
    return key.new_empty(1, dtype=torch.uint8)


@send_kv.register_fake
def _(key: Tensor, value: Tensor, slot: int, world_size: int) -> Tensor:
    return key.new_empty(1, dtype=torch.uint8)


@torch.library.custom_op(
    "piflux::cached_sdpa",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float? scale, "
        "bool enable_gqa, SymInt[] lengths, int slot, int world_size, "
        "Tensor? sent=None) -> Tensor"
    ),
)
def cached_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    lengths: Sequence[int],
    slot: int,
    world_size: int,
    sent: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries to the whole sequence's keys and values.

    Args:
        query: (batch, heads, part tokens, head dim).
        key: (batch, heads, part tokens, head dim); the whole is gathered or remembered.
        value: like `key`.
        attn_mask: broadcastable to (batch, heads, part tokens, all tokens), or None.
        scale: as in `scaled_dot_product_attention`.
        enable_gqa: likewise.
        lengths: full length of each segment of the keys' sequence.
        slot: which cache slot of the memory this attention owns, from `slots_from` on.
        world_size: into how many parts the graph was cut; 1 if `key` is of all tokens.
        sent: the token of the `send_kv` that sent `key` and `value`; None to send them here.

    Returns:
        (batch, heads, part tokens, value head dim).
    """
    if sent is None:
        _send(slot, (key, value), world_size)
    context = current()
    # Attention adds up its keys in any order, but a mask says where each stands.
    key, value = context.policy.attend(
        context,
        context.first_slot + slot,
        (key, value),
        tuple(lengths),
        ordered=attn_mask is not None,
    )
    if enable_gqa and attn_mask is not None:
        # Most kernels that take a mask know nothing of groups, and what would run in their place
        # holds all scores at once.
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        enable_gqa = False
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
    )
    return _tokens_before_heads(out)


@cached_sdpa.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    lengths: Sequence[int],
    slot: int,
    world_size: int,
    sent: Tensor | None = None,
) -> Tensor:
    return _tokens_before_heads(query.new_empty((*query.shape[:-1], value.shape[-1])))


def _tokens_before_heads(x: Tensor) -> Tensor:
    """The memory layout that attention kernels write and the next projection reads without a copy.

    Which kernel runs decides the layout of its output, so a fake that promises one needs this.
    """
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def _send(slot: int, fresh: Sequence[Tensor], world_size: int) -> None:
    context = current()
    if world_size > 1:  # else it is of all tokens, and nobody waits for it
        context.policy.send(context, context.first_slot + slot, fresh)


def slots_from(first: int) -> None:
    """From here on attentions number their cache slots from `first`.

    Attentions of repeated blocks are one piece of code, in which the slot is the block's first one
    and up; a call of the piece is preceded by this.
    """
    current().first_slot = first


def fetch(group: int | None, following: int | None) -> None:
    """From here on the weights of a group are there; those of the following one are on their way.

    Each rank holds a share of a group's weights; they are gathered while the group before it
    computes. In a sync step keys and values go first, since attention waits for them. A group of
    which nothing is under way is gathered now.

    Args:
        group: the number of a group of the program's weights; None to start the following one.
        following: likewise; None where there is none.
    """
    context = current()
    assert context.weights is not None, "a program that fetches weights says where they are"
    if group is not None:
        context.weights.wait(group, context.recorder)
    if following is not None:
        context.weights.expect(following)
        if not context.step.sync:
            context.weights.start(context.recorder)
