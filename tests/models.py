"""Tiny diffusion transformers with weights that make every part of them matter, and their inputs.

Freshly initialised models are poor judges: their gates are small and their attention is almost
uniform, so a wrong key would hardly show. These draw every weight from a seeded normal
distribution, wide enough that attention is peaked and no output is near constant.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from piflux.demo import TEXT_TOKENS, demo_pipeline

HEAD_DIM = 16
TEXT_DIM = 24
POOLED_DIM = 16
CHANNELS = 16


def tiny_flux(
    *,
    heads: int = 3,
    double: int = 1,
    single: int = 1,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    _draw(model, seed)
    return model if dtype == torch.float32 else model.to(dtype)


def flux_inputs(
    *,
    batch: int = 1,
    image_hw: tuple[int, int] = (5, 7),
    text: int = 13,
    guidance: bool = True,
    ids_3d: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The keyword arguments of one denoise step at the first timestep."""
    height, width = image_hw
    generator = torch.Generator().manual_seed(seed)
    img_ids = torch.zeros(height, width, 3)
    img_ids[..., 1] = torch.arange(height)[:, None]
    img_ids[..., 2] = torch.arange(width)[None, :]
    img_ids = img_ids.reshape(-1, 3)
    txt_ids = torch.zeros(text, 3)
    inputs = {
        "hidden_states": torch.randn(batch, height * width, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, POOLED_DIM, generator=generator),
        "timestep": torch.ones(batch),
        "img_ids": img_ids[None] if ids_3d else img_ids,
        "txt_ids": txt_ids[None] if ids_3d else txt_ids,
    }
    if guidance:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return {name: value.to(dtype) for name, value in inputs.items()}


def control_samples(
    model: FluxTransformer2DModel, inputs: dict[str, Tensor], *, double: int, single: int
) -> dict[str, list[Tensor]]:
    """Residuals as a FluxControlNetModel would give them, `double` and `single` of them."""
    generator = torch.Generator().manual_seed(7)
    image = inputs["hidden_states"]
    shape = (*image.shape[:2], model.inner_dim)

    def residuals(count: int) -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(image.dtype) for _ in range(count)]

    return {
        "controlnet_block_samples": residuals(double),
        "controlnet_single_block_samples": residuals(single),
    }


def tiny_sd3(*, layers: int = 2, seed: int = 0) -> SD3Transformer2DModel:
    """SD3.5-like: RMS-normed queries and keys, dual attention in the first block."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=2 * HEAD_DIM,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return _draw(model, seed)


def sd3_inputs(
    *, batch: int = 1, image_hw: tuple[int, int] = (5, 7), text: int = 13, seed: int = 0
) -> dict[str, Tensor]:
    """`image_hw` counts patches of 2 x 2 latent pixels."""
    height, width = image_hw
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_DIM, generator=generator),
        "pooled_projections": torch.randn(batch, POOLED_DIM, generator=generator),
        "timestep": torch.full((batch,), 1000.0),
    }


def tiny_pipeline(*, guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline without text encoders: pass it `prompt_embeds` and `pooled_prompt_embeds`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=CHANNELS // 4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny_flux(guidance=guidance, seed=seed),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_demo() -> FluxPipeline:
    """The demo's pipeline with three of its ten blocks: captured sooner, and it draws no pictures
    of anything."""
    pipe = demo_pipeline()
    transformer = pipe.transformer
    transformer.transformer_blocks = transformer.transformer_blocks[:1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:2]
    transformer.register_to_config(num_layers=1, num_single_layers=2)
    return pipe


def small_demo_on(device: torch.device) -> tuple[FluxPipeline, dict[str, int]]:
    """What a server is told to serve."""
    return small_demo().to(device), {"max_sequence_length": TEXT_TOKENS}


def denoise(step, inputs: dict[str, Tensor], steps: int) -> Iterator[Tensor]:
    """A plain Euler loop: the latents after each step, `step` being called with all inputs."""
    sigmas = torch.linspace(1, 0, steps + 1)
    latents, scale = inputs["hidden_states"], inputs["timestep"][0]
    for now, then in pairwise(sigmas):
        timestep = (now * scale).expand(latents.shape[0])
        velocity = step(**inputs | {"hidden_states": latents, "timestep": timestep})
        latents = latents + (then - now) * velocity
        yield latents


def _draw(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            elif name.endswith("weight"):  # a norm's scale; on queries and keys it peaks attention
                weight.copy_(1.5 + 0.3 * noise)
            else:
                weight.copy_(0.3 * noise)
    return model.eval()


class Int8Weight(torch.Tensor):
    """A matrix as 8-bit integers, with a scale for each row, as quantization libraries wrap it.

    Attributes:
        values: (rows, columns), int8.
        scales: (rows, 1), of the dtype in which it computes.
        clipped: at how many standard deviations a row's values end.
    """

    values: Tensor
    scales: Tensor
    clipped: float

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor, clipped: float) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scales.dtype, device=values.device
        )

    def __init__(self, values: Tensor, scales: Tensor, clipped: float) -> None:
        self.values, self.scales, self.clipped = values, scales, clipped

    def __repr__(self) -> str:
        return f"Int8Weight({tuple(self.shape)}, clipped={self.clipped})"

    @classmethod
    def of(cls, weight: Tensor, clipped: float = 3.0) -> "Int8Weight":
        scales = clipped / 127 * weight.std(1, keepdim=True)
        values = (weight / scales).round().clamp(-127, 127)
        return cls(values.to(torch.int8), scales, clipped)

    def __tensor_flatten__(self):
        # A list, as many subclasses have it: it can be compared, not hashed.
        return ["values", "scales"], [self.clipped]

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scales"], *context)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            weight = args[0]
            return return_and_correct_aliasing(
                op, args, kwargs, cls(weight.values, weight.scales, weight.clipped)
            )
        plain = tree_map_only(cls, lambda x: x.values * x.scales, (args, kwargs or {}))
        return op(*plain[0], **plain[1])


def quantized(model: nn.Module) -> nn.Module:
    """The same model, with its linear layers' weights in 8 bits."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = Int8Weight.of(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model
