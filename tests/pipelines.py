"""Tiny but real diffusers pipelines, drawn on one rank and over several.

Every part of a pipeline is built from its own class and config, with seeded random weights; only
the tokenizers are the demo model's. A `Case` draws images through its pipeline's own `__call__`; a
`Studio` says over how many ranks, and notes what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import diffusers
import torch
import transformers
from captures import captured_once
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from model_zoo import HEADS, ROPE, WIDTH, hunyuan_video, pixart, qwen_image, wan
from model_zoo import z_image as z_image_transformer
from models import HEAD_DIM, POOLED_DIM, TEXT_DIM, _draw, tiny_sd3
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from ranks import Failure
from torch import Tensor, nn
from torch._dynamo.utils import counters

import piflux
from piflux.demo import demo_file

DEMO_MODEL = demo_file("model")
LATENT = 4  # channels of the autoencoder's latents; four of its pixels make a token
TOKEN = 4 * LATENT
TEXT = 13
STEPS = 6
SIZE = {"height": 20, "width": 28}  # 5 x 7 tokens
PROMPT = {"prompt": "a red apple", "max_sequence_length": TEXT}

Pipeline = Any
Options = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """One image: its pixels, the latents after each step, the graphs compiled until then."""

    pixels: Tensor
    latents: list[Tensor]
    graphs: list[int]


@dataclass
class Studio:
    """Where images are drawn.

    Attributes:
        options: those of `parallelize`; None draws without piflux.
        images: what was drawn so far.
    """

    options: Options | None = None
    images: list[Drawn] = field(default_factory=list)

    def parallel(self, target: Any) -> Any:
        return target if self.options is None else piflux.parallelize(target, **self.options)

    def draw(
        self, pipe: Pipeline, seed: int = 0, *, old_callback: bool = False, **options: Any
    ) -> None:
        """One call of the pipeline; `old_callback` where it knows no `callback_on_step_end`."""
        latents: list[Tensor] = []
        graphs: list[int] = []
        before = counters["stats"]["unique_graphs"]

        def step_done(step: int, timestep: Any, now: Tensor) -> None:
            latents.append(now.clone())
            graphs.append(counters["stats"]["unique_graphs"] - before)

        def step_ended(pipe: Pipeline, step: int, timestep: Any, kwargs: Options) -> Options:
            step_done(step, timestep, kwargs["latents"])
            return {}

        call = SIZE | {
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "pt",
            "return_dict": False,
        }
        if old_callback:
            call["callback"] = step_done
        else:
            call["callback_on_step_end"] = step_ended
        self.images.append(Drawn(pipe(**call | options)[0], latents, graphs))


@dataclass(frozen=True)
class Case:
    """One row of the table of what is supported.

    Attributes:
        name: what is drawn.
        images: draws it in a studio, in one image or several.
        ranks: the numbers of ranks that it is drawn on.
        processes: whether they are processes, else ranks of one.
        error: the key part of the message that it fails with; empty if it is supported.
        late: graphs that steps after the first of an image compile, all of them in one image.
        remark: what else the row says.
    """

    name: str
    images: Callable[[Studio], None]
    ranks: tuple[int, ...] = (2,)
    processes: bool = False
    error: str = ""
    late: int = 0
    remark: str = ""


@captured_once()
def drawn_on(rank: int, group: Any, name: str) -> dict[str, list[Drawn] | Failure]:
    """A case's images by policy, or what it failed with."""
    return {policy: attempt(CASES[name], policy, group) for policy in ("gather", "rotate")}


def attempt(case: Case, policy: str, group: Any) -> list[Drawn] | Failure:
    studio = Studio({"group": group, "policy": policy, "inner": "eager"})
    try:
        case.images(studio)
    except Exception as error:
        return Failure.of(error)
    return studio.images


def plainly(name: str) -> list[Drawn]:
    """A case's images without piflux."""
    studio = Studio()
    CASES[name].images(studio)
    return studio.images


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """With weights that make every part matter."""
    return _draw(module, seed)


