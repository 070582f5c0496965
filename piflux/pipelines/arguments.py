"""Which pipeline draws what is asked for, and what its call takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from piflux.errors import CannotLoad


@dataclass(frozen=True)
class Asked:
    """What is asked of a pipeline's call, but for prompts and noise; None for its own default.

    Attributes:
        steps: denoise steps.
        size: width and height in pixels.
        guidance: its scale.
        negative: what not to draw.
        images: pictures to start from, edit or follow; of several a few pipelines make one, see
            `takes_several`.
        mask: a picture, white where the first of `images` is painted anew.
        frames: of a video.
    """

    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    negative: str | None = None
    images: tuple[Image.Image, ...] = ()
    mask: Image.Image | None = None
    frames: int | None = None


def arguments(kind: Any, asked: Asked) -> tuple[Any, dict[str, Any]]:
    """The class that draws what is asked for, and what its call takes, but for prompt and noise.

    A pipeline that draws from prompts alone has a sister for pictures to start from, and one for
    masks, which share its parts.

    Args:
        kind: the folder's pipeline.
        asked: what is asked for.

    Raises:
        CannotLoad: it takes no such option.
    """
    given: dict[str, Any] = {}
    images, mask = asked.images, asked.mask
    if mask is not None and not takes(kind, "mask_image"):
        kind = _sister(kind, "mask_image")
    elif images and not takes(kind, "image", "control_image"):
        kind = _sister(kind, "image")
    taken = inspect.signature(kind.__call__).parameters
    if len(images) > 1 and not takes_several(kind):
        raise CannotLoad(f"{kind.__name__} takes one picture, not {len(images)}")
    if images:
        name = "image" if "image" in taken else "control_image"
        given[name] = images[0] if len(images) == 1 else list(images)
    if mask is not None:
        given["mask_image"] = mask
    size = asked.size
    if images and size is None and not _edits(kind):
        size = images[0].width // 16 * 16, images[0].height // 16 * 16
    if size is not None:
        given |= {"width": size[0], "height": size[1]}
    steps = asked.steps or taken["num_inference_steps"].default
    given["num_inference_steps"] = steps
    if asked.frames is not None:
        given["num_frames"] = asked.frames
    if asked.guidance is not None:
        given[_guidance(taken)] = asked.guidance
    if asked.negative is not None:
        given["negative_prompt"] = asked.negative
        if "true_cfg_scale" in taken:  # without which FLUX.1 leaves a negative prompt aside
            default = taken[_guidance(taken)].default
            given["true_cfg_scale"] = default if asked.guidance is None else asked.guidance
    for name in given:
        if name not in taken:
            raise CannotLoad(
                f"{kind.__name__} takes no {name!r}: leave {OPTIONS[name]} out, or take a pipeline "
                "that does"
            )
    given.pop("negative_prompt", None)  # there is one a picture
    return kind, given


OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "control_image": "--image",
    "mask_image": "--mask",
    "width": "--size",
    "height": "--size",
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--guidance",
}
"""By the arguments of pipelines' calls."""


def takes(kind: Any, *names: str) -> bool:
    """Whether a pipeline's call has one of these arguments."""
    return bool(inspect.signature(kind.__call__).parameters.keys() & set(names))


SEVERAL = frozenset({"QwenImageEditPlusPipeline"})
"""Classes that make one picture of several, where the signature says no more than 'pictures'."""


def takes_several(kind: Any) -> bool:
    """Whether a pipeline's call makes one picture of several: others take a list for a batch.

    Its signature says so where it has one picture or a list of such, and no tensors.
    """
    image = inspect.signature(kind.__call__).parameters.get("image")
    said = "" if image is None else str(image.annotation).lower()
    return "list[pil.image.image]" in said and "tensor" not in said or kind.__name__ in SEVERAL


def _edits(kind: Any) -> bool:
    """Whether the picture is a reference, so that what is drawn has a size of its own."""
    return not takes(kind, "strength") and not takes(kind, "control_image")


def _guidance(taken: Mapping[str, inspect.Parameter]) -> str:
    """The argument that scales guidance: Qwen-Image has the other one for models to come."""
    distilled = taken.get("guidance_scale")
    other = "true_cfg_scale" in taken and distilled is not None and distilled.default is None
    return "true_cfg_scale" if other else "guidance_scale"


Pictured = Literal["image", "mask_image"]

SISTERS: dict[Pictured, tuple[str, str]] = {
    "image": ("IMAGE2IMAGE", "Img2Img"),
    "mask_image": ("INPAINT", "Inpaint"),
}
"""By the argument that a class lacks: diffusers' task, and what names of classes say of it."""


def sister_of(kind: Any, argument: Pictured) -> Any | None:
    """The pipeline of the same parts that takes `argument`; None if diffusers has none.

    It is in diffusers' mapping of tasks, or, since not all are, has the name that it would have.
    """
    import diffusers
    from diffusers.pipelines import auto_pipeline

    task, word = SISTERS[argument]
    sisters = getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING")
    for each in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT"):
        family = getattr(auto_pipeline, f"AUTO_{each}_PIPELINES_MAPPING")
        for name, found in family.items():
            if found is kind and name in sisters:
                return sisters[name]
    named = getattr(diffusers, f"{kind.__name__.removesuffix('Pipeline')}{word}Pipeline", None)
    return named if named is not None and _parts(named) <= _parts(kind) else None


def _sister(kind: Any, argument: Pictured) -> Any:
    found = sister_of(kind, argument)
    if found is None:
        option = OPTIONS[argument].removeprefix("--")
        raise CannotLoad(
            f"{kind.__name__} takes no {option}, and diffusers has no pipeline of its parts that "
            f"does: leave --{option} out"
        )
    return found


def _parts(kind: Any) -> set[str]:
    """What a pipeline is made of."""
    return set(inspect.signature(kind.__init__).parameters)


def read_picture(path: Path) -> Image.Image:
    """A file's picture in RGB.

    Raises:
        CannotLoad: it can't be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise CannotLoad(f"{path} can't be read as a picture: {error}") from error
