"""What piflux raises. Every class derives from `PifluxError`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

INTERRUPTED = 130
"""Exit code of a command after Ctrl-C, as shells have it."""


class PifluxError(Exception):
    """Base of all piflux errors."""


class CompileError(PifluxError):
    """Raised while a graph is compiled."""

    def __str__(self) -> str:
        return plain(super().__str__())


class CannotShard(CompileError):
    """The token dimension can't be cut at `node`; `reason` says why and what to do.

    Attributes:
        node: the name of the graph node.
        op: the node's operation.
        reason: what stands in the way.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node = node.name
        self.op = describe_op(node)
        self.reason = reason
        line = source_line(node)
        super().__init__(
            f"{reason}\n  node: %{node.name}\n  op:   {self.op}\n"
            f"  line: {line if line else 'not recorded (the node is an input of the graph)'}"
        )


class DependsOnData(CannotShard):
    """A number of tokens is known only once the graph runs."""


class NothingToShare(CannotShard):
    """No attention at `node` or elsewhere reads keys and values of the tokens it serves."""


class NoAttention(CompileError):
    """The captured graph holds no scaled_dot_product_attention, so there is nothing to split."""


class DoesNotFit(CompileError):
    """What a rank would hold is more than its GPU has left; it says what would fit.

    At a model's first call all ranks raise it, by the least that one of them has left; later those
    do that have too little. All are ready for the next call.

    Attributes:
        on_all_ranks: whether every rank raises it.
    """

    on_all_ranks = True


class CannotCapture(PifluxError):
    """The model does something from step to step that no captured graph does."""


class RanksDisagree(CompileError):
    """The ranks were called with different inputs, settings or versions, or at different points.

    Settings are compared when the first graph is compiled, inputs in an image's first step, times
    and latents in every step.

    Attributes:
        on_all_ranks: whether every rank raises it at the same point, so that all go on together.
    """

    on_all_ranks = False


class StepsUnforeseen(PifluxError):
    """An image's steps came at other times than were announced; what was drawn is not right."""


class CannotLoad(PifluxError):
    """A folder's pipeline can't be read, or isn't one that is known."""


class CannotSave(PifluxError):
    """A picture can't be written."""


class PackageMissing(PifluxError, ModuleNotFoundError):
    """A package is not installed that an extra of piflux brings."""


class RankFailed(PifluxError):
    """A rank raised, died, did not come in time or has nothing to run on.

    The other ranks of a model raise it in the same image, and are ready for the next one. Those
    that `piflux` started are ended.
    """

    on_all_ranks = False


class RankLost(RankFailed):
    """A rank died, is stopped or cut off, where the image can't go on without it.

    At their next call the ranks that are left go on as fewer.

    Attributes:
        ranks: those that are known to be lost.
        resumable: whether what was under way may be done once more without them.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), *, resumable: bool = True) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.resumable = resumable


class WeightsLost(RankLost):
    """A rank is lost that held a share of the model's weights: the others can't go on with it."""

    on_all_ranks = True

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message, ranks, resumable=False)


class Excluded(RankFailed):
    """The other ranks went on without this one, which was stopped or cut off for too long."""


class Stopped(PifluxError):
    """An image was ended before its last step, on all ranks after the same one, as was asked."""

    on_all_ranks = True


def plain(message: str) -> str:
    """Without the advice that Dynamo adds to what a backend raises."""
    return message.partition("\nSet TORCHDYNAMO_VERBOSE")[0].rstrip()


def describe_op(node: fx.Node) -> str:
    """How the user's code spells the operation: `torch.cat`, `Tensor.reshape`, `placeholder`."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op != "call_function":
        return node.op
    import torch  # not before: a command that refuses its arguments need not wait for it

    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or "torch"
    return f"{module.removeprefix('_')}.{getattr(target, '__name__', target)}"


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's model that made `node`, as 'file:line, in f: code'."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)', node.stack_trace or "")
    if not frames:
        return ""
    # What models are written with is not what they say.
    own = [frame for frame in frames if not re.search(r"/(torch|einops)/[^:]*$", frame[0])]
    file, line, function, code = (own or frames)[-1]
    return f"{file}:{line}, in {function}: {code.strip()}"