def picture(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random pixels, in blocks that survive being resized."""
    generator = torch.Generator().manual_seed(seed)
    shape = (height // 2, width // 2, 3) if mode == "RGB" else (height // 2, width // 2)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.NEAREST)


def mask(height: int, width: int) -> Image.Image:
    """White where to paint: the right half."""
    pixels = torch.zeros(height, width, dtype=torch.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels.numpy())


# ------------------------------------------------------------------------------------------ FLUX.1


def flux(*, inputs: int = TOKEN, guidance: bool = True) -> diffusers.FluxTransformer2DModel:
    """`inputs`: channels of a token, of which the first are the image's own."""
    model = diffusers.FluxTransformer2DModel(
        in_channels=inputs,
        out_channels=TOKEN,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance,
        axes_dims_rope=ROPE,
    )
    return drawn(model)


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    return vae.eval()


def clip(number: str = "", dim: int = POOLED_DIM, *, projects: bool = False) -> Options:
    """A CLIP encoder and its tokenizer; `number` is what their names in the pipeline end in."""
    tokenizer = tokenizers()["tokenizer"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=dim,
        bos_token_id=0,
        eos_token_id=1,
    )
    cls = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    return {f"tokenizer{number}": tokenizer, f"text_encoder{number}": drawn(cls(config))}


def t5(number: str = "_2") -> Options:
    """A T5 encoder, likewise."""
    tokenizer = tokenizers()["tokenizer_2"]
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return {
        f"tokenizer{number}": tokenizer,
        f"text_encoder{number}": drawn(transformers.T5EncoderModel(config)),
    }


@cache
def tokenizers() -> Options:
    return {
        name: transformers.AutoTokenizer.from_pretrained(DEMO_MODEL / name)
        for name in ("tokenizer", "tokenizer_2")
    }


def build(cls: type, **parts: Any) -> Pipeline:
    """A pipeline of FLUX.1; parts that are not given are those of FLUX.1-dev."""
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": autoencoder(),
        "transformer": flux(),
        **clip(),
        **t5(),
    } | parts
    return quiet(cls(**parts))


def quiet(pipe: Pipeline) -> Pipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dev(studio: Studio) -> None:
    """Two images, one after the other."""
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    studio.draw(pipe, **PROMPT)
    studio.draw(pipe, 1, **PROMPT)


def schnell(studio: Studio) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = {"transformer": flux(guidance=False), "scheduler": scheduler}
    pipe = studio.parallel(build(diffusers.FluxPipeline, **parts))
    studio.draw(pipe, **PROMPT, guidance_scale=0.0, num_inference_steps=4)


def true_guidance(studio: Studio) -> None:
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    studio.draw(pipe, **PROMPT, negative_prompt="a blue car", true_cfg_scale=2.0)


def other_sizes(studio: Studio) -> None:
    """A second resolution makes sizes symbols."""
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    for height, width in ((20, 28), (16, 24)):
        studio.draw(pipe, **PROMPT, height=height, width=width)


def image_to_image(studio: Studio) -> None:
    pipe = studio.parallel(build(diffusers.FluxImg2ImgPipeline))
    studio.draw(pipe, **PROMPT, image=picture(20, 28), strength=0.8)


def from_pipe(studio: Studio) -> None:
    """A plain pipeline around a parallel transformer, which tells images apart by its inputs."""
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(
        studio.parallel(build(diffusers.FluxPipeline))
    )
    for seed in range(2):
        studio.draw(quiet(pipe), seed, **PROMPT, image=picture(20, 28), strength=0.8)


def inpaint(studio: Studio) -> None:
    pipe = studio.parallel(build(diffusers.FluxInpaintPipeline))
    studio.draw(pipe, **PROMPT, image=picture(20, 28), mask_image=mask(20, 28), strength=0.8)


def fill(studio: Studio) -> None:
    """A token is the image's, the masked picture's and the mask's channels."""
    transformer = flux(inputs=2 * TOKEN + 16)
    pipe = studio.parallel(build(diffusers.FluxFillPipeline, transformer=transformer))
    studio.draw(pipe, **PROMPT, image=picture(20, 28), mask_image=mask(20, 28))


def control(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlPipeline, transformer=flux(inputs=2 * TOKEN))
    studio.draw(studio.parallel(pipe), **PROMPT, control_image=picture(20, 28))


def control_lora(studio: Studio) -> None:
    """Loaded into the parallelized pipeline, it doubles the channels that a token comes in with."""
    generator = torch.Generator().manual_seed(4)
    weights = {
        f"transformer.{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in {
            "x_embedder.lora_A": (2, 2 * TOKEN),
            "x_embedder.lora_B": (WIDTH, 2),
            "transformer_blocks.0.attn.to_k.lora_A": (2, WIDTH),
            "transformer_blocks.0.attn.to_k.lora_B": (WIDTH, 2),
        }.items()
    }
    pipe = studio.parallel(build(diffusers.FluxControlPipeline))
    pipe.load_lora_weights(weights)
    studio.draw(pipe, **PROMPT, control_image=picture(20, 28))


