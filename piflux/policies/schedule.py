"""A policy unrolled over steps: what a user chooses, as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from piflux.policies.masks import COMPUTED, NEEDED, SKIPPED, Compute, mask_of, read_compute

if TYPE_CHECKING:
    from piflux.memory.slots import Slot
    from piflux.policies.policy import Policy
    from piflux.policies.step import Step

# What needs torch is imported where it is asked for: a schedule is checked before torch, which
# takes seconds.

PolicyName = Literal["gather", "rotate", "displaced"]
Sync = Literal["gather", "recompute", "auto"]
Compression = Literal["none", "int8", "int4"]

# The first steps change keys and values most. A second sync step does most good at 2: it gives
# prediction two exact versions as early as they can be some way apart (docs/drift.md).
BEST_SYNC_STEPS: tuple[int, ...] = (0, 2)

# Of so few steps two are far apart, and the second changes most: there a second sync step does most
# good at 1 (docs/policies.md). 'auto' takes it in place of the default.
FEW_STEPS = 9
FEW_SYNC_STEPS = (0, 1)

# Where steps are skipped a part is computed less often, and its keys and values are older, the more
# so the more ranks there are. More sync steps make up for it (docs/skipped.md).
SKIPPING_SYNC_STEPS = (0, 2, 5)
SKIPPING_SYNC_STEPS_OF_MANY = (0, 2, 5, 10, 16)
"""Of more than two ranks."""


def is_count(value: object, least: int = 0) -> bool:
    """Whether it is an integer from `least` on; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Schedule:
    """The policy unrolled over the steps of a generation.

    Attributes:
        policy: 'gather' (every step is a sync step), 'rotate' or 'displaced'.
        sync_steps: how many first steps are sync steps, or which ones are. Step 0 always is: the
            caches start empty, and only a sync step can fill them. None, which is left as it is:
            (0, 2); where steps are skipped (0, 2, 5), on more than two ranks (0, 2, 5, 10, 16).
        refresh_every: after the last of those, one sync step every so many steps; None for never.
        world_size: the number of ranks, which is the number of parts.
        sync: how a sync step comes by every part's keys and values: 'gather' sends them,
            'recompute' has each rank compute all tokens by itself, which is cheaper where links
            are slow, 'auto' is either of them, chosen when the first graph is compiled.
        order: how attention guesses what remembered keys and values have become: 0, as they were;
            1, moved on by the change between their last two versions.
        compression: of that change, where it is remembered and where 'displaced' sends it: 'none';
            'int8', which takes 8 bits a number and a scale for each token and head; 'int4', which
            takes 4, and 8 of the last version, too.
        compute: which steps are computed, see `piflux.policies.masks`; in the others the
            prediction is continued along the last computed ones.

    Raises:
        ValueError: a field is out of range.
    """

    policy: PolicyName = "rotate"
    sync_steps: int | tuple[int, ...] | None = None
    refresh_every: int | None = None
    world_size: int = 1
    sync: Sync = "gather"
    order: int = 1
    compression: Compression = "none"
    compute: Compute = "all"

    def __post_init__(self) -> None:
        if self.policy not in get_args(PolicyName):
            choices = ", ".join(map(repr, get_args(PolicyName)))
            raise ValueError(f"unknown policy {self.policy!r}: choose one of {choices}")
        if self.sync not in get_args(Sync):
            raise ValueError(
                f"unknown sync {self.sync!r}: choose 'gather' or 'recompute', or 'auto' for either"
            )
        if self.sync == "recompute" and not self.kind.remembers:
            raise ValueError(
                f"the policy {self.policy!r} has sync steps only: recomputing them all is one "
                "rank's work on every rank. Choose another policy, or sync='gather'"
            )
        object.__setattr__(self, "compute", read_compute(self.compute))
        if not is_count(self.world_size, 1):
            raise ValueError(f"world_size must be an integer >= 1, got {self.world_size!r}")
        steps: Any = self.sync_steps
        if isinstance(steps, Sequence) and not isinstance(steps, str):
            steps = tuple(steps)
            object.__setattr__(self, "sync_steps", steps)
        named = steps if isinstance(steps, tuple) else (steps,)
        if steps is not None and not all(map(is_count, named)):
            raise ValueError(
                f"sync_steps must be an integer >= 0, or several of them, got {steps!r}"
            )
        if self.refresh_every is not None and not is_count(self.refresh_every, 1):
            raise ValueError(
                f"refresh_every must be an integer >= 1 or None, got {self.refresh_every!r}"
            )

        if not is_count(self.order) or self.order > 1:
            raise ValueError(f"order must be 0 or 1, got {self.order!r}")
        if self.compression not in get_args(Compression):
            raise ValueError(
                f"unknown compression {self.compression!r}: choose 'none', 'int8' or 'int4'"
            )
        if self.compression != "none" and self.order == 0:
            raise ValueError(
                f"compression={self.compression!r} is of the change between two versions, of "
                "which order=0 remembers one: choose order=1, or compression='none'"
            )

    @property
    def kind(self) -> type[Policy]:
        """The policy's class, which knows what needs no slots."""
        from piflux.policies.named import POLICIES

        return POLICIES[self.policy]

    @property
    def slots(self) -> type[Slot]:
        """How keys and values are remembered."""
        from piflux.memory.changes import ChangeSlot
        from piflux.memory.rounded import RoundedSlot
        from piflux.memory.slots import Slot

        if not self.compresses:
            return Slot
        return ChangeSlot if self.compression == "int8" else RoundedSlot

    def make_policy(self) -> Policy:
        """The policy, of one model on its ranks."""
        return self.kind(self.predicts, self.slots)

    @property
    def predicts(self) -> bool:
        """Whether attention reads predicted keys and values in some steps."""
        return self.order > 0 and self.kind.remembers and self.world_size > 1

    @property
    def compresses(self) -> bool:
        """Whether the change that this predicts by is compressed."""
        return self.predicts and self.compression != "none"

    @property
    def first_syncs(self) -> tuple[int, ...]:
        """The sync steps before any refresh, in order."""
        steps = sync_steps_of(self)
        return tuple(sorted({0, *(range(steps) if isinstance(steps, int) else steps)}))

    @property
    def skips(self) -> bool:
        """Whether steps may be left out."""
        return self.compute != "all" and set(str(self.compute)) != {COMPUTED}

    def step(self, index: int, turn: int | None = None) -> Step:
        """The generation's step `index`, counted from 0, as one that is computed.

        Args:
            index: the step's.
            turn: how many were computed before it, by which parts rotate; None: all were.

        Raises:
            ValueError: `index` is no number of a step.
        """
        from piflux.policies.step import Step

        if not is_count(index):
            raise ValueError(f"a step's number must be an integer >= 0, got {index!r}")

        after = index - self.first_syncs[-1]
        refresh = self.refresh_every is not None and after > 0 and after % self.refresh_every == 0
        sync = not self.kind.remembers or index in self.first_syncs or refresh
        parts = self.kind.parts(index if turn is None else turn, self.world_size)
        return Step(index, sync, parts)

    def steps(self, count: int) -> list[Step]:
        """Those of an image of so many steps."""
        unrolled = Unrolled(self, mask_of(self.compute, count) or "")
        return [unrolled.next(skip=unrolled.may_skip) for _ in range(count)]


