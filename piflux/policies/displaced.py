"""`displaced`: keys and values travel while the step computes, for the next one to read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from piflux.memory.slots import Slot
from piflux.policies.policy import TokenBytes
from piflux.policies.remembering import Remembering
from piflux.policies.step import Step, StepContext


class Displaced(Remembering):
    """Rank r keeps part r, and attends to what the others had one step ago."""

    name = "displaced"

    @classmethod
    def step_s(cls, local_s: float, sent_s: float) -> float:
        return max(local_s, sent_s)

    @classmethod
    def held_bytes(cls, token: TokenBytes, tokens: int, part: int, world_size: int) -> int:
        under_way = token.sent * part * (world_size + 1)  # what it sent, and what is arriving
        return super().held_bytes(token, tokens, part, world_size) + under_way

    def recording_key(self, step: Step, *, gathers: bool) -> Hashable | None:
        if not step.sync:
            return ()
        return (step.index == 0,) if gathers else None

    def steady(
        self, context: StepContext, slot: Slot, fresh: Sequence[Tensor], lengths: tuple[int, ...]
    ) -> Sequence[Tensor]:
        places = context.places(lengths, fresh[0].device)
        # Each rank keeps its part, so parts are now as they were when the last was sent.
        slot.land(lengths, context.step.parts, context.recorder)
        context.post(slot.pack(context.ranks, places.index, fresh))
        # What is predicted by is kept as it arrives, the rank's own part like the others'.
        return slot.read(places, fresh, keep=False)