def control_image_to_image(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlImg2ImgPipeline, transformer=flux(inputs=2 * TOKEN))
    images = {"image": picture(20, 28), "control_image": picture(20, 28, 1)}
    studio.draw(studio.parallel(pipe), **PROMPT, **images, strength=0.8)


def control_inpaint(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlInpaintPipeline, transformer=flux(inputs=2 * TOKEN))
    images = {"image": picture(20, 28), "control_image": picture(20, 28, 1)}
    masked = images | {"mask_image": mask(20, 28)}
    studio.draw(studio.parallel(pipe), **PROMPT, **masked, strength=0.8)


def controlnet(modes: int | None = None, seed: int = 1) -> diffusers.FluxControlNetModel:
    model = diffusers.FluxControlNetModel(
        in_channels=TOKEN,
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
    return drawn(model, seed)


def one_controlnet(studio: Studio) -> None:
    """It acts on the first two thirds of the steps."""
    pipe = build(diffusers.FluxControlNetPipeline, controlnet=controlnet())
    options = {"control_image": picture(20, 28), "control_guidance_end": 0.67}
    studio.draw(studio.parallel(pipe), **PROMPT, **options)


def split_controlnet(studio: Studio) -> None:
    """The same with the network over the ranks, too."""
    pipe = studio.parallel(build(diffusers.FluxControlNetPipeline, controlnet=controlnet()))
    pipe.controlnet = studio.parallel(pipe.controlnet)
    options = {"control_image": picture(20, 28), "control_guidance_end": 0.67}
    studio.draw(pipe, **PROMPT, **options)


def two_controlnets(studio: Studio) -> None:
    both = [controlnet(), controlnet(seed=2)]
    pipe = studio.parallel(build(diffusers.FluxControlNetPipeline, controlnet=both))
    images = [picture(20, 28), picture(20, 28, 1)]
    scales = {"controlnet_conditioning_scale": [0.7, 0.5]}
    studio.draw(pipe, **PROMPT, **scales, control_image=images)


def union_controlnet(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlNetPipeline, controlnet=controlnet(modes=3))
    studio.draw(studio.parallel(pipe), **PROMPT, control_image=picture(20, 28), control_mode=2)


def two_union_modes(studio: Studio) -> None:
    """One network for two conditions."""
    pipe = build(diffusers.FluxControlNetPipeline, controlnet=[controlnet(modes=3)])
    images = [picture(20, 28), picture(20, 28, 1)]
    options = {"control_mode": [0, 2], "controlnet_conditioning_scale": [0.7, 0.5]}
    studio.draw(studio.parallel(pipe), **PROMPT, **options, control_image=images)


def controlnet_image_to_image(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlNetImg2ImgPipeline, controlnet=controlnet())
    images = {"image": picture(20, 28), "control_image": picture(20, 28, 1)}
    studio.draw(studio.parallel(pipe), **PROMPT, **images, strength=0.8)


def controlnet_inpaint(studio: Studio) -> None:
    pipe = build(diffusers.FluxControlNetInpaintPipeline, controlnet=controlnet())
    images = {"image": picture(20, 28), "control_image": picture(20, 28, 1)}
    masked = images | {"mask_image": mask(20, 28)}
    studio.draw(studio.parallel(pipe), **PROMPT, **masked, strength=0.8)


KONTEXT = PROMPT | {"max_area": 20 * 28, "_auto_resize": False}


def kontext(studio: Studio) -> None:
    """The tokens of a reference picture, of its own size, follow the image's."""
    pipe = studio.parallel(build(diffusers.FluxKontextPipeline))
    studio.draw(pipe, **KONTEXT, image=picture(16, 20))
    studio.draw(pipe, 1, **KONTEXT, image=picture(16, 20, 1))


def kontext_inpaint(studio: Studio) -> None:
    pipe = studio.parallel(build(diffusers.FluxKontextInpaintPipeline))
    images = {"image": picture(20, 28), "image_reference": picture(16, 20, 1)}
    masked = images | {"mask_image": mask(20, 28)}
    studio.draw(pipe, **KONTEXT, **masked, strength=0.8)


def redux(studio: Studio) -> None:
    """A picture's 27 x 27 tokens follow the prompt's 512."""
    config = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=54,
        patch_size=2,
    )
    embedder = diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(16, TEXT_DIM)
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=drawn(transformers.SiglipVisionModel(config)),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 54, "width": 54}),
        image_embedder=drawn(embedder),
        **clip(),
        **t5(),
    )
    prompt = prior(picture(20, 28), prompt=PROMPT["prompt"])
    assert prompt.prompt_embeds.shape[1] == 512 + 729
    no_encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = studio.parallel(build(diffusers.FluxPipeline, **no_encoders))
    studio.draw(pipe, **prompt)


