"""Why it is no use to wait for the other ranks, and what is raised then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from piflux.errors import Excluded, PifluxError, RankFailed, RankLost, RanksDisagree
from piflux.ranks.presence import Kind, Wait, Word


@dataclass(frozen=True)
class Reason:
    """Why a rank leaves an epoch.

    Attributes:
        kind: which error it comes to.
        text: what has happened, and to whom.
    """

    kind: Kind
    text: str

    def error(self, gone: Iterable[int] = (), *, resumable: bool = True) -> PifluxError:
        """What is raised.

        Args:
            gone: the ranks that are lost.
            resumable: see `RankLost`.
        """
        text = self.text
        if self.kind == "excluded":
            return Excluded(text)
        if self.kind == "disagree":
            return RanksDisagree(text)
        if self.kind == "stopped":
            return RankFailed(
                f"{text}: this image is lost on all ranks. They are ready for the next one, which "
                "all have to begin"
            )
        if self.kind == "lost" and resumable:
            text += (
                ". Without it this image can't go on as it was; at their next call the ranks that "
                "are left go on without it"
            )
            return RankLost(text, list(gone))
        if self.kind == "lost":
            text += (
                ": this image is lost, since the GPU was steps ahead. The ranks that are left go "
                "on at the next one"
            )
            return RankLost(text, list(gone), resumable=False)
        return RankFailed(text)


def excluded(rank: int) -> Reason:
    """This rank is."""
    return Reason(
        "excluded",
        f"rank {rank} was away for so long that the others went on without it: end this process; "
        "to have it back, start all ranks anew",
    )


def lost(gone: Mapping[int, str]) -> Reason:
    """Others are; see `Presence.gone`."""
    return Reason("lost", "; ".join(f"rank {rank} {how}" for rank, how in sorted(gone.items())))


def apart(waits: Mapping[int, Wait]) -> Reason:
    """By rank: they wait for different things."""
    lines = ["the ranks are at different points, and would wait for each other for ever:"]
    lines += [f"  rank {r}: {wait.doing}, {wait.what}" for r, wait in sorted(waits.items())]
    lines.append(
        "Every rank must make the same calls in the same order: the same steps, the same "
        "callbacks, the same interrupts, hooks and code, the same settings of the autoencoder"
    )
    return Reason("disagree", "\n".join(lines))


def late(
    allowed: float,
    where: str,
    others: Sequence[int],
    words: Mapping[int, Word],
    *,
    board_is_silent: bool = False,
) -> Reason:
    """Others live, and don't come.

    Args:
        allowed: seconds that were waited.
        where: this rank waits.
        others: for whom.
        words: of those that have said anything.
        board_is_silent: whether it has not answered meanwhile.
    """
    lines = [f"waited {allowed:.3g} s for the others in {where}:"]
    for rank in others:
        word, at = words.get(rank), "it never called what piflux parallelized"
        if word is not None:
            at = f"it lives, and is at {word.doing} of its image {word.image}"
            if word.wait:
                at += f", where it waits for {word.wait.what}"
        lines.append(f"  rank {rank}: {at}")
    lines.append(
        "Call the model on every rank, or set PIFLUX_TIMEOUT_S to more seconds if that takes longer"
    )
    if board_is_silent:
        lines.append("The store of the process group has not answered meanwhile, either")
    return Reason("late", "\n".join(lines))


def line_of(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
