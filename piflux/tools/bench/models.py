"""Architectures of diffusers at full size with random weights, and what one denoise step is given.

A step is one pass of the transformer: where guidance takes two passes, a step of an image takes
two of these. Where there is no GPU a small model of the same class stands in for the full one.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Inputs = dict[str, Any]

TEXT_TOKENS = 512
"""Of a prompt, on a GPU; the pipelines of all these models take so many at most by default."""

SMALL_TEXT = 64


@dataclass(frozen=True)
class Make:
    """Makes a step's inputs, the same on every rank.

    Attributes:
        config: of the model.
        rows: of the picture, in tokens of 16 x 16 pixels; likewise `columns`.
        text: tokens of the prompt.
        device: where inputs are made; likewise `dtype`.
        frames: of a video's latents.
    """

    config: Mapping[str, Any]
    rows: int
    columns: int
    text: int
    device: torch.device | str
    dtype: torch.dtype
    frames: int

    def random(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=generator)

    def guidance(self) -> Tensor:
        return torch.full((1,), 3.5, device=self.device)

    def grid(self, axes: int) -> Tensor:
        """(rows * columns, axes): each image token's row and column, on the second and third."""
        ids = torch.zeros(self.rows, self.columns, axes)
        ids[..., 1] += torch.arange(self.rows)[:, None]
        ids[..., 2] += torch.arange(self.columns)
        return ids.view(-1, axes).to(self.device, self.dtype)

    def positions(self, axes: int) -> Tensor:
        """(text, axes): each text token's number, on the last axis."""
        ids = torch.zeros(self.text, axes)
        ids[:, -1] = torch.arange(self.text)
        return ids.to(self.device, self.dtype)


def _flux_1(make: Make) -> Inputs:
    return {
        "hidden_states": make.random(1, make.rows * make.columns, 64, seed=1),
        "encoder_hidden_states": make.random(
            1, make.text, make.config["joint_attention_dim"], seed=2
        ),
        "pooled_projections": make.random(1, make.config["pooled_projection_dim"], seed=3),
        "guidance": make.guidance(),
        "img_ids": make.grid(3),
        "txt_ids": torch.zeros(make.text, 3, device=make.device, dtype=make.dtype),
    }


def _flux_3(make: Make) -> Inputs:
    tokens, width = make.rows * make.columns, make.config["in_channels"]
    return {
        "hidden_states": make.random(1, tokens, width, seed=1),
        "encoder_hidden_states": make.random(
            1, make.text, make.config["joint_attention_dim"], seed=2
        ),
        "img_ids": make.grid(4),
        "txt_ids": make.positions(4),
    }


def _flux_2(make: Make) -> Inputs:
    return _flux_3(make) | {"guidance": make.guidance()}


def _qwen_image(make: Make) -> Inputs:
    tokens, width = make.rows * make.columns, make.config["in_channels"]
    return {
        "hidden_states": make.random(1, tokens, width, seed=1),
        "encoder_hidden_states": make.random(
            1, make.text, make.config["joint_attention_dim"], seed=2
        ),
        "img_shapes": [[(1, make.rows, make.columns)]],
    }


def _z_image(make: Make) -> Inputs:
    width, text = make.config["in_channels"], make.config["cap_feat_dim"]
    return {
        "x": make.random(width, 1, 2 * make.rows, 2 * make.columns, seed=1),
        "cap_feats": [make.random(make.text, text, seed=2)],
    }


def _wan(make: Make) -> Inputs:
    size = make.config["in_channels"], make.frames, 2 * make.rows, 2 * make.columns
    return {
        "hidden_states": make.random(1, *size, seed=1),
        "encoder_hidden_states": make.random(1, make.text, make.config["text_dim"], seed=2),
    }