def picture_encoder() -> Options:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=POOLED_DIM,
    )
    return {
        "image_encoder": drawn(transformers.CLIPVisionModelWithProjection(config)),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }


def ip_adapter_weights(seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """A picture's embedding becomes 4 tokens, which the one double block attends to."""
    generator = torch.Generator().manual_seed(seed)

    def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {
            name.replace("__", "."): torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for name, shape in shapes.items()
        }

    projection = weights(
        proj__weight=(4 * TEXT_DIM, POOLED_DIM),
        proj__bias=(4 * TEXT_DIM,),
        norm__weight=(TEXT_DIM,),
        norm__bias=(TEXT_DIM,),
    )
    attention = {
        f"0.{name}": value
        for name, value in weights(
            to_k_ip__weight=(WIDTH, TEXT_DIM),
            to_v_ip__weight=(WIDTH, TEXT_DIM),
            to_k_ip__bias=(WIDTH,),
            to_v_ip__bias=(WIDTH,),
        ).items()
    }
    return {"image_proj": projection, "ip_adapter": attention}


def ip_adapter(studio: Studio) -> None:
    """Loaded before the pipeline is parallelized; the negative prompt has a picture, too."""
    pipe = build(diffusers.FluxPipeline, **picture_encoder())
    pipe.load_ip_adapter(ip_adapter_weights(), weight_name="")
    pipe.set_ip_adapter_scale(0.5)
    pictures = {"ip_adapter_image": picture(16, 16), "negative_ip_adapter_image": mask(16, 16)}
    guided = {"negative_prompt": "a blue car", "true_cfg_scale": 2.0}
    studio.draw(studio.parallel(pipe), **PROMPT, **pictures, **guided)


def late_ip_adapter(studio: Studio) -> None:
    """Loaded into the parallelized pipeline, and unloaded again."""
    pipe = studio.parallel(build(diffusers.FluxPipeline, **picture_encoder()))
    studio.draw(pipe, **PROMPT)
    pipe.load_ip_adapter(ip_adapter_weights(), weight_name="")
    studio.draw(pipe, **PROMPT, ip_adapter_image=picture(16, 16))
    pipe.unload_ip_adapter()
    studio.draw(pipe, **PROMPT)


@cache
def lora(seed: int) -> dict[str, Tensor]:
    """A LoRA's state dict, as a file has it."""
    model = flux()
    torch.manual_seed(seed)
    targets = ["to_k", "proj_mlp", "add_q_proj"]
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    )
    return {f"transformer.{name}": x for name, x in get_peft_model_state_dict(model).items()}


def lora_before(studio: Studio) -> None:
    """Loaded before the pipeline is parallelized, drawn at half its scale."""
    pipe = build(diffusers.FluxPipeline)
    pipe.load_lora_weights(dict(lora(1)))
    studio.draw(studio.parallel(pipe), **PROMPT, joint_attention_kwargs={"scale": 0.5})


def lora_after(studio: Studio) -> None:
    """Loaded into the parallelized pipeline, after an image."""
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    studio.draw(pipe, **PROMPT)
    pipe.load_lora_weights(dict(lora(1)))
    studio.draw(pipe, **PROMPT)


def loras_swapped(studio: Studio) -> None:
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    for name, seed in (("one", 1), ("two", 2)):
        pipe.load_lora_weights(dict(lora(seed)), adapter_name=name)
    for names, weights in ((["one"], [1.0]), (["two"], [1.0]), (["one", "two"], [0.7, 0.4])):
        pipe.set_adapters(names, weights)
        studio.draw(pipe, **PROMPT)


def lora_fused(studio: Studio) -> None:
    """Fused into the weights, then taken out and unloaded."""
    pipe = studio.parallel(build(diffusers.FluxPipeline))
    pipe.load_lora_weights(dict(lora(1)))
    pipe.fuse_lora(lora_scale=0.8)
    studio.draw(pipe, **PROMPT)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    studio.draw(pipe, **PROMPT)


