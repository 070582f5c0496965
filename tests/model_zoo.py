"""Tiny versions of other diffusion transformers than FLUX, from their own diffusers classes.

Each is a `Case`: how to build it, and its keyword arguments at two sizes. Its weights are drawn as
those in `models` are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import models
import torch
from models import HEAD_DIM, POOLED_DIM, TEXT_DIM, _draw
from torch import Tensor, nn

HEADS = 2
WIDTH = HEADS * HEAD_DIM
ROPE = (4, 4, 8)

Inputs = dict[str, Any]
Size = tuple[tuple[int, int], int]

# Height and width in tokens, and text tokens. No number divides all of them.
SIZES: tuple[Size, Size] = (((5, 7), 13), ((4, 6), 14))


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: makes it.
        inputs: (height and width in tokens, text tokens) -> the call's keyword arguments.
        clock: the argument that says where on the way a step is.
        sizes: those that the model is run at, one after the other.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[tuple[int, int], int], Inputs]
    clock: str = "timestep"
    sizes: tuple[Size, ...] = SIZES


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_ids(height: int, width: int, axes: int) -> Tensor:
    """Positions of an image's tokens: the last axes but what follows height and width are 0."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None, :]
    return ids.reshape(-1, axes)


# ------------------------------------------------------------------------------------------ FLUX.2


def flux2() -> nn.Module:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return _draw(model, 0)


def flux2_inputs(hw: tuple[int, int], text: int) -> Inputs:
    txt_ids = torch.zeros(text, 4)
    txt_ids[:, 3] = torch.arange(text)
    return {
        "hidden_states": randn(1, hw[0] * hw[1], 8),
        "encoder_hidden_states": randn(1, text, TEXT_DIM, seed=1),
        "timestep": torch.ones(1),
        "img_ids": grid_ids(*hw, 4),
        "txt_ids": txt_ids,
        "guidance": torch.full((1,), 3.5),
    }


# -------------------------------------------------------------------------------------- Qwen-Image


def qwen_image(**options: Any) -> nn.Module:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE,
        **options,
    )
    return _draw(model, 0)


def qwen_image_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """Two prompts; the last tokens of the second are padding, which the mask hides."""
    mask = torch.ones(2, text, dtype=torch.long)
    mask[1, text - 5 :] = 0
    return {
        "hidden_states": randn(2, hw[0] * hw[1], 16),
        "encoder_hidden_states": randn(2, text, TEXT_DIM, seed=1),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.ones(2),
        "img_shapes": [[(1, *hw)]] * 2,
    }


def qwen_edit_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """A second image follows the first."""
    return qwen_image_inputs(hw, text) | {
        "hidden_states": randn(2, hw[0] * hw[1] + 20, 16),
        "img_shapes": [[(1, *hw), (1, 4, 5)]] * 2,
    }


# --------------------------------------------------------------------------------------------- SD3


def sd3() -> nn.Module:
    """As SD3.5 medium: the last block leaves the text as it is, the first attends twice."""
    return models.tiny_sd3()


def sd3_inputs(hw: tuple[int, int], text: int) -> Inputs:
    return models.sd3_inputs(image_hw=hw, text=text)


# ------------------------------------------------------------------------------------------ PixArt


def pixart() -> nn.Module:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        sample_size=16,
        caption_channels=TEXT_DIM,
    )
    return _draw(model, 0)


def pixart_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """The prompt's padding is masked out of the cross attention."""
    mask = torch.ones(2, text)
    mask[1, text - 5 :] = 0
    return {
        "hidden_states": randn(2, 4, 2 * hw[0], 2 * hw[1]),
        "encoder_hidden_states": randn(2, text, TEXT_DIM, seed=1),
        "encoder_attention_mask": mask,
        "timestep": torch.full((2,), 900.0),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


# -------------------------------------------------------------------------------------------- Wan


def wan(**options: Any) -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
        **options,
    )
    return _draw(model, 0)


def wan_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """Two frames of latents."""
    return {
        "hidden_states": randn(1, 4, 2, 2 * hw[0], 2 * hw[1]),
        "encoder_hidden_states": randn(1, text, TEXT_DIM, seed=1),
        "timestep": torch.full((1,), 900.0),
    }


def wan_image_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """An image prompt, which the model tells from the text by the text's 512 tokens."""
    return wan_inputs(hw, 512) | {"encoder_hidden_states_image": randn(1, 9, 24, seed=2)}


def wan_clocks_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """A time for each token."""
    return wan_inputs(hw, text) | {"timestep": torch.linspace(0, 900, 2 * hw[0] * hw[1])[None]}


# ----------------------------------------------------------------------------------------- Z-Image


