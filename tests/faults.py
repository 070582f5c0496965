"""Faults put into real ranks, one at a time: what comes of the image, and of the next one?

    python tests/faults.py --count 100 --seed 0 --table faults.md

Each fault is one of KINDS, at some moment of an image, under some policy, on two or three gloo
ranks. All ranks draw an image, one with the fault, and another one. The same seed gives the same
faults. A table says by kinds how many were tried, how many hung, how many gave a wrong image
without a word, an error that is none of piflux's, or an end of a process that was not asked for;
how many images were right all the same, and how many of the next ones.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from unittest import mock

import torch
from captures import captured_once
from models import flux_inputs, tiny_flux
from ranks import Failure, Pool, RanksFailed

import piflux
from piflux.compile import compiler
from piflux.compile.program import make_program
from piflux.cost import remembered
from piflux.cost.rates import slowest_rates
from piflux.errors import PifluxError
from piflux.ranks.links import Link

STEPS = 5
TIMEOUT_S = 6
AWAY_S = 6
"""A rank that is stopped comes back after so long: longer than others wait for it."""

LIMIT_S = 240
"""What takes longer hangs."""

LOST = ("killed", "ended", "stopped")
RAISES = ("raises", "interrupted", "out of memory")
DIFFERS = ("noise", "scale", "prompt", "clock", "guidance", "weights", "skips", "repeats", "leaves")
HARMLESS = ("slow", "same nan", "same infinity")
KINDS = (*LOST, *RAISES, *DIFFERS, *HARMLESS)
POLICIES = ("gather", "rotate", "displaced")
MEASURING, COMPILING = -1, -2
"""Steps of what happens at the first call: while `policy="auto"` measures, and once the program has
been made."""

AT_FIRST = 0.2
"""The share of such faults among those that can happen there."""


@dataclass(frozen=True)
class Fault:
    """What rank `rank` does where its step `step` begins, or at gather `inside` of that step.

    It is a step of the second image; what happens at the first call is of the first one.
    """

    kind: str
    policy: str
    size: int
    rank: int
    step: int
    inside: int | None

    def __str__(self) -> str:
        firsts = {MEASURING: "the measurement", COMPILING: "the compilation"}
        at = firsts.get(self.step, f"step {self.step}")
        at += "" if self.inside is None else f", gather {self.inside}"
        return f"rank {self.rank} of {self.size}, {self.policy}: {self.kind} in {at}"

    @property
    def image(self) -> int:
        """The number of the image that it is in."""
        return 0 if self.step < 0 else 1

    @property
    def taken(self) -> str:
        """The policy that images are drawn under."""
        return "gather" if self.policy == "auto" else self.policy


def faults(seed: int, kinds=KINDS, at_first=AT_FIRST):
    """For ever."""
    chosen, moments = random.Random(seed), random.Random(f"moments {seed}")
    for kind in (k for _ in count() for k in kinds):
        size = chosen.choice((2, 2, 3))
        inside = chosen.choice((None, chosen.randrange(3)))
        happens = kind in (*LOST, *RAISES, "slow")
        fault = Fault(
            kind,
            chosen.choice(POLICIES),
            size,
            chosen.randrange(size),
            chosen.randrange(STEPS),
            inside if happens else None,
        )
        if happens and moments.random() < at_first:
            step = moments.choice((MEASURING, COMPILING))
            inside = fault.inside if step == MEASURING else None
            fault = replace(fault, policy="auto", step=step, inside=inside)
        yield fault


# --- in a rank ----------------------------------------------------------------------------------


class Injected(Exception):
    """Raised by a rank."""


def happen(kind: str) -> None:
    """Of what ends, stops or raises."""
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "ended":
        os._exit(3)
    if kind == "stopped":
        back = f"sleep {AWAY_S}; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", back], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "raises":
        raise Injected("as asked")
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind == "out of memory":
        raise torch.OutOfMemoryError("there was too little, as asked")
    if kind == "slow":
        time.sleep(1)


@torch.no_grad()
def draw(model, seed, fault=None):
    """An image; `fault` is this rank's own, or one that all have."""
    inputs = flux_inputs(seed=seed)
    x, kind = inputs.pop("hidden_states"), fault and fault.kind
    started, original = count(), Link.gather

    def gather(link, *args):
        if gathers[0] and next(started) == fault.inside:
            happen(kind)
        return original(link, *args)

    def measure(*args):
        here = fault is not None and fault.step == MEASURING
        gathers[0] = here and fault.inside is not None
        if here and not gathers[0]:
            happen(kind)
        rates = slowest_rates(*args)
        gathers[0] = False
        return replace(rates, link_gbs=1e9)  # for which it takes `gather`, wherever it runs

    def make(*args):
        program = make_program(*args)
        if fault is not None and fault.step == COMPILING:
            happen(kind)
        return program

    gathers = [False]
    if kind == "weights":
        model.x_embedder.weight.mul_(1.5)
    with (
        mock.patch.object(Link, "gather", gather),
        mock.patch.object(remembered, "slowest_rates", measure),
        mock.patch.object(compiler, "make_program", make),
        piflux.generation(model),
    ):
        for i in range(STEPS):
            here = fault is not None and i == fault.step
            step = dict(inputs, timestep=torch.tensor([1 - i / STEPS]))
            gathers[0] = here and fault.inside is not None
            if here and not gathers[0]:
                happen(kind)
                own = torch.Generator().manual_seed(7)
                if kind == "noise":
                    x = x + 0.3 * torch.randn(x.shape, generator=own)
                if kind == "scale":
                    x = x * 1.2
                if kind in ("same nan", "same infinity"):
                    x = x.index_fill(1, torch.tensor([3]), float(kind.split()[1][:3]))
                if kind == "prompt":
                    step["encoder_hidden_states"] = step["encoder_hidden_states"].flip(1)
                if kind == "clock":
                    step["timestep"] = step["timestep"] * 0.99
                if kind == "guidance":
                    step["guidance"] = step["guidance"] + 0.05
                if kind == "skips":
                    continue
                if kind == "leaves":
                    break
            for _ in range(2 if here and kind == "repeats" else 1):
                v = model(hidden_states=x, **step, return_dict=False)[0]
            x = x - v / STEPS
    if kind == "weights":
        heal(model)
    return x