def step_cache(config: Callable[..., Any], studio: Studio, *, late: bool = False) -> None:
    """Enabled before the pipeline is parallelized, or else after an image."""
    pipe = build(diffusers.FluxPipeline)
    if late:
        pipe = studio.parallel(pipe)
        studio.draw(pipe, **PROMPT)
    pipe.transformer.enable_cache(config())
    studio.draw(pipe if late else studio.parallel(pipe), 1, **PROMPT)


def mag_cache() -> diffusers.MagCacheConfig:
    return diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS))


def pyramid_attention_broadcast() -> diffusers.PyramidAttentionBroadcastConfig:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


FLUX_1 = (
    Case("FLUX.1-dev", dev, processes=True),
    Case("FLUX.1-schnell", schnell, ranks=(2, 3)),
    Case("FLUX.1-dev, two resolutions", other_sizes),
    Case("FLUX.1-dev, negative prompt (true CFG)", true_guidance),
    Case("FLUX.1-dev, image to image", image_to_image),
    Case("FLUX.1-dev, image to image with `from_pipe`", from_pipe, processes=True),
    Case("FLUX.1-dev, inpainting", inpaint),
    Case("FLUX.1 Fill", fill),
    Case("FLUX.1 Control", control),
    Case("FLUX.1 Control LoRA", control_lora),
    Case("FLUX.1 Control, image to image", control_image_to_image),
    Case("FLUX.1 Control, inpainting", control_inpaint),
    Case("FLUX.1 ControlNet", one_controlnet),
    Case(
        "FLUX.1 ControlNet, parallelized itself",
        split_controlnet,
        late=1,
        remark="its scale is a Python number: the step that turns it off compiles once more",
    ),
    Case("FLUX.1 ControlNet, two networks", two_controlnets),
    Case("FLUX.1 ControlNet Union", union_controlnet),
    Case("FLUX.1 ControlNet Union, two modes", two_union_modes),
    Case("FLUX.1 ControlNet, image to image", controlnet_image_to_image),
    Case("FLUX.1 ControlNet, inpainting", controlnet_inpaint),
    Case("FLUX.1 Kontext", kontext, ranks=(2, 3)),
    Case("FLUX.1 Kontext, inpainting", kontext_inpaint),
    Case("FLUX.1 Redux", redux),
    Case("FLUX.1-dev, IP-Adapter", ip_adapter),
    Case("FLUX.1-dev, IP-Adapter loaded later", late_ip_adapter),
    Case("FLUX.1-dev, LoRA", lora_before),
    Case("FLUX.1-dev, LoRA loaded later", lora_after, processes=True),
    Case("FLUX.1-dev, LoRAs swapped between images", loras_swapped),
    Case("FLUX.1-dev, LoRA fused", lora_fused),
    Case(
        "FLUX.1-dev, First Block Cache",
        partial(step_cache, diffusers.FirstBlockCacheConfig),
        error="FirstBlockCacheConfig is enabled",
        remark="one graph is run in every step",
    ),
    Case(
        "FLUX.1-dev, First Block Cache enabled later",
        partial(step_cache, diffusers.FirstBlockCacheConfig, late=True),
        processes=True,
        error="FirstBlockCacheConfig is enabled",
    ),
    Case(
        "FLUX.1-dev, TaylorSeer Cache",
        partial(step_cache, diffusers.TaylorSeerCacheConfig),
        error="TaylorSeerCacheConfig is enabled",
    ),
    Case("FLUX.1-dev, MagCache", partial(step_cache, mag_cache), error="MagCacheConfig is enabled"),
    Case(
        "FLUX.1-dev, Pyramid Attention Broadcast",
        partial(step_cache, pyramid_attention_broadcast),
        error="PyramidAttentionBroadcastConfig is enabled",
    ),
)


# ------------------------------------------------------------------------------------------ FLUX.2


def build_2(cls: type, **parts: Any) -> Pipeline:
    """A pipeline of FLUX.2; parts that are not given are those of FLUX.2-dev."""
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": drawn(vae),
        "transformer": flux_2(),
        **mistral(),
    } | parts
    return quiet(cls(**parts))


def flux_2(*, guidance: bool = True) -> diffusers.Flux2Transformer2DModel:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=TOKEN,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return drawn(model)


