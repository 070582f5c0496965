"""Products of the time, computed for all steps of an image at once where their times are known.

A pipeline's scheduler knows the times of all steps when the first begins, and `piflux.generation`
can be told. Which step a call is, is then looked up by its time, on the device, so that steps may
come in any order and the host waits for nothing. That every time was found is asked when the image
ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from piflux.policies.step import current, is_under_way

# Rows of a table; FLUX's are 2 MB each. Above this many steps no table is built; each step computes
# its own.
MOST_STEPS = 256
# Rows begin where inductor's kernels may read 16 bytes at once.
ALIGNMENT = 64


class Hoisted:
    """The module that `hoist` made of a graph's products of the time.

    Args:
        module: computes them for one step, or of a clock that shows all steps' times, (steps, ...),
            for these: each (steps, ...).
        clocks: positions of its arguments that are clocks.
    """

    def __init__(self, module: Callable[..., Sequence[Tensor]], clocks: Sequence[int]) -> None:
        self._module = module
        self._clocks = clocks

    def __call__(self, *args: Any) -> Sequence[Tensor]:
        """What the module returns; in the calls of a stream at the same addresses each time."""
        if not is_under_way():
            return self._module(*args)  # on one rank, in an image of which nothing is foreseen
        context = current()
        if self not in context.tables:
            context.tables[self] = self._table(args)
        table = context.tables[self]
        if table is None:
            products = self._module(*args)
            held = context.memory.kept(self, lambda: Packed(products))
            held.write(products)
        else:
            held = context.memory.kept(self, lambda: Packed(table.products()))
            table.read([args[i] for i in self._clocks], held)
        return held.views

    def _table(self, args: Sequence[Any]) -> Table | None:
        """The products of all steps; None if their times are not known, or this one's is not."""
        foreseen = current().foreseen
        clocks = [args[i] for i in self._clocks]
        forms = [
            (number, times)
            for number, clock in enumerate(clocks)
            if foreseen is not None and clock.is_floating_point()
            for times in foreseen(clock)
            if times.dim() == 1 and 0 < len(times) <= MOST_STEPS
        ]
        if not forms:
            return None
        met = torch.stack([_equal(form, clocks[i]).any() for i, form in forms]).tolist()
        found = [x for x, meets in zip(forms, met, strict=True) if meets]
        if len({number for number, _ in found}) != 1:
            return None  # no clock tells the time, or which one does is in doubt
        number, every = found[0]

        shape = clocks[number].shape
        of_all = list(args)
        of_all[self._clocks[number]] = every.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
        return Table(every, number, clocks, self._module(*of_all))


class Packed:
    """Tensors side by side in one buffer for each dtype.

    Args:
        like: what they are like.

    Attributes:
        buffers: by dtype, (elements,).
        views: the tensors.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.buffers = {
            dtype: torch.cat([_padded(x.reshape(1, -1)) for x in like if x.dtype == dtype], 1)[0]
            for dtype in dict.fromkeys(x.dtype for x in like)
        }
        at = dict.fromkeys(self.buffers, 0)
        self.views = []
        for x in like:
            self.views.append(self.buffers[x.dtype].narrow(0, at[x.dtype], x.numel()).view(x.shape))
            at[x.dtype] += x.numel() + -x.numel() % ALIGNMENT

    def write(self, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.views, list(tensors))


class Table:
    """The products of all steps of one stream.

    Args:
        times: (steps,): each one's time.
        number: which clock tells it.
        clocks: all of them, as they are at the first step; the others are to stand still.
        rows: the products, each (steps, ...).

    Attributes:
        complete: whether every row that was read was there, a scalar on the device.
    """

    def __init__(
        self, times: Tensor, number: int, clocks: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> None:
        self._times = times
        self._number = number
        self._clocks = [x.clone() for x in clocks]
        self._first = [x[0] for x in rows]
        steps = len(times)
        self._rows = {
            dtype: torch.cat([_padded(x.reshape(steps, -1)) for x in rows if x.dtype == dtype], 1)
            for dtype in dict.fromkeys(x.dtype for x in rows)
        }
        self.complete = torch.ones((), dtype=torch.bool, device=times.device)

    def products(self) -> Sequence[Tensor]:
        """Those of one step."""
        return self._first

    def read(self, clocks: Sequence[Tensor], into: Packed) -> None:
        """Those of the step that the clocks show."""
        here = _equal(self._times, clocks[self._number])
        self.complete &= here.any()
        for i, (now, then) in enumerate(zip(clocks, self._clocks, strict=True)):
            if i != self._number:
                self.complete &= (now == then).all()
        index = here.to(torch.int8).argmax(dim=0, keepdim=True)
        for dtype, rows in self._rows.items():
            into.buffers[dtype].copy_(rows.index_select(0, index)[0])


def _equal(times: Tensor, clock: Tensor) -> Tensor:
    """(steps,) of bool: whether all of a clock shows each time."""
    return (times[:, None] == clock.reshape(1, -1)).all(dim=1)


def _padded(x: Tensor) -> Tensor:
    """(rows, elements), with zeros up to a multiple of ALIGNMENT elements."""
    missing = -x.shape[1] % ALIGNMENT
    return F.pad(x, (0, missing)) if missing else x
