"""`gather`: fresh keys and values in every step. Exact."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from piflux.parts import join
from piflux.policies.policy import Policy, TokenBytes, overlap
from piflux.policies.step import Step, StepContext


class Gather(Policy):
    """Every step is a sync step, and nothing is remembered."""

    name = "gather"
    remembers = False

    @classmethod
    def held_bytes(cls, token: TokenBytes, tokens: int, part: int, world_size: int) -> int:
        return 0

    def recording_key(self, step: Step, *, gathers: bool) -> Hashable | None:
        return ()

    def attend(
        self,
        context: StepContext,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: tuple[int, ...],
        *,
        ordered: bool,
    ) -> Sequence[Tensor]:
        packet, parts = self.arrived(context, slot), context.step.parts
        assert packet is not None, "every step sends"
        # Attention reads keys and values where they arrive, if no token is there twice.
        together = None if ordered or overlap(lengths, len(parts)) else packet.read_whole()
        whole = together or [join(pieces, parts, -2, lengths) for pieces in packet.read()]
        context.memory.give_back(packet)
        return whole
