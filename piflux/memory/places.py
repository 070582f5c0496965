"""Where the tokens of the part at hand stand, as tables that steps read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from piflux.parts import part_index


class Places:
    """Where the tokens of the part at hand stand, in tensors that are written over at each turn.

    So the part is data: a recorded step (`piflux.recording`) serves every part.

    Args:
        lengths: of the segments whose tokens these are.
        world_size: the number of parts.
        part: the part at hand.
        device: where the tables are.

    Attributes:
        index: (part tokens,) in int64: the place of each in the whole.
        sources: (all tokens,) in int32: where in the part a token stands; -1 if it is of another.
    """

    def __init__(
        self, lengths: Sequence[int], world_size: int, part: int, device: torch.device
    ) -> None:
        every = torch.stack([part_index(lengths, world_size, p) for p in range(world_size)])
        sources = torch.full((world_size, sum(lengths)), -1, dtype=torch.int32)
        sources.scatter_(1, every, torch.arange(every.shape[1], dtype=torch.int32).expand_as(every))
        self._every = every.to(device)
        self._sources = sources.to(device)
        self.index = self._every[part].clone()
        self.sources = self._sources[part].clone()

    def turn(self, part: int) -> None:
        """Now `part` is at hand."""
        self.index.copy_(self._every[part])
        self.sources.copy_(self._sources[part])