@torch.no_grad()
def heal(model):
    model.x_embedder.weight.div_(1.5)


@captured_once()
def drawn(rank, group, fault, folder):
    """What became of three images, the first or the second with the fault.

    And the policy in the end, and for how many ranks there are programs.

    What is measured is remembered in `folder`.
    """
    os.environ["XDG_CACHE_HOME"] = folder
    model = piflux.parallelize(tiny_flux(), group=group, policy=fault.policy, inner="eager")
    mine = fault.rank == rank or fault.kind.startswith("same")
    outcomes = []
    for seed in range(3):
        began = time.monotonic()
        try:
            got = draw(model, seed, fault if seed == fault.image and mine else None)
        except (Exception, KeyboardInterrupt) as error:
            got = Failure.of(error)
        outcomes.append((got, time.monotonic() - began))
        if fault.kind == "weights" and isinstance(got, Failure) and seed == 1 and mine:
            heal(model)
    compiled = model._piflux_compiler
    made = [program.schedule.world_size for program in compiled.programs]
    return outcomes, compiled.runtime.schedule.policy, made


# --- judged -------------------------------------------------------------------------------------


@cache
@captured_once()
def wanted(policy, size, seed, kind=None, step=0):
    """The image, and how far from it an image of that policy may be."""
    fault = Fault(kind, policy, 1, 0, step, None) if kind else None
    images = []
    for n in (1, size):
        with torch.no_grad():
            model = tiny_flux()
            group = piflux.virtual_ranks(n)
            parallel = piflux.parallelize(model, group=group, policy=policy, inner="eager")
            images.append(draw(parallel, seed, fault))
    if kind:
        return images[1], 0.0
    return images[0], max(1e-4, 1.5 * float((images[1] - images[0]).abs().max()))


@dataclass
class Judged:
    """What became of one fault.

    Attributes:
        seconds: of the image with the fault, on the ranks that are left.
        told: each rank's outcome, in words.
    """

    fault: Fault
    hung: bool = False
    silent: bool = False
    untyped: bool = False
    aborted: bool = False
    right: bool = False
    next_right: bool = False
    seconds: float = 0.0
    told: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        lost = self.fault.kind in LOST
        kept = self.right or not (lost or self.fault.kind in HARMLESS)
        return (
            self.hung
            or self.silent
            or self.untyped
            or self.aborted
            or not (kept and self.next_right)
        )


