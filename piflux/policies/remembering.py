"""What `rotate` and `displaced` have in common: sync steps fill what other steps read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from piflux.memory.ages import Ages
from piflux.memory.slots import Slot
from piflux.parts import join
from piflux.policies.policy import Policy
from piflux.policies.step import StepContext


class Remembering(Policy):
    """A policy with cache slots."""

    @abstractmethod
    def steady(
        self, context: StepContext, slot: Slot, fresh: Sequence[Tensor], lengths: tuple[int, ...]
    ) -> Sequence[Tensor]:
        """`attend`, in a step that isn't sync."""

    def attend(
        self,
        context: StepContext,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: tuple[int, ...],
        *,
        ordered: bool,
    ) -> Sequence[Tensor]:
        if context.step.sync:
            return self._fill(context, slot, fresh, lengths)
        return self.steady(context, context.memory.slots[context.rank, slot], fresh, lengths)

    def _fill(
        self, context: StepContext, slot: int, fresh: Sequence[Tensor], lengths: tuple[int, ...]
    ) -> Sequence[Tensor]:
        """A sync step's keys and values go into the slot; returns them."""
        step, memory = context.step, context.memory
        packet = self.arrived(context, slot)

        def ages() -> Ages:
            made = Ages(lengths, context.now.to(fresh[0].device))
            made.advance(context.now, first=True, sync=True, own=None)
            return made

        def write(first: list[Tensor]) -> None:
            if packet is None:
                for whole, x in zip(first, fresh, strict=True):
                    whole.copy_(x)
            else:
                for whole, pieces in zip(first, packet.read(), strict=True):
                    join(pieces, step.parts, -2, lengths, whole)
                memory.give_back(packet)

        known = memory.ages(context.rank, lengths, ages) if self.predicts else None
        kept = memory.slot(context.rank, slot, fresh, sum(lengths), self.slots, known)
        return kept.replace(
            write,
            lengths,
            step.parts,
            first=step.index == 0,
            alike=not self.rotates,
            recorder=context.recorder,
        )