@dataclass(frozen=True)
class Architecture:
    """One that diffusers has.

    Attributes:
        kind: the class, whose defaults are the full size unless `full` says otherwise.
        small: of the config, what makes the small model.
        inputs: what a step is given, but for the time.
        full: of the config, what makes the full model.
        latents: the input that an image is made of.
        clock: the input that is the time.
        listed: whether the model takes and gives lists of single pictures' latents.
        scale: the time at the first step.
        size: width and height in pixels of the usual picture.
        frames: of a usual video's latents.
    """

    kind: str
    small: Mapping[str, Any]
    inputs: Callable[[Make], Inputs]
    full: Mapping[str, Any] | None = None
    latents: str = "hidden_states"
    clock: str = "timestep"
    listed: bool = False
    scale: float = 1.0
    size: tuple[int, int] = (1024, 1024)
    frames: int = 1

    def config(self, *, full: bool) -> dict[str, Any]:
        return dict((self.full or {}) if full else self.small)

    def step(self, inputs: Inputs, latents: Tensor, time: Tensor) -> Inputs:
        """The keyword arguments of one call at `time`, (1,)."""
        given: Any = [latents] if self.listed else latents
        return inputs | {self.latents: given, self.clock: time, "return_dict": False}

    def predicted(self, result: Any) -> Tensor:
        """What a call gave, shaped like the latents."""
        found: Tensor = result[0][0] if self.listed else result[0]
        return found


FLUX_DEV: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL: dict[str, Any] = FLUX_DEV | {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "axes_dims_rope": (16, 24, 24),
}
_NARROW = {"attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64}

ARCHITECTURES = {
    "flux.1": Architecture("FluxTransformer2DModel", SMALL, _flux_1, FLUX_DEV),
    "flux.2": Architecture(
        "Flux2Transformer2DModel",
        _NARROW | {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (8, 8, 8, 8)},
        _flux_2,
    ),
    "flux.3": Architecture(
        "Flux3Transformer2DModel",
        _NARROW | {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (8, 8, 8, 8)},
        _flux_3,
    ),
    "qwen-image": Architecture(
        "QwenImageTransformer2DModel",
        _NARROW | {"num_layers": 2, "axes_dims_rope": (8, 12, 12)},
        _qwen_image,
    ),
    "z-image": Architecture(
        "ZImageTransformer2DModel",
        {
            "dim": 128,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 64,
            "axes_dims": [8, 12, 12],
        },
        _z_image,
        latents="x",
        clock="t",
        listed=True,
    ),
    "wan": Architecture(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "text_dim": 64,
            "freq_dim": 32,
            "ffn_dim": 256,
            "num_layers": 2,
        },
        _wan,
        scale=1000.0,
        size=(832, 480),
        frames=21,
    ),
}
"""By the names of `ways.MODELS`. Sizes are those of the pipelines' documentation: FLUX.1-dev,
FLUX.2-dev, FLUX.3, Qwen-Image, Z-Image, and Wan 2.1's 14B with 81 frames of 480p."""


def build(
    device: torch.device | str, on_gpu: bool, height: int, width: int, model: str = "flux.1"
) -> tuple[nn.Module, Inputs]:
    """The transformer with random weights, made on `device`, and its inputs at the first step.

    In bfloat16 and at full size on a GPU, small and in float32 elsewhere. FLUX.1's latents are
    (1, tokens, 64), its embeddings (1, 512, 4096) or (1, 64, 256).
    """
    architecture = ARCHITECTURES[model]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = architecture.config(full=on_gpu)
    transformer: Any = random_model(architecture.kind, config, device, dtype)
    make = _make(architecture, transformer.config, device, on_gpu, height, width)
    return transformer, architecture.inputs(make)


