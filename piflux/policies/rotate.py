"""`rotate`: each rank computes another part at each step, and no keys or values are sent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from piflux.memory.slots import Slot
from piflux.policies.remembering import Remembering
from piflux.policies.step import Step, StepContext


class Rotate(Remembering):
    """Rank r computes part (r + t) mod N at step t, and attends to its own cache, which it updates
    in place. Every remembered part is at most N - 1 steps old.
    """

    name = "rotate"
    sends = False
    rotates = True

    def recording_key(self, step: Step, *, gathers: bool) -> Hashable | None:
        if not step.sync:
            return ()
        # The parts that arrive are put together in another order.
        return (step.index == 0, step.parts) if gathers else None

    def steady(
        self, context: StepContext, slot: Slot, fresh: Sequence[Tensor], lengths: tuple[int, ...]
    ) -> Sequence[Tensor]:
        return slot.read(context.places(lengths, fresh[0].device), fresh, keep=True)
