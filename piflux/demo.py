"""The project's own small FLUX: for demos, tests and measuring drift on any machine.

Its weights, and those of LPIPS, are a package of their own, `packages/piflux-demo`, which the extra
`demo` brings: they are 45 of 46 MB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import FluxPipeline

IMAGE_SIZE = 256
"""Pixels a side that it was trained on: 256 image tokens."""

TEXT_TOKENS = 24
"""`max_sequence_length` that it was trained on."""

PROMPTS = (
    "strawberry, flat style, white background",
    "dragon, 3d style, black background",
    "camera, 3d style, red background",
    "polar bear, 3d style, yellow background",
    "rose, flat style, white background",
    "hamburger, 3d style, orange background",
    "roller coaster, flat style, blue background",
    "cook, 3d style, purple background",
)
"""Of the form that it knows: one of 416 names, one of two styles, one of ten colours."""

NOTE = "The demo's model draws 416 emoji in two styles on ten colours, and nothing else."
"""What every program that shows its images has to say beside them."""


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    """Around imports of what the extra `demo` brings.

    Raises:
        PackageMissing: one of them is not installed; the message says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        from piflux.errors import PackageMissing  # not above: it imports torch

        raise PackageMissing(
            f"the demo needs the package {error.name!r}: pip install 'piflux[demo]'",
            name=error.name,
        ) from error


def demo_file(name: str) -> Path:
    """Where the package piflux-demo has `name`.

    Args:
        name: 'model', a folder for `FluxPipeline.from_pretrained`, or 'lpips.safetensors'.

    Raises:
        PackageMissing: the package is not installed.
    """
    with _needed():
        package = import_module("piflux_demo")
    assert package.__file__ is not None
    return Path(package.__file__).parent / name


def demo_pipeline() -> FluxPipeline:
    """Load a small FLUX: a whole pipeline, trained from scratch, nothing downloaded.

    The transformer has 2 double and 8 single blocks of 5 heads of 64. Any size that is divisible
    by 16 runs; what is drawn at others than IMAGE_SIZE, the default, is not a picture of the
    prompt.

    Returns:
        A pipeline in float32 on the CPU.

    Raises:
        PackageMissing: a package of the extra `demo` is not installed.
    """
    with _needed():  # not above: seconds, for which a command's help need not wait
        import transformers  # noqa: F401  without it diffusers' pipelines are placeholders
        from diffusers import FluxPipeline
        from torch import nn

    pipe = FluxPipeline.from_pretrained(demo_file("model"))
    pipe.default_sample_size = IMAGE_SIZE // pipe.vae_scale_factor  # FLUX.1's is 1024 pixels
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # diffusers has made its parts float32, transformers leaves bfloat16 as it is stored.
            part.float().eval().requires_grad_(False)
    return pipe
