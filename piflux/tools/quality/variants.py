"""Settings of `parallelize` in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from piflux.policies.masks import COMPUTED
from piflux.policies.schedule import SETTINGS, Schedule
from piflux.tools.options import setting

CANDIDATES = tuple(
    f"{policy} sync_steps={steps}"
    for policy in ("rotate", "displaced", "displaced compression=int8")
    for steps in ("1", "0,2", "0,3", "0,2,5", "3", "0,1,3,7", "6")
)
"""What tuning chooses from."""

SMALLER = (
    *(
        f"{policy} sync_steps={steps}"
        for policy in (
            "rotate compression=int8",
            "rotate compression=int4",
            "displaced compression=int4",
        )
        for steps in ("0,2", "0,2,5")
    ),
    "gather",
)
"""And beside that, where memory is bounded. Other sync steps are looked for from there."""


@dataclass(frozen=True)
class Variant:
    """Settings of `parallelize` by the words that name them: 'rotate sync_steps=0,2 order=0'."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """A policy, then `setting=value`; several values are separated by commas.

        Raises:
            ValueError: an unknown policy or setting, or a value out of range.
        """
        policy, *words = text.split() or [""]
        options: dict[str, Any] = {"policy": policy}
        known = set(SETTINGS) - {"policy"}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in known:
                raise ValueError(
                    f"{text!r}: {word!r} is no setting; write setting=value with one of "
                    f"{', '.join(sorted(known))}"
                )
            options[name] = setting(value)
        try:
            Schedule(**options)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        return cls(" ".join([policy, *words]), options)

    @classmethod
    def of(cls, **options: Any) -> Variant:
        """Of settings that are known to be in range."""
        words = [
            f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in options.items()
            if name != "policy"
        ]
        return cls(" ".join([options["policy"], *words]), options)

    def computing(self, mask: str) -> Variant:
        """The same, but for the steps that are computed."""
        others = {name: value for name, value in self.options.items() if name != "compute"}
        whole = set(mask) == {COMPUTED}
        return Variant.of(**others) if whole else Variant.of(**others, compute=mask)

    def syncing(self, steps: Iterable[int]) -> Variant:
        """The same, but for the sync steps."""
        return Variant.of(**self.options | {"sync_steps": tuple(sorted(steps))})