def try_out(fault: Fault) -> Judged:
    judged = Judged(fault)
    with mock.patch.dict(os.environ, {"PIFLUX_TIMEOUT_S": str(TIMEOUT_S)}):
        pool = Pool(fault.size, group_timeout=TIMEOUT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="faults") as folder:
            outcomes = pool.run(fault.size, drawn, fault, folder, timeout=LIMIT_S)
    except RanksFailed as error:
        judged.hung = True
        judged.told = [str(error)]
        return judged
    finally:
        pool.close()
    left = []
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Failure):
            asked = outcome.died and rank == fault.rank and fault.kind in LOST
            judged.aborted |= outcome.died and not asked
            judged.untyped |= not outcome.died
            judged.told.append(f"rank {rank}: {outcome.message}")
        else:
            left.append((rank, outcome))
    own = (Injected, KeyboardInterrupt, torch.OutOfMemoryError)
    rights, nexts = [], []
    for rank, (outcome, taken, made) in left:
        judged.told.append(f"rank {rank}: programs for {made}")
        if taken != fault.taken and not (rank == fault.rank and fault.kind == "stopped"):
            judged.silent = True
            judged.told.append(f"rank {rank}: took policy {taken}")
        for number, (got, seconds) in enumerate(outcome):
            here = number == fault.image
            kind = fault.kind if here and fault.kind.startswith("same") else None
            right = not isinstance(got, Failure) and _right(got, fault, number, kind)
            what = f"right in {seconds:.1f} s" if right else "WRONG"
            if isinstance(got, Failure):
                mine = rank == fault.rank and any(got.isa(kind) for kind in own)
                judged.untyped |= not (got.isa(PifluxError) or mine)
                what = f"{got.kinds[0].rpartition('.')[2]}: {got.message[:200]}"
            else:
                judged.silent |= not right and fault.kind not in ("repeats",)
            judged.told.append(f"rank {rank}, image {number}: {what}")
            if rank == fault.rank and fault.kind == "stopped":
                continue  # the others have gone on without it
            if here:
                rights.append(right)
                judged.seconds = max(judged.seconds, seconds)
            if number > fault.image:
                nexts.append(right)
    # A rank that differs is told of, or has none but its own picture wrong.
    told_of = any("Error" in x or "Disagree" in x or "Failed" in x for x in judged.told)
    if fault.kind in DIFFERS and told_of:
        judged.silent = False
    judged.right, judged.next_right = all(rights), all(nexts)
    return judged


def _right(got, fault, number, kind) -> bool:
    if kind:
        want, _ = wanted(fault.policy, fault.size, number, kind, fault.step)
        return bool((got.isfinite() == want.isfinite()).all())
    want, off = wanted(fault.taken, fault.size, number)
    return bool((got - want).abs().max() <= off)


def table(all_: list[Judged]) -> str:
    """In Markdown."""
    names = "| fault | tried | hung | silent | untyped | aborted | image right | next right | s |"
    lines = [names, "|---" * 9 + "|"]
    by = collections.defaultdict(list)
    for judged in all_:
        by[judged.fault.kind].append(judged)
    for kind, several in [*by.items(), ("all", all_)]:
        seconds = sorted(x.seconds for x in several)
        counts = [
            sum(getattr(x, name) for x in several)
            for name in ("hung", "silent", "untyped", "aborted", "right", "next_right")
        ]
        cells = [kind, len(several), *counts, f"{seconds[len(seconds) // 2]:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument(
        "--at-first",
        type=float,
        default=AT_FIRST,
        help="how many of those that can happen there are at a model's first call",
    )
    parser.add_argument("--table", type=Path, help="write it there, too")
    options = parser.parse_args()
    found = []
    try:
        all_ = faults(options.seed, options.kinds, options.at_first)
        for fault in islice(all_, options.count):
            judged = try_out(fault)
            found.append(judged)
            print("BAD" if judged.bad else "ok ", fault, f"{judged.seconds:.1f} s", flush=True)
            if judged.bad:
                print(*(f"      {line}" for line in judged.told), sep="\n", flush=True)
    finally:
        print(table(found))
        if options.table:
            options.table.write_text(table(found) + "\n")
            options.table.with_suffix(".json").write_text(
                json.dumps([asdict(judged) for judged in found], indent=1)
            )
    sys.exit(any(judged.bad for judged in found))


if __name__ == "__main__":
    from faults import main  # under the name that ranks know its functions by

    main()