def z_image() -> nn.Module:
    """A first call makes its rotary tables, in a way that Dynamo can't follow."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE),
        axes_lens=[128, 32, 32],
    )
    return _draw(model, 0)


def z_image_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """A list of images and one of prompts; the model pads both to multiples of 32 tokens."""
    return {
        "x": [randn(4, 1, 2 * hw[0], 2 * hw[1])],
        "cap_feats": [randn(text, TEXT_DIM, seed=1)],
        "t": torch.full((1,), 0.5),
    }


def z_image_batch(hw: tuple[int, int], *texts: int) -> Inputs:
    return {
        "x": [randn(4, 1, 2 * hw[0], 2 * hw[1], seed=i) for i in range(len(texts))],
        "cap_feats": [randn(text, TEXT_DIM, seed=10 + i) for i, text in enumerate(texts)],
        "t": torch.full((len(texts),), 0.5),
    }


def z_image_pair(hw: tuple[int, int], text: int) -> Inputs:
    """Two prompts that the model pads to the same length."""
    return z_image_batch(hw, text, 20)


# ------------------------------------------------------------------------------------ HunyuanVideo


def hunyuan_video() -> nn.Module:
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoTransformer3DModel,
    )

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=ROPE,
    )
    return _draw(model, 0)


def hunyuan_video_inputs(hw: tuple[int, int], text: int) -> Inputs:
    mask = torch.ones(1, text, dtype=torch.long)
    mask[:, text - 5 :] = 0
    return {
        "hidden_states": randn(1, 4, 2, 2 * hw[0], 2 * hw[1]),
        "encoder_hidden_states": randn(1, text, TEXT_DIM, seed=1),
        "encoder_attention_mask": mask,
        "pooled_projections": randn(1, POOLED_DIM, seed=2),
        "timestep": torch.full((1,), 900.0),
        "guidance": torch.full((1,), 3500.0),
    }


# -------------------------------------------------------------------------------------------- Sana


def sana() -> nn.Module:
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_DIM,
        sample_size=16,
    )
    return _draw(model, 0)


def sana_inputs(hw: tuple[int, int], text: int) -> Inputs:
    return {
        "hidden_states": randn(1, 4, *hw),
        "encoder_hidden_states": randn(1, text, TEXT_DIM, seed=1),
        "timestep": torch.full((1,), 900.0),
    }


# ------------------------------------------------------------------------- FLUX.1 and what joins it


def flux_inputs(hw: tuple[int, int], text: int) -> Inputs:
    return models.flux_inputs(image_hw=hw, text=text)


def kontext_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """The tokens of a reference image, of its own size, follow those of the image."""
    inputs = flux_inputs(hw, text)
    reference = grid_ids(4, 5, 3)
    reference[:, 0] = 1
    tokens = randn(1, len(reference), inputs["hidden_states"].shape[-1], seed=3)
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], tokens], 1),
        "img_ids": torch.cat([inputs["img_ids"], reference]),
    }


def redux_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """An image prompt: its 729 tokens follow the text's."""
    return flux_inputs(hw, text + 729)


def flux_ip_adapter() -> nn.Module:
    """An image prompt that the image's tokens attend to by themselves, in 4 tokens."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = models.tiny_flux(heads=HEADS)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(WIDTH, TEXT_DIM, num_tokens=(4,)))
    projection = ImageProjection(POOLED_DIM, TEXT_DIM, num_image_text_embeds=4)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return _draw(model, 0)


def flux_ip_adapter_inputs(hw: tuple[int, int], text: int) -> Inputs:
    embeds = {"ip_adapter_image_embeds": [randn(1, 1, POOLED_DIM, seed=4)]}
    return flux_inputs(hw, text) | {"joint_attention_kwargs": embeds}


def flux_controlnet(modes: int | None = None) -> nn.Module:
    """The network that makes residuals, itself split over the ranks."""
    from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel

    model = FluxControlNetModel(
        in_channels=models.CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
        num_mode=modes,
    )
    return _draw(model, 0)


def flux_controlnet_inputs(hw: tuple[int, int], text: int) -> Inputs:
    condition = randn(1, hw[0] * hw[1], models.CHANNELS, seed=5)
    return flux_inputs(hw, text) | {"controlnet_cond": condition}


def flux_union_inputs(hw: tuple[int, int], text: int) -> Inputs:
    """The mode becomes one more token before the text."""
    return flux_controlnet_inputs(hw, text) | {"controlnet_mode": torch.tensor([[2]])}


CASES = {
    "flux2": Case(flux2, flux2_inputs),
    "qwen_image": Case(qwen_image, qwen_image_inputs),
    "sd3": Case(sd3, sd3_inputs),
    "pixart": Case(pixart, pixart_inputs),
    "wan": Case(wan, wan_inputs),
    # Dynamo takes long over remainders of several symbols, so one length changes.
    "z_image": Case(z_image, z_image_inputs, clock="t", sizes=(SIZES[0], ((4, 7), 13))),
    "hunyuan_video": Case(hunyuan_video, hunyuan_video_inputs),
    # FLUX at several sizes is judged in test_numerics.py.
    "flux_kontext": Case(models.tiny_flux, kontext_inputs, sizes=SIZES[:1]),
    "flux_redux": Case(models.tiny_flux, redux_inputs, sizes=SIZES[:1]),
    "flux_ip_adapter": Case(flux_ip_adapter, flux_ip_adapter_inputs, sizes=SIZES[:1]),
    "flux_controlnet": Case(flux_controlnet, flux_controlnet_inputs, sizes=SIZES[:1]),
    "flux_controlnet_union": Case(
        partial(flux_controlnet, modes=3), flux_union_inputs, sizes=SIZES[:1]
    ),
}

# Other ways to call them.
VARIANTS = {
    "qwen_edit_with_two_clocks": Case(partial(qwen_image, zero_cond_t=True), qwen_edit_inputs),
    "wan_image_to_video": Case(
        partial(wan, image_dim=24, added_kv_proj_dim=WIDTH), wan_image_inputs
    ),
    "wan_with_a_clock_per_token": Case(wan, wan_clocks_inputs),
    "z_image_pair": Case(z_image, z_image_pair),
}
