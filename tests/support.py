"""What came of every transformer class of diffusers; `--write` writes it into docs/support.md.

python tests/support.py FluxTransformer2DModel    # of some, or all
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

EXACT = 1e-4
RANKS = (2, 3)
STEPS = 6
TIMEOUT = 300


def outcome(name: str) -> tuple[str, str]:
    """'exact', 'refused', 'fails', 'wrong' or 'not tried', and a remark.

    As `tests/test_model_zoo.py` judges: `gather`, and `rotate` of an image that stands still, are
    the untouched model's.
    """
    import torch
    from captures import captured_once
    from classes import CLASSES, build, called
    from torch.utils._pytree import tree_leaves

    import piflux
    from piflux.errors import PifluxError

    case = CLASSES[name]
    if case.untried:
        return "not tried", case.untried
    torch.set_num_threads(1)
    model = build(name)

    def samples(module: Any) -> list[torch.Tensor]:
        return [x for x in tree_leaves(called(module, case)) if isinstance(x, torch.Tensor)]

    with torch.no_grad():
        want = samples(model)
    assert all(x.std() > 0.1 for x in want)

    def distance(got: list[torch.Tensor]) -> float:
        assert [x.shape for x in got] == [x.shape for x in want]
        return max(
            ((x - y).abs().max() / y.std().clamp(min=1)).item()
            for x, y in zip(got, want, strict=True)
        )

    worst = {}
    try:
        with captured_once():
            for policy in ("gather", "rotate"):
                for ranks in RANKS:
                    parallel = piflux.parallelize(
                        model, group=piflux.virtual_ranks(ranks), policy=policy, inner="eager"
                    )
                    with piflux.generation(parallel):
                        steps = STEPS if policy == "rotate" else 1
                        errors = [distance(samples(parallel)) for _ in range(steps)]
                    worst[f"{policy} on {ranks}"] = max(errors)
                    report = piflux.explain(parallel)
                    assert sum(graph.attentions for graph in report.graphs)
                    assert not any("no steady step" in note for note in report.notes)
    except PifluxError as error:
        return "refused", str(error)
    except Exception as error:
        return "fails", f"{type(error).__name__}: {error}"
    wrong = {where: error for where, error in worst.items() if not error <= EXACT}
    if wrong:
        return "wrong", ", ".join(f"{where}: {error:.1e}" for where, error in wrong.items())
    return "exact", ""


def outcome_apart(name: str) -> tuple[str, str]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return "fails", f"no answer in {TIMEOUT} s"
    try:
        status, remark = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return "fails", done.stderr.strip().splitlines()[-1]
    return status, remark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one", action="store_true", help="here; print it as JSON")
    args = parser.parse_args()
    if args.one:
        (name,) = args.names
        print(json.dumps(outcome(name)))
        return
    from classes import CLASSES

    for name in args.names or CLASSES:
        status, remark = outcome_apart(name)
        print(f"{name:42} {status:10} {remark}", flush=True)


if __name__ == "__main__":
    main()
