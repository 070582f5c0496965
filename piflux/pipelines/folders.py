"""A folder becomes a pipeline on a device, whole and with its adapters."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.errors import CannotLoad
from piflux.integrations.diffusers import transformers_of
from piflux.pipelines.offload import visit
from piflux.pipelines.quantized import Quantization, quantize
from piflux.pipelines.weights import check_numbers, models_of


def pipeline_class(model: str) -> Any:
    """The class of a folder's pipeline; no weights are read.

    Raises:
        CannotLoad: diffusers has none of that name.
    """
    import diffusers

    _quiet()
    if model == "demo":
        return diffusers.FluxPipeline
    try:
        name = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
        kind = getattr(diffusers, name)
    except Exception as error:  # whatever diffusers trips over in a broken folder
        raise CannotLoad(
            f"{model} can't be loaded: its model_index.json names no pipeline of diffusers "
            f"{diffusers.__version__}: {type(error).__name__}: {_line(error)}"
        ) from error
    return kind


@dataclass(frozen=True)
class Fit:
    """How a pipeline's models are made to fit into a GPU's memory.

    Attributes:
        quantize: 'fp8' or 'int8' for the transformers' blocks; 'none' to leave them as they are.
        share: whether the transformers stay on the host, for `parallelize` to take a rank's share.
        offload: whether text encoders are on the host but while they run.
    """

    quantize: Quantization | Literal["none"] = "none"
    share: bool = False
    offload: bool = False


def load(model: str, device: torch.device, fit: Fit = Fit()) -> tuple[Any, dict[str, Any]]:
    """The pipeline on `device`, and what its call needs beside what a user says.

    A folder's weights are mapped: ranks of one host that load it share one copy of them in the
    host's memory, and a model that is quantized is never on the device as it was.

    Args:
        model: 'demo', a folder, or a hub id.
        device: on a GPU it is loaded in bfloat16, elsewhere in float32.
        fit: what else is to be done for it to fit.

    Raises:
        CannotLoad: the folder holds no pipeline that can be loaded, or not all of its weights.
    """
    import diffusers

    _quiet()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    more: dict[str, Any] = {}
    if model == "demo":
        pipe, more = demo_pipeline(), {"max_sequence_length": TEXT_TOKENS}
    else:
        try:
            models = models_of(model, **_in(dtype))
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, **models, **_in(dtype))
        except CannotLoad:
            raise
        except Exception as error:  # whatever diffusers trips over in a broken folder
            raise CannotLoad(
                f"{model} can't be loaded: {type(error).__name__}: {_line(error)}"
            ) from error
    transformers = list(transformers_of(pipe).values())
    if fit.quantize != "none":
        for transformer in transformers:
            quantize(transformer, fit.quantize, device, "cpu" if fit.share else None)
    for part in pipe.components.values():
        if not isinstance(part, nn.Module) or fit.share and any(part is x for x in transformers):
            continue
        if fit.offload and type(part).__module__.startswith("transformers."):
            visit(part, device)
        else:
            part.to(device)
    if fit.offload:
        # Where a pipeline computes it looks up at the first model that is not named here.
        pipe._exclude_from_cpu_offload = [
            name
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and not hasattr(part, "_hf_hook")
        ]
    check_numbers(pipe, model, device)
    return pipe, more


@dataclass(frozen=True)
class Fitted:
    """A folder's pipeline, loaded as `fit` has it by whoever calls this with a device."""

    model: str
    fit: Fit

    def __call__(self, device: torch.device) -> tuple[Any, dict[str, Any]]:
        """See `load`."""
        return load(self.model, device, self.fit)


def as_kind(pipe: Any, kind: Any) -> Any:
    """The same parts in a pipeline of another class, in the dtype that they have."""
    if type(pipe) is kind:
        return pipe
    return kind.from_pipe(pipe, **_in(pipe.transformer.dtype))


def _in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of diffusers' loaders that names a dtype.

    Before it had its new name, the new one was taken for an unknown argument and left aside.
    """
    import diffusers

    version = tuple(int(x) for x in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 40) else "torch_dtype": dtype}


def add_loras(pipe: Any, loras: tuple[tuple[str, float], ...]) -> None:
    """Load adapters into the pipeline and set their scales.

    Raises:
        CannotLoad: one of them, or what adapters need is not installed.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise CannotLoad("a LoRA takes the package peft: pip install 'piflux[demo]'")
    names = [f"lora_{i}" for i in range(len(loras))]
    for (text, _), name in zip(loras, names, strict=True):
        path = Path(text)
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        told = logging.getLogger("diffusers.loaders.peft")
        before, told.disabled = told.disabled, True  # it prints what it raises
        try:
            with warnings.catch_warnings():  # peft: that there are several is what was asked for
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipe.load_lora_weights(str(folder), weight_name=file, adapter_name=name)
        except Exception as error:  # whatever diffusers and peft trip over
            raise CannotLoad(
                f"the LoRA {text} can't be loaded into {type(pipe).__name__}: "
                f"{type(error).__name__}: {_line(error)}"
            ) from error
        finally:
            told.disabled = before
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise CannotLoad(
                f"the LoRA {text} can't be loaded into {type(pipe).__name__}: its weights are of "
                "parts that this pipeline doesn't have. Was it made for another model?"
            )
    pipe.set_adapters(names, [scale for _, scale in loras])


def _line(error: Exception) -> str:
    """The last line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _quiet() -> None:
    """Leave the terminal to piflux: one progress bar, and no advice of the libraries below."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
