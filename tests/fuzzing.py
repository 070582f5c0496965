"""Requests that the server's own schema describes, and such as it does not, drawn at random.

python tests/fuzzing.py 2000
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks
from servers import served

from piflux.serving import Limits, build_app

CHECKS = (
    checks.not_a_server_error,
    checks.response_schema_conformance,
    checks.content_type_conformance,
    checks.status_code_conformance,
)


def fuzz(examples: int) -> int:
    """Send each operation so many requests of each kind, as its schema has them and as it has not.

    Returns:
        How many there were.
    """
    sent = 0
    limits = Limits(steps=8, side=256, pixels=128 * 128)
    with served(build_app(FakeEngine(), limits=limits)) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for operation in schema.get_all_operations():
            for mode in GenerationMode:
                cases = operation.ok().as_strategy(generation_mode=mode)

                @settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                )
                @given(cases)
                def try_one(case: Any) -> None:
                    nonlocal sent
                    sent += 1
                    case.call_and_validate(checks=CHECKS)

                # What takes nothing can't be asked otherwise than its schema has it.
                with contextlib.suppress(Unsatisfiable):
                    try_one()
    return sent


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1])))