def _make(
    architecture: Architecture,
    config: Mapping[str, Any],
    device: torch.device | str,
    full: bool,
    height: int,
    width: int,
) -> Make:
    text = TEXT_TOKENS if full else SMALL_TEXT
    dtype = torch.bfloat16 if full else torch.float32
    frames = architecture.frames if full else min(architecture.frames, 2)
    return Make(config, height // 16, width // 16, text, device, dtype, frames)


def random_model(
    kind: str, config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A transformer of diffusers with random weights, the same on every rank, made on `device`."""
    import diffusers
    from accelerate import init_empty_weights

    # Buffers and tables are made for real: nothing but weights may be of any value.
    with init_empty_weights(include_buffers=False):
        model: nn.Module = getattr(diffusers, kind)(**config)
    model.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            weight = torch.empty(parameter.shape, dtype=dtype, device=device)
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return nn.Module.to(model, device)


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What attention becomes on CPUs, which torch's counter does not know."""


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def count_flops(model: str, full: bool, height: int, width: int) -> tuple[int, int]:
    """Of one step, outside of attentions and in them, by running it without values."""
    import diffusers

    architecture = ARCHITECTURES[model]
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
    with FakeTensorMode(), torch.no_grad():
        transformer = getattr(diffusers, architecture.kind)(**architecture.config(full=full)).eval()
        made = _make(architecture, transformer.config, "cpu", full, height, width)
        # In one dtype, weights' and inputs': which one is of no account here.
        inputs = architecture.inputs(replace(made, dtype=torch.float32))
        time = torch.full((1,), architecture.scale)
        with counter:
            transformer(**architecture.step(inputs, inputs[architecture.latents], time))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "attention" in op or "bmm" in op)
    return sum(counts.values()) - attention, attention


def attention_shape(model: str, full: bool, height: int, width: int) -> tuple[int, int, int]:
    """Of the largest attention of a step: tokens, heads and head dim."""
    architecture = ARCHITECTURES[model]
    frames = architecture.frames if full else min(architecture.frames, 2)
    text = TEXT_TOKENS if full else SMALL_TEXT
    tokens = height * width // 256 * frames + (0 if model == "wan" else text)
    config = _defaults(architecture) | architecture.config(full=full)
    if "n_heads" in config:
        return tokens, config["n_heads"], config["dim"] // config["n_heads"]
    return tokens, config["num_attention_heads"], config["attention_head_dim"]


def _defaults(architecture: Architecture) -> dict[str, Any]:
    import diffusers

    parameters = inspect.signature(getattr(diffusers, architecture.kind).__init__).parameters
    return {name: p.default for name, p in parameters.items()}


FLUX_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift": 3.0,
}


def random_flux(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """FLUX.1-dev's pipeline with random weights, and what its call needs beside a prompt.

    At full size in bfloat16 on a GPU, small and in float32 elsewhere. It has no text encoders: an
    embedding is noise whose seed is the prompt's checksum.
    """
    import diffusers

    class RandomFluxPipeline(diffusers.FluxPipeline):
        def encode_prompt(
            self,
            prompt: str | list[str],
            prompt_2: Any = None,
            device: Any = None,
            num_images_per_prompt: int = 1,
            prompt_embeds: Any = None,
            pooled_prompt_embeds: Any = None,
            max_sequence_length: int = 512,
            lora_scale: Any = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            config, dtype = self.transformer.config, self.transformer.dtype
            prompts = [prompt] if isinstance(prompt, str) else prompt
            drawn = []
            for each in prompts:
                generator = torch.Generator().manual_seed(zlib.crc32(each.encode()))
                shapes = (text, config.joint_attention_dim), (config.pooled_projection_dim,)
                drawn.append([torch.randn(shape, generator=generator) for shape in shapes])
            long, pooled = (torch.stack(x).to(device, dtype) for x in zip(*drawn, strict=True))
            return long, pooled, torch.zeros(text, 3, device=device, dtype=dtype)

    full = device.type == "cuda"
    text = TEXT_TOKENS if full else SMALL_TEXT
    dtype = torch.bfloat16 if full else torch.float32
    vae = FLUX_VAE | ({} if full else {"block_out_channels": (32,) * 4, "layers_per_block": 1})
    pipe = RandomFluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=random_model("AutoencoderKL", vae, device, dtype),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=random_model(
            "FluxTransformer2DModel", FLUX_DEV if full else SMALL, device, dtype
        ),
    )
    return pipe, {}