# Three layers' hidden states, side by side, are the prompt's embeddings.
LAYERS = {"text_encoder_out_layers": (1, 2, 3)}
LANGUAGE = {
    "hidden_size": TEXT_DIM // 3,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def chatting_tokenizer() -> Any:
    """It takes messages for what they say."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL / "tokenizer_2")
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def mistral() -> Options:
    tokenizer = chatting_tokenizer()
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(vocab_size=len(tokenizer), **LANGUAGE),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    return {"tokenizer": tokenizer, "text_encoder": drawn(model)}


def klein(cls: type, *, distilled: bool = True) -> Pipeline:
    parts = {"transformer": flux_2(guidance=False), **qwen_3()}
    return build_2(cls, **parts, is_distilled=distilled)


def qwen_3(width: int = TEXT_DIM // 3) -> Options:
    tokenizer = chatting_tokenizer()
    options = LANGUAGE | {"hidden_size": width}
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), **options)
    model = transformers.Qwen3ForCausalLM(config)
    return {"tokenizer": tokenizer, "text_encoder": drawn(model)}


def dev_2(studio: Studio) -> None:
    pipe = studio.parallel(build_2(diffusers.Flux2Pipeline))
    studio.draw(pipe, **PROMPT, **LAYERS)
    studio.draw(pipe, 1, **PROMPT, **LAYERS)


def dev_2_edit(studio: Studio) -> None:
    """The tokens of two pictures of their own sizes follow the image's."""
    pipe = studio.parallel(build_2(diffusers.Flux2Pipeline))
    images = [picture(64, 80), picture(72, 64, 1)]
    studio.draw(pipe, **PROMPT, **LAYERS, image=images)


def klein_2(studio: Studio) -> None:
    pipe = studio.parallel(klein(diffusers.Flux2KleinPipeline))
    studio.draw(pipe, **PROMPT, **LAYERS, num_inference_steps=4)


def klein_2_base(studio: Studio) -> None:
    """With classifier-free guidance, in two passes."""
    pipe = studio.parallel(klein(diffusers.Flux2KleinPipeline, distilled=False))
    studio.draw(pipe, **PROMPT, **LAYERS, guidance_scale=3.0)


def klein_2_edit(studio: Studio) -> None:
    pipe = studio.parallel(klein(diffusers.Flux2KleinPipeline))
    studio.draw(pipe, **PROMPT, **LAYERS, image=picture(64, 80))


def klein_2_inpaint(studio: Studio) -> None:
    pipe = studio.parallel(klein(diffusers.Flux2KleinInpaintPipeline))
    images = {"image": picture(20, 28), "mask_image": mask(20, 28), "strength": 0.8}
    studio.draw(pipe, **PROMPT, **LAYERS, **images)


def klein_2_kv(studio: Studio) -> None:
    """The reference picture's keys and values are computed once."""
    pipe = studio.parallel(klein(diffusers.Flux2KleinKVPipeline))
    studio.draw(pipe, **PROMPT, **LAYERS, image=picture(64, 80))


FLUX_2 = (
    Case("FLUX.2-dev", dev_2, ranks=(2, 3)),
    Case("FLUX.2-dev, two reference pictures", dev_2_edit),
    Case("FLUX.2 Klein", klein_2, processes=True),
    Case("FLUX.2 Klein base, classifier-free guidance", klein_2_base),
    Case("FLUX.2 Klein, reference picture", klein_2_edit),
    Case("FLUX.2 Klein, inpainting", klein_2_inpaint),
    Case(
        "FLUX.2 Klein KV, reference picture",
        klein_2_kv,
        late=1,
        remark="the second step compiles the graph that reads the picture's keys and values",
    ),
)


# ------------------------------------------------------------------------------------------ others


def sd3() -> Pipeline:
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        transformer=tiny_sd3(),
        **clip("", 8, projects=True),
        **clip("_2", 8, projects=True),
        **t5("_3"),
    )
    return quiet(pipe)


def stable_diffusion_3(studio: Studio) -> None:
    """Classifier-free guidance in one pass of two."""
    pipe = studio.parallel(sd3())
    studio.draw(pipe, **PROMPT, negative_prompt="a blue car")
    studio.draw(pipe, 1, **PROMPT)


def skip_layer_guidance(studio: Studio) -> None:
    """The second step has a pass without the first block."""
    pipe = studio.parallel(sd3())
    studio.draw(pipe, **PROMPT, skip_guidance_layers=[0])


