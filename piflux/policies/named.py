"""All policies, by the names that users write."""

from __future__ import annotations

from piflux.policies.displaced import Displaced
from piflux.policies.gather import Gather
from piflux.policies.policy import Policy
from piflux.policies.rotate import Rotate

POLICIES: dict[str, type[Policy]] = {kind.name: kind for kind in (Gather, Rotate, Displaced)}
