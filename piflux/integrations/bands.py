"""A picture's decoding split over ranks: each decodes one band of its rows.

Past a diffusion transformer an autoencoder's decoder makes pixels of latents: convolutions, group
norms, one attention in its middle. Nothing of it is remembered from step to step, so it is split
exactly: a convolution fetches the rows next to its band from the neighbours, a group norm takes
mean and variance over all bands, attention gathers keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from piflux.graph.nodes import is_pointwise
from piflux.ranks.protocol import Ranks

# Beside pointwise ops: what keeps rows, or tokens in the order of rows, where they are.
_KEEPS_ROWS = {
    "__get__", "size", "dim", "numel", "element_size", "is_floating_point", "linear", "view",
    "reshape", "transpose", "contiguous", "to", "float",
}  # fmt: skip


class MixesRows(Exception):
    """An op of the decoder may mix rows in a way that bands don't know of."""


class Bands(TorchFunctionMode):
    """Within it the decoder's tensors are one band of rows, and its ops see the others' where due.

    Every rank decodes its own band at the same time; an unknown op raises on all of them alike.

    Args:
        ranks: who decodes.
        height: rows of the latents, at least one for each rank.

    Raises:
        MixesRows: by an op within, if it isn't known to keep rows apart.
    """

    def __init__(self, ranks: Ranks, height: int) -> None:
        super().__init__()
        self.ranks = ranks
        ends = [height * rank // ranks.size for rank in range(ranks.size + 1)]
        self.start, self.rows = ends[ranks.rank], [b - a for a, b in pairwise(ends)]

    def cut(self, latents: Tensor) -> Tensor:
        """This rank's band of (batch, channels, height, width)."""
        return latents.narrow(-2, self.start, self.rows[self.ranks.rank])

    def join(self, band: Tensor, dim: int = -2) -> Tensor:
        """All bands, of which each latent row has become as many rows as every other."""
        growth = self._growth(band, dim)
        longest = max(self.rows) * growth
        padding = [0, 0] * (-dim - 1) + [0, longest - band.shape[dim]]
        pieces = self.ranks.gather(F.pad(band, padding)).start().wait()
        lengths = [rows * growth for rows in self.rows]
        return torch.cat([x.narrow(dim, 0, n) for x, n in zip(pieces, lengths, strict=True)], dim)

    def _growth(self, band: Tensor, dim: int) -> int:
        """How many rows, or tokens, a latent row has become."""
        return band.shape[dim] // self.rows[self.ranks.rank]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        known: dict[str, Callable[..., Any]] = {
            "conv2d": self._conv2d,
            "dropout": self._dropout,
            "group_norm": self._group_norm,
            "interpolate": self._interpolate,
            "scaled_dot_product_attention": self._attention,
        }
        if name not in known and name not in _KEEPS_ROWS and not is_pointwise(name):
            raise MixesRows(name)
        return known.get(name, func)(*args, **kwargs or {})

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        stride, dilation = _pair(stride), _pair(dilation)
        halo, reach = _pair(padding)[0], weight.shape[-2] - 1
        if isinstance(padding, str) or stride[0] != 1 or dilation[0] != 1 or 2 * halo != reach:
            raise MixesRows("conv2d")
        if halo:
            if min(self.rows) * self._growth(input, -2) < halo:
                raise MixesRows("conv2d")
            input = self._with_neighbours(input, halo)
        across = (0, _pair(padding)[1])
        return F.conv2d(input, weight, bias, stride, across, dilation, groups)

    def _with_neighbours(self, band: Tensor, halo: int) -> Tensor:
        """The band between the last rows of the one above and the first rows of the one below."""
        first, last = band[..., :halo, :], band[..., -halo:, :]
        edges = self.ranks.gather(torch.cat([first, last], -2)).start().wait()
        nothing, rank = torch.zeros_like(first), self.ranks.rank
        above = edges[rank - 1][..., halo:, :] if rank > 0 else nothing
        below = edges[rank + 1][..., :halo, :] if rank + 1 < self.ranks.size else nothing
        return torch.cat([above, band, below], -2)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """In float32 at least. Means of bands join as Chan, Golub and LeVeque (1979) have it."""
        batch, channels = input.shape[:2]
        accurate = torch.promote_types(input.dtype, torch.float32)
        x = input.to(accurate).reshape(batch, num_groups, -1)
        moments = torch.stack(torch.var_mean(x, -1, correction=0))
        variances, means = torch.stack(list(self.ranks.gather(moments).start().wait()), 1)
        shares = torch.tensor(self.rows, dtype=x.dtype, device=x.device) / sum(self.rows)
        shares = shares[:, None, None]  # (ranks, batch, groups)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean) ** 2)).sum(0)
        scale, shift = torch.rsqrt(variance + eps), -mean * torch.rsqrt(variance + eps)
        # From a group to each of its channels.
        scale, shift = (t.repeat_interleave(channels // num_groups, 1) for t in (scale, shift))
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        each = (batch, channels, *[1] * (input.dim() - 2))
        return torch.addcmul(shift.view(each), input, scale.view(each)).to(input.dtype)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if training and p:
            raise MixesRows("dropout")  # random numbers differ between a band and the whole
        return input

    def _interpolate(
        self,
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # An odd factor or a mode between pixels would read over the edge.
        whole = isinstance(scale_factor, (int, float)) and scale_factor == int(scale_factor)
        if size is not None or mode != "nearest" or not whole:
            raise MixesRows("interpolate")
        return F.interpolate(input, size, scale_factor, mode, *args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p:
            raise MixesRows("scaled_dot_product_attention")
        return F.scaled_dot_product_attention(query, self.join(key), self.join(value), **kwargs)


def _pair(x: Any) -> tuple[Any, Any]:
    """PyTorch's ints for both of two dimensions."""
    return (x, x) if isinstance(x, (int, str)) else tuple(x)
