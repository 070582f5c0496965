"""What all ranks must have in common beyond a graph's inputs: a call's arguments, and weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from piflux.capture.dynamo import modules_of
from piflux.errors import CannotCapture
from piflux.memory.shares import Shares
from piflux.ranks.agreement import Norm, norm_of, sketches
from piflux.ranks.processes import ProcessRanks
from piflux.runtime.streams import Seen

EACH_FOR_ITSELF = ("output_type", "return_dict", "callback", "callback_steps")
"""Arguments of pipelines in which ranks may differ, beside those of callbacks on steps."""


def facts_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline is called with, by argument, as strings and sketches to be compared."""
    facts: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in EACH_FOR_ITSELF and not name.startswith("callback_on_step"):
            _state(f"argument {name}", value, facts)
    return facts | sketches({name: x for name, x in facts.items() if isinstance(x, Tensor)})


def _state(name: str, value: Any, facts: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        facts[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _state(f"{name}[{key!r}]", item, facts)
    elif isinstance(value, (list, tuple)):
        facts[name] = f"{len(value)} items"
        for i, item in enumerate(value):
            _state(f"{name}[{i}]", item, facts)
    elif isinstance(value, torch.Generator):
        facts[name] = f"a generator in state {_digest(value.get_state().numpy().tobytes())}"
    elif value is None or isinstance(value, (bool, int, float, str)):
        facts[name] = repr(value)
    elif hasattr(value, "tobytes"):  # pictures of PIL, arrays of numpy
        shape = getattr(value, "size", None), getattr(value, "shape", None)
        facts[name] = f"{type(value).__name__} {shape} {_digest(value.tobytes())}"
    else:
        facts[name] = type(value).__qualname__


def _digest(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"


class Edits:
    """What callbacks of one pipeline's call did to tensors that they were handed.

    Ranks may have different callbacks, or one rank alone may have one, as long as none edits what
    the ranks share.
    """

    def __init__(self) -> None:
        self._count = 0
        self._last: dict[str, Tensor] = {}

    def watching(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """`callback`, with what it edits noted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            handed = _tensors(args) | _tensors(kwargs.values())
            before = {name: Seen(x) for name, x in handed.items()}
            result = callback(*args, **kwargs)
            after = handed | _tensors([result])
            for name, x in after.items():
                if name not in before or not before[name].again(x):
                    self._count += 1
                    self._last[name] = x
            return result

        return call

    def facts(self) -> dict[str, Any]:
        """How many edits there were, and what the last ones left."""
        facts: dict[str, Any] = {"edits by callbacks": str(self._count)}
        return facts | sketches({f"{name} after them": x for name, x in self._last.items()})


def telling_of_edits(callback: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    """`callback`, after which `tell` is called where it edited a tensor that it was handed.

    Waits for the device only where it gave another tensor back, whose contents are compared, and
    where tensors count no versions (`torch.inference_mode`): less than a step takes.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        handed = _tensors(args) | _tensors(kwargs.values())
        before = {name: Seen(x) for name, x in handed.items()}
        result = callback(*args, **kwargs)
        after = handed | _tensors([result])
        if any(name not in before or not before[name].again(x) for name, x in after.items()):
            tell()
        return result

    return call


def _tensors(values: Any) -> dict[str, Tensor]:
    """Those that a callback gets or gives: in a dictionary, or the latents by themselves."""
    found: dict[str, Tensor] = {}
    for value in values:
        if isinstance(value, Tensor) and value.dim() > 1:
            found["latents"] = value
        elif isinstance(value, dict):
            found |= {name: x for name, x in value.items() if isinstance(x, Tensor)}
    return found


Facts = tuple[int, int]
"""The id of a weight's tensor, and how often that was written into."""


class SameWeights:
    """Compares a model's weights over the ranks, where they may have changed."""

    def __init__(self) -> None:
        self._known: Any = None
        self._named: dict[str, Facts] = {}

    def may_have_changed(self, model: nn.Module) -> bool:
        """Since they were last compared, on this rank."""
        return bool(self._known != _unnamed(model))

    def compare(self, model: nn.Module, ranks: ProcessRanks, shares: Shares | None = None) -> None:
        """All ranks call this together. Synchronises host and device.

        Args:
            model: with its weights where they compute.
            ranks: who shares it.
            shares: which weights are not there as a whole, and are compared when they are shared.

        Raises:
            CannotCapture: somebody wrote into a weight that is shared.
            RanksDisagree: on every rank, if a weight differs; it names some that do.
        """
        known, weights = _unnamed(model), dict(model.named_parameters())
        named = {name: _facts(x) for name, x in weights.items()}
        if shares is not None:
            held = dict.fromkeys(name for name, x in weights.items() if shares.holds(x))
            self._refuse_written(held, self._named, named)
            weights = {name: x for name, x in weights.items() if name not in held}
        norms = {f"weight {name}": norm for name, norm in _norms(weights).items()}
        ranks.agree(norms | _scales(model))
        self._known, self._named = known, named

    @staticmethod
    def _refuse_written(
        held: Collection[str], before: Mapping[str, Facts], now: Mapping[str, Facts]
    ) -> None:
        for name in held:
            if before.get(name, now[name]) != now[name]:
                raise CannotCapture(
                    f"the weight {name} is shared over the ranks, and was written into, as fusing "
                    "an adapter does: what was written is lost. Load the model anew, and change "
                    "its weights before piflux.parallelize"
                )


def _unnamed(model: nn.Module) -> tuple[list[Facts], list[Any]]:
    """Changes if a weight or a scale does. There are no names, which take longer to find."""
    weights, scales = [], []
    with torch._C.DisableTorchFunctionSubclass():  # quantized weights are asked as fast as others
        for module in modules_of(model):
            weights += [_facts(x) for x in module._parameters.values() if x is not None]
            if isinstance(scaling := module.__dict__.get("scaling"), dict):
                scales.append(dict(scaling))
    return weights, scales


def _scales(model: nn.Module) -> dict[str, str]:
    """By how much peft's adapters count: numbers of Python's, which are no weights."""
    return {
        f"scale of adapter {adapter} in {name}": repr(scale)
        for name, module in model.named_modules()
        if isinstance(scales := getattr(module, "scaling", None), dict)
        for adapter, scale in scales.items()
    }


class Decoder:
    """What ranks must have in common of a pipeline's autoencoder, compared with each call."""

    def __init__(self) -> None:
        self._known: Any = None
        self._norms: dict[str, Norm] = {}

    def facts(self, vae: Any) -> dict[str, Any]:
        """How it decodes, and its weights; those are read only where they may have changed."""
        facts = {
            f"the autoencoder's {name}": repr(getattr(vae, name))
            for name in ("use_tiling", "use_slicing")
            if hasattr(vae, name)
        }
        weights = dict(vae.named_parameters()) if isinstance(vae, nn.Module) else {}
        weights = {name: x for name, x in weights.items() if not x.is_meta}  # offloaded
        known = {name: _facts(x) for name, x in weights.items()}
        if known != self._known:
            self._known, self._norms = known, _norms(weights)
        return facts | {f"the autoencoder's {name}": norm for name, norm in self._norms.items()}


def _facts(x: Tensor) -> Facts:
    return id(x), 0 if x.is_inference() else x._version


def _norms(weights: Mapping[str, Tensor]) -> dict[str, Norm]:
    named = [(name, part.detach()) for name, x in weights.items() for part in _plain_parts(x)]
    if not named:
        return {}
    found = torch.stack([norm_of(x).to(named[0][1].device) for _, x in named])
    norms: dict[str, Norm] = {}
    for (name, _), norm in zip(named, found.tolist(), strict=True):
        norms[name if name not in norms else f"{name} ({len(norms)})"] = Norm(norm)
    return norms


def _plain_parts(x: Tensor) -> list[Tensor]:
    """The tensors that a quantized weight is made of; none of one that is itself spread out."""
    if hasattr(x, "device_mesh"):
        return []
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(x, name))]
