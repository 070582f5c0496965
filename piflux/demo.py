"""The small FLUX that comes with piflux: for demos, tests and measuring drift on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import FluxPipeline

MODEL = Path(__file__).parent / "demo_model"
"""A folder for `FluxPipeline.from_pretrained`; its README.md is the model card."""

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


def demo_pipeline() -> FluxPipeline:
    """FLUX in small: every part of the real pipeline, trained from scratch, nothing downloaded.

    The transformer has 2 double and 8 single blocks of 5 heads of 64. Any size that is divisible
    by 16 runs; what is drawn at others than IMAGE_SIZE is not a picture of the prompt.

    Returns:
        A pipeline in float32 on the CPU.
    """
    # Seconds, which a command's wrong usage need not wait for.
    from diffusers import FluxPipeline
    from torch import nn

    pipe = FluxPipeline.from_pretrained(MODEL)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            # diffusers has made its parts float32, transformers leaves bfloat16 as it is stored.
            part.float().eval().requires_grad_(False)
    return pipe