def sync_steps_of(schedule: Schedule, steps: int | None = None) -> int | tuple[int, ...]:
    """The sync steps that were asked for; else the default.

    Args:
        schedule: whose.
        steps: of an image, whose number may say which ones are best; None: as of many.
    """
    if schedule.sync_steps is not None:
        return schedule.sync_steps
    if schedule.skips:
        return SKIPPING_SYNC_STEPS_OF_MANY if schedule.world_size > 2 else SKIPPING_SYNC_STEPS
    return FEW_SYNC_STEPS if steps is not None and steps <= FEW_STEPS else BEST_SYNC_STEPS


class Unrolled:
    """The steps of one stream, one after the other.

    Args:
        schedule: of the image.
        mask: which of the image's steps are computed; what comes after it is.
        begins: at which step of the mask the stream begins.
    """

    def __init__(self, schedule: Schedule, mask: str = "", begins: int = 0) -> None:
        self.mask = mask
        self._schedule = schedule
        self._begins = begins
        self._index = self._turn = 0
        self._due = False

    @property
    def may_skip(self) -> bool:
        """Whether the next step is to be left out."""
        at = self._begins + self._index
        return self._index >= NEEDED and self.mask[at : at + 1] == SKIPPED

    def next(self, *, skip: bool) -> Step:
        """The next step, which is left out or computed.

        A rank's part stays until it is computed, and so does what a step was to gather: where a
        sync step is left out, the next one that is computed is one.
        """
        step = self._schedule.step(self._index, self._turn)
        self._index += 1
        if skip:
            self._due |= step.sync
            return replace(step, computed=False)
        step = replace(step, sync=step.sync or self._due)
        self._turn, self._due = self._turn + 1, False
        return step


SETTINGS = (
    "policy",
    "sync_steps",
    "refresh_every",
    "sync",
    "order",
    "compression",
    "compute",
)
"""What a schedule's file may hold."""


CHOSEN = ("policy", "sync_steps", "sync", "compression")
"""Those that 'auto' and a limit of memory may take in place of others."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """A schedule's settings from a file that `piflux quality --tune` or an editor wrote.

    Raises:
        ValueError: there is no such file, or it holds no settings.
    """
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"policy {str(path)!r}: not a file of settings: {why}") from None
    if not (isinstance(settings, dict) and {"policy"} <= settings.keys() <= set(SETTINGS)):
        raise ValueError(
            f"policy {str(path)!r}: a file of settings is a JSON object of {', '.join(SETTINGS)}; "
            "only policy has to be there"
        )
    return settings