def qwen(studio: Studio) -> None:
    tokenizer = tokenizers()["tokenizer_2"]
    language = LANGUAGE | {"hidden_size": TEXT_DIM, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=language | {"head_dim": TEXT_DIM // 2, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_DIM,
        },
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=drawn(vae),
        text_encoder=drawn(transformers.Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=qwen_image(),
    )
    pipe = studio.parallel(quiet(pipe))
    prompts = PROMPT | {"negative_prompt": "a blue car and a tree", "max_sequence_length": 64}
    studio.draw(pipe, **prompts, true_cfg_scale=2.0)


def z() -> Pipeline:
    pipe = diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        transformer=z_image_transformer(),
        **qwen_3(TEXT_DIM),
    )
    return quiet(pipe)


def z_image(studio: Studio) -> None:
    """The first call makes rotary tables, in a way that Dynamo can't follow."""
    studio.draw(studio.parallel(z()), **PROMPT, guidance_scale=0.0)


def guided_z_image(studio: Studio) -> None:
    """In one pass of two prompts."""
    pipe = studio.parallel(z())
    studio.draw(pipe, **PROMPT, negative_prompt="a blue car", guidance_scale=3.0)


def pixart_sigma(studio: Studio) -> None:
    pipe = diffusers.PixArtSigmaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=autoencoder(),
        transformer=pixart(),
        **t5(""),
    )
    pipe = studio.parallel(quiet(pipe))
    options = {"height": 24, "width": 40, "use_resolution_binning": False, "clean_caption": False}
    studio.draw(pipe, **PROMPT, **options, old_callback=True)


def video(transformers_: Options, **options: Any) -> Pipeline:
    """Wan's, at half the size in space and time."""
    tokenizer = tokenizers()["tokenizer_2"]
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    pipe = diffusers.WanPipeline(
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=drawn(vae),
        text_encoder=drawn(transformers.UMT5EncoderModel(config)),
        tokenizer=tokenizer,
        **transformers_,
        **options,
    )
    return quiet(pipe)


VIDEO = PROMPT | {"height": 16, "width": 32, "num_frames": 3, "negative_prompt": "a blue car"}


def wan_text_to_video(studio: Studio) -> None:
    studio.draw(studio.parallel(video({"transformer": wan()})), **VIDEO)


def wan_experts(studio: Studio) -> None:
    """One transformer for the first half of the way, another for the second."""
    experts = {"transformer": wan(), "transformer_2": drawn(wan(), 1)}
    pipe = studio.parallel(video(experts, boundary_ratio=0.7))
    studio.draw(pipe, **VIDEO)


def wan_clocks(studio: Studio) -> None:
    studio.draw(studio.parallel(video({"transformer": wan()}, expand_timesteps=True)), **VIDEO)


def hunyuan(studio: Studio) -> None:
    tokenizer = tokenizers()["tokenizer_2"]
    language = LANGUAGE | {"hidden_size": TEXT_DIM, "vocab_size": len(tokenizer)}
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=drawn(vae),
        transformer=hunyuan_video(),
        text_encoder=drawn(transformers.LlamaModel(transformers.LlamaConfig(**language))),
        tokenizer=tokenizer,
        **clip("_2"),
    )
    pipe = studio.parallel(quiet(pipe))
    template = {"prompt_template": {"template": "{}", "crop_start": 0}}
    studio.draw(pipe, **PROMPT, **template, height=80, width=112, num_frames=5)


OTHERS = (
    Case("Stable Diffusion 3.5", stable_diffusion_3),
    Case(
        "Stable Diffusion 3.5, skip layer guidance",
        skip_layer_guidance,
        late=1,
        remark="the first step with a pass of fewer layers compiles its graph",
    ),
    Case("Qwen-Image, negative prompt (true CFG)", qwen),
    Case("Z-Image", z_image),
    Case("Z-Image, negative prompt", guided_z_image),
    Case("PixArt-Sigma", pixart_sigma),
    Case("Wan 2.1, text to video", wan_text_to_video, processes=True),
    Case(
        "Wan 2.2, two experts",
        wan_experts,
        late=1,
        remark="the second expert compiles at its own first step",
    ),
    Case("Wan 2.2, a time for each token", wan_clocks),
    Case("HunyuanVideo", hunyuan),
)

CASES = {case.name: case for case in FLUX_1 + FLUX_2 + OTHERS}
