"""What a policy decides: one class, which each policy refines in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from piflux.memory.slots import Recorder, Slot, at_once
from piflux.policies.step import Step, StepContext
from piflux.ranks.packet import Packet


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of the keys and values of one token in one attention.

    Attributes:
        version: as the model computes them, which is what sync steps send.
        held: what is remembered of it; see `Slot.held_bytes`.
        sent: what a step that isn't sync sends; see `Slot.sent_bytes`.
    """

    version: int
    held: int
    sent: int


class Policy(ABC):
    """Where attention gets the other parts' keys and values.

    Args:
        predicts: whether remembered keys and values are moved on to the step's time.
        slots: how they are remembered, which is also how they are sent.

    Attributes:
        name: as users write it.
        remembers: whether there are steps in which attention reads remembered keys and values.
        sends: whether keys and values are sent in steps that aren't sync.
        rotates: whether a rank computes another part in each step.
    """

    name: ClassVar[str]
    remembers: ClassVar[bool] = True
    sends: ClassVar[bool] = True
    rotates: ClassVar[bool] = False

    def __init__(self, predicts: bool, slots: type[Slot]) -> None:
        self.predicts = predicts
        self.slots = slots

    @classmethod
    def parts(cls, index: int, world_size: int) -> tuple[int, ...]:
        """The part that each rank computes in step `index`."""
        turn = index if cls.rotates else 0
        return tuple((rank + turn) % world_size for rank in range(world_size))

    @classmethod
    def step_s(cls, local_s: float, sent_s: float) -> float:
        """Seconds of a step that isn't sync, of those that it computes and those that it sends."""
        return local_s + sent_s

    @classmethod
    def held_bytes(cls, token: TokenBytes, tokens: int, part: int, world_size: int) -> int:
        """What a rank remembers of one attention between steps.

        Args:
            token: bytes of a token.
            tokens: of the whole sequence.
            part: tokens of a part.
            world_size: the number of parts.
        """
        return token.held * tokens

    @classmethod
    def sent_bytes(cls, token: TokenBytes, part: int, world_size: int) -> int:
        """What a rank sends of one attention in a step that isn't sync; as for `held_bytes`."""
        return token.sent * part * (world_size - 1) if cls.sends else 0

    @abstractmethod
    def recording_key(self, step: Step, *, gathers: bool) -> Hashable | None:
        """What Python decides by in a step: one recording serves all steps of one key.

        Args:
            step: which.
            gathers: whether sync steps gather, and don't compute all tokens on every rank.

        Returns:
            None if the step can't be recorded.
        """

    def send(self, context: StepContext, slot: int, fresh: Sequence[Tensor]) -> None:
        """Start what `attend` takes up: a sync step's keys and values, which others await.

        Args: as for `attend`.
        """
        if context.step.sync:
            packet = context.memory.packet(context.ranks, fresh)
            packet.write(fresh)
            _recorder(context, packet)(packet.start)
            context.sent[slot] = packet

    @abstractmethod
    def attend(
        self,
        context: StepContext,
        slot: int,
        fresh: Sequence[Tensor],
        lengths: tuple[int, ...],
        *,
        ordered: bool,
    ) -> Sequence[Tensor]:
        """Returns the whole sequence's keys and values.

        This rank supplies its part; the policy decides whether the rest is gathered or remembered.

        Args:
            context: of the step.
            slot: which attention.
            fresh: keys and values of this rank's part, each (batch, heads, part tokens, head dim);
                of all tokens, where `send` was not called in a sync step.
            lengths: the full length of each segment.
            ordered: whether it matters in which order tokens come.

        Returns:
            Each (batch, heads, all tokens, head dim), until the next `send`.
        """

    @staticmethod
    def arrived(context: StepContext, slot: int) -> Packet | None:
        """What `send` sent, once all of it is there; None if nothing was. To be given back.

        Weights that are due go from here on: attention waits for keys and values, which they would
        hold up.
        """
        packet = context.sent.pop(slot, None)
        if packet is not None:
            _recorder(context, packet)(packet.wait)
        if context.weights is not None:
            context.weights.start(context.recorder)
        return packet


def overlap(lengths: Sequence[int], world_size: int) -> bool:
    """Whether two parts have a token in common."""
    return any(length % world_size for length in lengths)


def _recorder(context: StepContext, packet: Packet) -> Recorder:
    """How a packet is sent, or waited for, where both happen in one step."""
    return at_once if packet.recordable else context.recorder
