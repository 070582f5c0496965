"""Every transformer class of diffusers, small, and called as its pipelines call it.

Each has its own configuration at depth 3 and all the inputs that pipelines give. Its weights are
drawn as those in `models` are. `support.py` says what came of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import torch
from model_zoo import Inputs, grid_ids, randn
from models import _draw
from torch import Tensor, nn

Options = dict[str, Any]

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
TEXT_DIM = 24
POOLED = 16
LATENT = 4  # channels
FRAMES = 2
HIGH, WIDE = 10, 14  # of latents; two by two are a token
TOKENS = (HIGH // 2) * (WIDE // 2)
TEXT = 13
DEPTH = 3
ROPE = (4, 4, 8)


@dataclass(frozen=True)
class Case:
    """One class.

    Attributes:
        options: its configuration.
        inputs: makes the keyword arguments of one call.
        clock: the one of them that says where on the way a step is.
        untried: why it is not tried; empty if it is.
        prepare: what its pipeline does to the model before the first call.
    """

    options: Options = field(default_factory=dict)
    inputs: Callable[[], Inputs] = dict
    clock: str = "timestep"
    untried: str = ""
    prepare: Callable[[Any], None] = lambda model: None


def build(name: str) -> nn.Module:
    """The model of `CLASSES[name]`."""
    model = getattr(diffusers, name)(**CLASSES[name].options)
    model = _draw(model, 0)
    CLASSES[name].prepare(model)
    return model


def called(model: Any, case: Case) -> Any:
    """What the model gives, as a tuple if it can."""
    options = signature(type(model).forward).parameters
    more = {"return_dict": False} if "return_dict" in options else {}
    return model(**case.inputs(), **more)


def picture(channels: int = LATENT, batch: int = 1, seed: int = 0) -> Tensor:
    return randn(batch, channels, HIGH, WIDE, seed=seed)


def video(channels: int = LATENT, batch: int = 1, frames: int = FRAMES, seed: int = 0) -> Tensor:
    return randn(batch, channels, frames, HIGH, WIDE, seed=seed)


def frames_first(channels: int = LATENT, batch: int = 1, seed: int = 0) -> Tensor:
    return video(channels, batch, seed=seed).transpose(1, 2).contiguous()


def tokens(channels: int = 4 * LATENT, batch: int = 1, seed: int = 0) -> Tensor:
    return randn(batch, TOKENS, channels, seed=seed)


def text(batch: int = 1, dim: int = TEXT_DIM, length: int = TEXT, seed: int = 1) -> Tensor:
    return randn(batch, length, dim, seed=seed)


def mask(batch: int = 1, length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    """The last tokens are padding."""
    found = torch.ones(batch, length, dtype=dtype)
    found[-1, length - 4 :] = 0
    return found


def time(batch: int = 1, at: float = 900.0) -> Tensor:
    return torch.full((batch,), at)


def axes(dims: int, length: int = TEXT) -> Tensor:
    """Positions of a text's tokens."""
    ids = torch.zeros(length, dims)
    ids[:, -1] = torch.arange(length)
    return ids


def rotary(length: int, dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """Cosines and sines as a pipeline makes them."""
    angles = torch.outer(torch.arange(length).float(), 1 / 10 ** torch.linspace(0, 2, dim // 2))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def shaped(**options: Any) -> Options:
    """The names that most classes have for the same things."""
    return {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": DEPTH} | (
        options
    )


def doubled(**options: Any) -> Options:
    """Likewise, of those with blocks of two kinds."""
    return shaped(num_layers=2, num_single_layers=DEPTH, **options)


def flux_like(*, guidance: bool = True, pooled: bool = True) -> Inputs:
    inputs = {
        "hidden_states": tokens(),
        "encoder_hidden_states": text(),
        "timestep": time(at=0.9),
        "img_ids": grid_ids(HIGH // 2, WIDE // 2, 3),
        "txt_ids": axes(3),
    }
    if guidance:
        inputs["guidance"] = torch.full((1,), 3.5)
    if pooled:
        inputs["pooled_projections"] = randn(1, POOLED, seed=2)
    return inputs


def flux2_like() -> Inputs:
    return flux_like(pooled=False) | {
        "img_ids": grid_ids(HIGH // 2, WIDE // 2, 4)[None],
        "txt_ids": axes(4)[None],
    }


def residuals(count: int, width: int = WIDTH, length: int = TOKENS) -> list[Tensor]:
    """As a ControlNet gives them."""
    return [randn(1, length, width, seed=20 + i) for i in range(count)]


def sizes(batch: int = 1) -> Inputs:
    size = torch.tensor([[8.0 * HIGH, 8.0 * WIDE]] * batch)
    return {
        "original_size": size,
        "target_size": size.clone(),
        "crop_coords": torch.zeros(batch, 2),
    }


WAN = shaped(
    in_channels=LATENT,
    out_channels=LATENT,
    text_dim=TEXT_DIM,
    freq_dim=16,
    ffn_dim=48,
    rope_max_seq_len=32,
)


def wan_like(channels: int = LATENT) -> Inputs:
    return {
        "hidden_states": video(channels),
        "timestep": time(),
        "encoder_hidden_states": text(),
    }


def from_image() -> Inputs:
    """A picture's embeddings, which Wan's models tell from the text by its 512 tokens."""
    return {
        "encoder_hidden_states": text(length=512),
        "encoder_hidden_states_image": randn(1, 9, TEXT_DIM, seed=2),
    }


WAN_IMAGE = {"image_dim": TEXT_DIM, "added_kv_proj_dim": WIDTH}


def anyflow() -> Inputs:
    """A time for each frame, and the one that the step leads to."""
    return wan_like() | {
        "hidden_states": frames_first(),
        "timestep": torch.full((1, FRAMES), 900.0),
        "r_timestep": torch.full((1, FRAMES), 700.0),
    }


HUNYUAN = doubled(
    in_channels=LATENT,
    out_channels=LATENT,
    num_refiner_layers=2,
    text_embed_dim=TEXT_DIM,
    pooled_projection_dim=POOLED,
    rope_axes_dim=ROPE,
)


def hunyuan() -> Inputs:
    return {
        "hidden_states": video(),
        "timestep": time(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(dtype=torch.long),
        "pooled_projections": randn(1, POOLED, seed=2),
        "guidance": time(at=6000.0),
    }


def hunyuan_15() -> Inputs:
    """Text without a picture: the picture's embeddings are zeros."""
    return {
        "hidden_states": video(2 * LATENT + 1),
        "timestep": time(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(dtype=torch.float32),
        "encoder_hidden_states_2": text(dim=20, length=6, seed=2),
        "encoder_attention_mask_2": mask(length=6, dtype=torch.float32),
        "image_embeds": torch.zeros(1, 5, TEXT_DIM),
    }


def framepack() -> Inputs:
    def indices(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count)

    return hunyuan() | {
        "hidden_states": video(frames=3),
        "image_embeds": text(length=5, seed=3),
        "indices_latents": indices(20, 3),
        "latents_clean": video(frames=2, seed=4),
        "indices_latents_clean": indices(0, 2),
        "latents_history_2x": video(frames=2, seed=5),
        "indices_latents_history_2x": indices(17, 2),
        "latents_history_4x": video(frames=4, seed=6),
        "indices_latents_history_4x": indices(1, 4),
    }


def helios() -> Inputs:
    def indices(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count)[None]

    return wan_like() | {
        "indices_hidden_states": indices(20, FRAMES),
        "indices_latents_history_short": indices(18, 2),
        "indices_latents_history_mid": indices(16, 2),
        "indices_latents_history_long": indices(0, 4),
        "latents_history_short": video(frames=2, seed=4),
        "latents_history_mid": video(frames=2, seed=5),
        "latents_history_long": video(frames=4, seed=6),
    }


COGVIDEO = shaped(
    in_channels=LATENT,
    out_channels=LATENT,
    time_embed_dim=16,
    text_embed_dim=TEXT_DIM,
    sample_width=WIDE,
    sample_height=HIGH,
    sample_frames=5,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
)


def cogvideo() -> Inputs:
    return {
        "hidden_states": frames_first(batch=2),
        "encoder_hidden_states": text(2),
        "timestep": time(2),
        "image_rotary_emb": rotary(FRAMES * TOKENS),
    }


def faces() -> Inputs:
    """A face: what tells whose it is, and how five layers of a picture encoder saw it."""
    return cogvideo() | {
        "id_cond": randn(2, 12, seed=3),
        "id_vit_hidden": [randn(2, 6, 20, seed=4 + i) for i in range(2)],
    }


def ltx() -> Inputs:
    return {
        "hidden_states": randn(2, FRAMES * HIGH * WIDE // 4, LATENT),
        "encoder_hidden_states": text(2),
        "timestep": time(2),
        "encoder_attention_mask": mask(2, dtype=torch.long),
        "num_frames": FRAMES,
        "height": HIGH // 2,
        "width": WIDE // 2,
        "rope_interpolation_scale": (0.3, 32, 32),
    }


def ltx2() -> Inputs:
    video_tokens = FRAMES * TOKENS
    return {
        "hidden_states": randn(2, video_tokens, LATENT),
        "audio_hidden_states": randn(2, 9, LATENT, seed=1),
        "encoder_hidden_states": text(2),
        "audio_encoder_hidden_states": text(2, seed=3),
        "timestep": torch.full((2, video_tokens), 900.0),
        "audio_timestep": time(2),
        "sigma": time(2),
        "encoder_attention_mask": mask(2, dtype=torch.long),
        "audio_encoder_attention_mask": mask(2, dtype=torch.long),
        "num_frames": FRAMES,
        "height": HIGH // 2,
        "width": WIDE // 2,
        "fps": 24.0,
        "audio_num_frames": 9,
    }


LTX2 = shaped(
    in_channels=LATENT,
    out_channels=LATENT,
    cross_attention_dim=WIDTH,
    audio_in_channels=LATENT,
    audio_out_channels=LATENT,
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    caption_channels=TEXT_DIM,
)


def kandinsky() -> Inputs:
    return {
        "hidden_states": randn(1, FRAMES, HIGH, WIDE, LATENT),
        "encoder_hidden_states": text(),
        "timestep": time(),
        "pooled_projections": randn(1, POOLED, seed=2),
        "visual_rope_pos": [
            torch.arange(FRAMES),
            torch.arange(HIGH // 2),
            torch.arange(WIDE // 2),
        ],
    }


def kandinsky_5() -> Inputs:
    return kandinsky() | {"text_rope_pos": torch.arange(TEXT), "scale_factor": (1.0, 2.0, 2.0)}


def kandinsky_6() -> Inputs:
    """Video with a picture to begin from, and sound."""
    return kandinsky() | {
        "hidden_states": randn(1, FRAMES, HIGH, WIDE, 2 * LATENT + 1),
        "audio_hidden_states": randn(1, 11, 6, seed=3),
        "encoder_attention_mask": mask(),
    }


def omnigen() -> Inputs:
    """A prompt and a time; of a second prompt, shorter, the beginning is padding."""
    length = TEXT + 1 + TOKENS
    seen = torch.zeros(2, length, length)
    padding = torch.tensor([0, 4])
    for i, pad in enumerate(padding):
        causal = torch.ones(TEXT + 1, TEXT + 1).tril()
        seen[i, : TEXT + 1, : TEXT + 1] = causal
        seen[i, TEXT + 1 :] = 1
        seen[i, :, :pad] = 0
        seen[i, :pad, 0] = 1
    positions = torch.stack([(torch.arange(length) - pad).clamp(min=0) for pad in padding])
    return {
        "hidden_states": picture(batch=2),
        "timestep": time(2, 0.9),
        "input_ids": torch.arange(2 * TEXT).reshape(2, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen,
        "position_ids": positions,
    }


def ideogram() -> Inputs:
    """One row of text and image tokens, each with zeros where the other is."""
    length = TEXT + TOKENS
    image, prompt = torch.zeros(1, length, 16), torch.zeros(1, length, TEXT_DIM)
    image[:, TEXT:], prompt[:, :TEXT] = tokens(), text()
    positions = torch.zeros(1, length, 3, dtype=torch.long)
    positions[:, :TEXT] = torch.arange(TEXT)[:, None]
    positions[0, TEXT:] = grid_ids(HIGH // 2, WIDE // 2, 3).long() + 100
    kinds = torch.full((1, length), 2)
    kinds[:, :TEXT] = 3
    return {
        "hidden_states": image,
        "timestep": time(at=0.5),
        "encoder_hidden_states": prompt,
        "position_ids": positions,
        "segment_ids": torch.ones(1, length, dtype=torch.long),
        "indicator": kinds,
    }


def cosmos(**more: Any) -> Inputs:
    return {
        "hidden_states": video(),
        "timestep": time(at=0.9),
        "encoder_hidden_states": text(),
        "fps": 24,
        "padding_mask": torch.zeros(1, 1, HIGH, WIDE),
    } | more


def cosmos_3() -> Inputs:
    """A prompt that is read causally, and a video that sees all of it."""
    count = FRAMES * TOKENS
    vision = torch.arange(TEXT, TEXT + count)
    grid = grid_ids(HIGH // 2, WIDE // 2, 3).T.long()
    frames = [grid + torch.tensor([[100 + 10 * i], [0], [0]]) for i in range(FRAMES)]
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.arange(TEXT).expand(3, -1), *frames], dim=1),
        "und_len": TEXT,
        "sequence_length": TEXT + count,
        "vision_tokens": [video()],
        "vision_token_shapes": [(FRAMES, HIGH // 2, WIDE // 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((count,), 900.0),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
    }


def animate() -> Inputs:
    """Poses and a face for each frame but the first, which is the reference picture."""
    return (
        wan_like()
        | from_image()
        | {
            "hidden_states": video(2 * LATENT + 4, frames=3),
            "pose_hidden_states": video(frames=2, seed=3),
            "face_pixel_values": randn(1, 3, 5, 16, 16, seed=4),
        }
    )


def minimax_h3() -> Inputs:
    """Text, sound and a video packed into one sequence, each with its own time."""
    sound, count = 7, FRAMES * TOKENS
    length = TEXT + sound + count
    tags = torch.cat([torch.full((n,), i) for i, n in enumerate((TEXT, count, sound))])
    return {
        "hidden_states": randn(1, count, 4 * LATENT),
        "audio_hidden_states": randn(1, sound, 6, seed=1),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.0, 900.0]),
        "timestep_indices": (tags > 0).long(),
        "token_tags": tags,
        "position_ids": torch.stack([torch.arange(length)] * 3, dim=1),
        "text_indices": torch.arange(TEXT),
        "video_indices": torch.arange(TEXT, TEXT + count),
        "audio_indices": torch.arange(TEXT + count, length),
    }


def qwen(channels: int = 4 * LATENT) -> Inputs:
    return {
        "hidden_states": tokens(channels, 2),
        "encoder_hidden_states": text(2),
        "encoder_hidden_states_mask": mask(2),
        "timestep": time(2, 0.9),
        "img_shapes": [[(1, HIGH // 2, WIDE // 2)]] * 2,
    }


def pixart() -> Inputs:
    return {
        "hidden_states": picture(batch=2),
        "encoder_hidden_states": text(2),
        "encoder_attention_mask": mask(2, dtype=torch.long),
        "timestep": time(2),
    }


CLASSES: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 6,
        },
        lambda: {
            "hidden_states": randn(2, 30, 8),
            "timestep": time(2, 0.9),
            "timestep_r": time(2, 0.9),
            "encoder_hidden_states": text(2, WIDTH),
            "context_latents": randn(2, 30, 16, seed=3),
        },
    ),
    "AllegroTransformer3DModel": Case(
        shaped(
            attention_head_dim=24,
            in_channels=LATENT,
            out_channels=LATENT,
            cross_attention_dim=48,
            sample_width=WIDE,
            sample_height=HIGH,
            sample_frames=FRAMES,
            caption_channels=TEXT_DIM,
        ),
        lambda: {
            "hidden_states": video(batch=2),
            "encoder_hidden_states": text(2),
            "timestep": time(2),
            "attention_mask": torch.ones(2, FRAMES, HIGH, WIDE, dtype=torch.long),
            "encoder_attention_mask": mask(2, dtype=torch.long),
            "image_rotary_emb": allegro_table(),
        },
    ),
    "AnyFlowFARTransformer3DModel": Case(
        WAN | {"compressed_patch_size": (1, 2, 2)},
        lambda: anyflow() | {"chunk_partition": [1, 1]},
    ),
    "AnyFlowTransformer3DModel": Case(WAN, anyflow),
    "AuraFlowTransformer2DModel": Case(
        {
            "sample_size": 16,
            "in_channels": LATENT,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": DEPTH,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT_DIM,
            "caption_projection_dim": WIDTH,
            "out_channels": LATENT,
            "pos_embed_max_size": 64,
        },
        lambda: {
            "hidden_states": picture(batch=2),
            "encoder_hidden_states": text(2),
            "timestep": time(2, 0.9),
        },
    ),
    "BriaFibo2Transformer2DModel": Case(
        {
            "in_channels": LATENT,
            "dim": WIDTH,
            "n_layers": DEPTH,
            "n_refiner_layers": 2,
            "n_heads": HEADS,
            "cap_feat_dim": TEXT_DIM,
            "injection_layer_ids": (1,),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": ROPE,
            "axes_lens": (64, 32, 32),
        },
        lambda: {
            "hidden_states": picture(),
            "timestep": time(at=0.9),
            "encoder_hidden_states": randn(1, 2, TEXT, TEXT_DIM, seed=1),
            "context_latents": [picture(seed=2)],
        },
    ),
    "BriaFiboTransformer2DModel": Case(
        doubled(
            in_channels=16,
            joint_attention_dim=2 * TEXT_DIM,
            text_encoder_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
        ),
        lambda: (
            flux_like(guidance=False, pooled=False)
            | {
                "encoder_hidden_states": text(dim=2 * TEXT_DIM),
                "text_encoder_layers": [text(seed=5 + i) for i in range(2 + DEPTH)],
                "joint_attention_kwargs": {
                    "attention_mask": torch.zeros(1, 1, TEXT + TOKENS, TEXT + TOKENS)
                },
            }
        ),
    ),
    "BriaTransformer2DModel": Case(
        doubled(in_channels=16, joint_attention_dim=TEXT_DIM, axes_dims_rope=ROPE),
        lambda: (
            flux_like(guidance=False, pooled=False) | {"controlnet_block_samples": residuals(2)}
        ),
    ),
    "ChromaTransformer2DModel": Case(
        doubled(
            in_channels=16,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=2,
        ),
        lambda: (
            flux_like(guidance=False, pooled=False)
            | {"attention_mask": torch.cat([mask(), torch.ones(1, TOKENS, dtype=torch.bool)], 1)}
        ),
    ),
    "ChronoEditTransformer3DModel": Case(
        WAN | WAN_IMAGE | {"in_channels": 2 * LATENT + 4},
        lambda: wan_like(2 * LATENT + 4) | from_image(),
    ),
    "CogVideoXTransformer3DModel": Case(COGVIDEO, cogvideo),
    "CogView3PlusTransformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
        ),
        lambda: pixart_like_cogview(),
    ),
    "CogView4Transformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=16,
            rope_axes_dim=(16, 16),
        ),
        lambda: pixart_like_cogview() | {"attention_mask": mask(2, dtype=torch.long)},
    ),
    "ConsisIDTransformer3DModel": Case(
        COGVIDEO
        | {
            "is_train_face": True,
            "is_kps": False,
            "num_layers": 4,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12,
            "LFE_vit_dim": 20,
            "LFE_depth": 4,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 5,
            "LFE_output_dim": WIDTH * 2 // 3,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 2,
        },
        faces,
    ),
    "Cosmos3OmniTransformer": Case(
        {
            "head_dim": HEAD_DIM,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "latent_channel": LATENT,
            "latent_patch_size": 2,
            "num_attention_heads": HEADS,
            "num_hidden_layers": DEPTH,
            "num_key_value_heads": 1,
            "patch_latent_dim": 4 * LATENT,
            "rope_axes_dim": [4, 2, 2],
            "vocab_size": 64,
        },
        cosmos_3,
        clock="vision_timesteps",
    ),
    "CosmosTransformer3DModel": Case(
        shaped(
            in_channels=LATENT + 1,
            out_channels=LATENT,
            mlp_ratio=2,
            text_embed_dim=TEXT_DIM,
            adaln_lora_dim=8,
            max_size=(4, 16, 16),
            concat_padding_mask=False,  # which takes torchvision
        ),
        lambda: cosmos(condition_mask=torch.zeros(1, 1, FRAMES, HIGH, WIDE)),
    ),
    "DiTTransformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=2 * LATENT,
            num_embeds_ada_norm=10,
            sample_size=10,
            norm_type="ada_norm_zero",
        ),
        lambda: {
            "hidden_states": randn(2, LATENT, 10, 10),
            "timestep": time(2),
            "class_labels": torch.tensor([3, 10]),
        },
    ),
    "DreamLiteTransformer2DModel": Case(
        shaped(
            in_channels=WIDTH,
            norm_num_groups=4,
            cross_attention_dim=TEXT_DIM,
            use_linear_projection=True,
            qk_norm="rms_norm",
        ),
        lambda: {
            "hidden_states": randn(2, WIDTH, 5, 7),
            "encoder_hidden_states": text(2),
            "encoder_attention_mask": mask(2, dtype=torch.long),
        },
        clock="",
    ),
    "EasyAnimateTransformer3DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            patch_size=2,
            mmdit_layers=2,
            time_embed_dim=16,
            text_embed_dim=TEXT_DIM,
            sample_width=WIDE,
            sample_height=HIGH,
        ),
        lambda: {
            "hidden_states": video(batch=2),
            "timestep": time(2),
            "encoder_hidden_states": text(2),
        },
    ),
    "ErnieImageTransformer2DModel": Case(
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_layers": DEPTH,
            "ffn_hidden_size": 48,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": TEXT_DIM,
            "rope_axes_dim": ROPE,
        },
        lambda: {
            "hidden_states": randn(2, 16, 5, 7),
            "timestep": time(2),
            "text_bth": text(2),
            "text_lens": torch.tensor([TEXT, TEXT - 4]),
        },
    ),
    "Flux2Transformer2DModel": Case(
        doubled(
            in_channels=16,
            joint_attention_dim=TEXT_DIM,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        flux2_like,
    ),
    "Flux3Transformer2DModel": Case(
        doubled(
            in_channels=16,
            cond_in_channels=16,
            joint_attention_dim=TEXT_DIM,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        lambda: {
            "hidden_states": tokens(),
            "encoder_hidden_states": text(),
            "timestep": time(at=0.9),
            "img_ids": grid_ids(HIGH // 2, WIDE // 2, 4),
            "txt_ids": axes(4),
            "image_cond_hidden_states": randn(1, 20, 16, seed=2),
            "image_cond_ids": grid_ids(4, 5, 4) + 10,
        },
    ),
    "FluxTransformer2DModel": Case(
        doubled(
            in_channels=16,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=ROPE,
        ),
        lambda: (
            flux_like()
            | {
                "controlnet_block_samples": residuals(2),
                "controlnet_single_block_samples": residuals(DEPTH),
            }
        ),
    ),
    "GlmImageTransformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=64,
        ),
        lambda: {
            "hidden_states": picture(batch=2),
            "encoder_hidden_states": text(2),
            "prior_token_id": torch.arange(2 * TOKENS).reshape(2, TOKENS) % 64,
            "prior_token_drop": torch.zeros(2, TOKENS, dtype=torch.bool),
            "timestep": time(2),
            "target_size": torch.tensor([[80.0, 112.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
    ),
    "HeliosTransformer3DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            text_dim=TEXT_DIM,
            freq_dim=16,
            ffn_dim=48,
            rope_dim=ROPE,
        ),
        helios,
    ),
    "HiDreamImageTransformer2DModel": Case(
        doubled(
            patch_size=2,
            in_channels=LATENT,
            out_channels=LATENT,
            caption_channels=[TEXT_DIM, 20],
            text_emb_dim=POOLED,
            num_routed_experts=3,
            num_activated_experts=2,
            axes_dims_rope=ROPE,
            max_resolution=(16, 16),
            llama_layers=(0, 1, 1, 0, 1),
        ),
        lambda: {
            "hidden_states": picture(batch=2),
            "timesteps": time(2),
            "encoder_hidden_states_t5": text(2, length=6),
            "encoder_hidden_states_llama3": randn(2, 2, 6, 20, seed=3),
            "pooled_embeds": randn(2, POOLED, seed=2),
        },
        clock="timesteps",
    ),
    "HunyuanDiT2DModel": Case(
        shaped(
            num_layers=4,
            sample_size=16,
            patch_size=2,
            in_channels=LATENT,
            hidden_size=WIDTH,
            cross_attention_dim=TEXT_DIM,
            cross_attention_dim_t5=TEXT_DIM,
            pooled_projection_dim=POOLED,
            text_len=7,
            text_len_t5=6,
        ),
        lambda: {
            "hidden_states": picture(batch=2),
            "timestep": time(2),
            "encoder_hidden_states": text(2, length=7),
            "text_embedding_mask": mask(2, 7, torch.long),
            "encoder_hidden_states_t5": text(2, length=6, seed=2),
            "text_embedding_mask_t5": mask(2, 6, torch.long),
            "image_meta_size": torch.tensor([[80.0, 112.0, 80.0, 112.0, 0.0, 0.0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": rotary(TOKENS),
        },
    ),
    "HunyuanImageTransformer2DModel": Case(
        doubled(
            in_channels=16,
            out_channels=16,
            num_refiner_layers=2,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=20,
            rope_axes_dim=(8, 8),
            guidance_embeds=True,
            use_meanflow=True,
        ),
        lambda: {
            "hidden_states": randn(1, 16, 5, 7),
            "timestep": time(),
            "timestep_r": time(at=800.0),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(dtype=torch.long),
            "encoder_hidden_states_2": text(dim=20, length=6, seed=2),
            "encoder_attention_mask_2": mask(length=6, dtype=torch.long),
            "guidance": time(at=3500.0),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        shaped(
            in_channels=2 * LATENT + 1,
            out_channels=LATENT,
            num_refiner_layers=2,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=20,
            image_embed_dim=TEXT_DIM,
            rope_axes_dim=ROPE,
            task_type="t2v",
        ),
        hunyuan_15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        HUNYUAN
        | {"has_image_proj": True, "image_proj_dim": TEXT_DIM, "has_clean_x_embedder": True},
        framepack,
    ),
    "HunyuanVideoTransformer3DModel": Case(HUNYUAN, hunyuan),
    "Ideogram4Transformer2DModel": Case(
        shaped(
            in_channels=16,
            intermediate_size=48,
            adaln_dim=16,
            llm_features_dim=TEXT_DIM,
            mrope_section=(4, 2, 2),
        ),
        ideogram,
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {
            "in_channels": LATENT,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_DIM,
            "num_layers": DEPTH,
            "rope_dim_list": list(ROPE),
        },
        lambda: {
            "hidden_states": randn(1, TOKENS + 20, LATENT, 1, 2, 2),
            "timestep": time(),
            "encoder_hidden_states": text(),
            "encoder_hidden_states_mask": mask(),
            "shape_list": [[(1, 5, 7), (1, 4, 5)]],
        },
    ),
    "JoyImageEditTransformer3DModel": Case(
        {
            "in_channels": LATENT,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_DIM,
            "num_layers": DEPTH,
            "rope_dim_list": list(ROPE),
        },
        lambda: {
            "hidden_states": video(),
            "timestep": time(),
            "encoder_hidden_states": text(),
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        {
            "in_visual_dim": LATENT,
            "out_visual_dim": LATENT,
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": POOLED,
            "time_dim": 16,
            "model_dim": WIDTH,
            "ff_dim": 48,
            "num_visual_blocks": DEPTH,
            "axes_dims": ROPE,
        },
        kandinsky_5,
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {
            "in_visual_dim": LATENT,
            "out_visual_dim": 16,
            "time_dim": 16,
            "model_dim": WIDTH,
            "ff_dim": 48,
            "num_visual_blocks": DEPTH,
            "axes_dims": ROPE,
            "nabla_window": (3, 1, 1),
        },
        lambda: {
            "hidden_states": randn(1, FRAMES, 16, 16, 2 * LATENT + 1),
            "timestep": time(),
        },
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            "in_visual_dim": LATENT,
            "out_visual_dim": LATENT,
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": POOLED,
            "time_dim": 16,
            "model_dim": WIDTH,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": DEPTH,
            "axes_dims": ROPE,
            "in_audio_dim": 6,
            "out_audio_dim": 6,
        },
        kandinsky_6,
    ),
    "Krea2Transformer2DModel": Case(
        shaped(
            in_channels=16,
            num_key_value_heads=1,
            intermediate_size=48,
            timestep_embed_dim=16,
            text_hidden_dim=TEXT_DIM,
            num_text_layers=4,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=32,
            axes_dims_rope=ROPE,
        ),
        lambda: {
            "hidden_states": tokens(),
            "encoder_hidden_states": randn(1, TEXT, 4, TEXT_DIM, seed=1),
            "timestep": time(at=0.9),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(5, 7, 3)]),
            "encoder_attention_mask": mask(),
        },
    ),
    "LTX2VideoTransformer3DModel": Case(LTX2, ltx2),
    "LTXVideoTransformer3DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_DIM,
        ),
        ltx,
    ),
    "LatteTransformer3DModel": Case(
        shaped(
            sample_size=10,
            patch_size=2,
            in_channels=LATENT,
            out_channels=2 * LATENT,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_DIM,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
            video_length=3,
        ),
        lambda: {
            "hidden_states": randn(2, LATENT, 3, 10, 10),
            "timestep": time(2),
            "encoder_hidden_states": text(2),
            "enable_temporal_attentions": True,
        },
    ),
    "LongCatAudioDiTTransformer": Case(
        {
            "dit_dim": WIDTH,
            "dit_depth": DEPTH,
            "dit_heads": HEADS,
            "dit_text_dim": TEXT_DIM,
            "latent_dim": 8,
        },
        lambda: {
            "hidden_states": randn(2, 30, 8),
            "encoder_hidden_states": text(2),
            "encoder_attention_mask": mask(2),
            "timestep": time(2, 0.9),
            "attention_mask": torch.ones(2, 30, dtype=torch.bool),
            "latent_cond": randn(2, 30, 8, seed=2),
        },
    ),
    "LongCatImageTransformer2DModel": Case(
        doubled(
            in_channels=16,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
        ),
        lambda: flux_like(pooled=False),
    ),
    "Lumina2Transformer2DModel": Case(
        {
            "sample_size": 16,
            "in_channels": LATENT,
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_refiner_layers": 2,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": ROPE,
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": TEXT_DIM,
        },
        lambda: {
            "hidden_states": picture(),
            "timestep": time(at=0.1),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(),
        },
    ),
    "LuminaNextDiT2DModel": Case(
        {
            "sample_size": 16,
            "in_channels": LATENT,
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_attention_heads": HEADS,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": TEXT_DIM,
        },
        lambda: {
            "hidden_states": picture(batch=2),
            "timestep": time(2, 0.1),
            "encoder_hidden_states": text(2),
            "encoder_mask": mask(2),
            "image_rotary_emb": lumina_table(),
            "cross_attention_kwargs": {},
        },
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {
            "num_attention_heads": HEADS,
            "attention_head_dim": HEAD_DIM,
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": LATENT,
            "audio_in_channels": 6,
            "text_dim": TEXT_DIM,
            "freq_dim": 16,
            "time_embed_hidden_dim": WIDTH,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        minimax_h3,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_attention_heads": HEADS,
            "intermediate_size": 48,
            "audio_vocab_size": 32,
        },
        lambda: {"inputs_embeds": randn(2, 8, WIDTH)},
        clock="",
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        shaped(
            in_channels=8,
            condition_dim=16,
            ff_inner_dim=48,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        lambda: {
            "hidden_states": randn(2, 8, 30),
            "timestep": time(2, 0.5),
            "encoder_hidden_states": randn(2, 30, 16, seed=1),
        },
    ),
    "MochiTransformer3DModel": Case(
        shaped(
            pooled_projection_dim=POOLED,
            in_channels=LATENT,
            text_embed_dim=TEXT_DIM,
            time_embed_dim=16,
            max_sequence_length=TEXT,
        ),
        lambda: {
            "hidden_states": video(batch=2),
            "encoder_hidden_states": text(2),
            "timestep": time(2),
            "encoder_attention_mask": mask(2),
        },
    ),
    "MotifVideoTransformer3DModel": Case(
        doubled(
            in_channels=2 * LATENT + 1,
            out_channels=LATENT,
            num_decoder_layers=1,
            text_embed_dim=TEXT_DIM,
            image_embed_dim=20,
            rope_axes_dim=ROPE,
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda: {
            "hidden_states": video(2 * LATENT + 1),
            "timestep": time(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(),
            "image_embeds": randn(1, 5, 20, seed=2),
        },
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        shaped(
            in_channels=16,
            out_channels=LATENT,
            num_layers=5,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
            num_experts=4,
            moe_intermediate_dim=16,
            mlp_ratio=6.0,
            capacity_factors=[2.0] * 5,
        ),
        lambda: qwen() | {"img_shapes": [(1, HIGH // 2, WIDE // 2)] * 2},
    ),
    "OmniGenTransformer2DModel": Case(
        {
            "in_channels": LATENT,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": 48,
            "num_layers": DEPTH,
            "pad_token_id": 0,
            "vocab_size": 64,
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        omnigen,
    ),
    "OvisImageTransformer2DModel": Case(
        doubled(
            in_channels=16,
            out_channels=16,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
        ),
        lambda: flux_like(guidance=False, pooled=False),
    ),
    "PRXTransformer2DModel": Case(
        {
            "in_channels": LATENT,
            "context_in_dim": TEXT_DIM,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "depth": DEPTH,
            "axes_dim": [8, 8],
        },
        lambda: {
            "hidden_states": picture(batch=2),
            "timestep": time(2, 0.9),
            "encoder_hidden_states": text(2),
            "attention_mask": mask(2),
        },
    ),
    "PixArtTransformer2DModel": Case(
        shaped(
            num_attention_heads=3,
            in_channels=LATENT,
            out_channels=2 * LATENT,
            cross_attention_dim=3 * HEAD_DIM,
            sample_size=16,
            caption_channels=TEXT_DIM,
            use_additional_conditions=True,
        ),
        lambda: (
            pixart()
            | {
                "added_cond_kwargs": {
                    "resolution": torch.tensor([[80.0, 112.0]] * 2),
                    "aspect_ratio": torch.full((2, 1), 5 / 7),
                }
            }
        ),
    ),
    "PriorTransformer": Case(
        shaped(embedding_dim=16, num_embeddings=TEXT, additional_embeddings=4),
        lambda: {
            "hidden_states": randn(2, 16),
            "timestep": time(2),
            "proj_embedding": randn(2, 16, seed=2),
            "encoder_hidden_states": randn(2, TEXT, 16, seed=3),
            "attention_mask": mask(2),
        },
    ),
    "QwenImage21Transformer2DModel": Case(
        shaped(
            in_channels=16,
            out_channels=16,
            context_in_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
        ),
        lambda: {
            "hidden_states": randn(1, 24, 16),
            "encoder_hidden_states": text(),
            "encoder_hidden_states_mask": mask(),
            "timestep": time(at=0.9),
            "img_shapes": [[(1, 4, 6)]],
            "img_mask": torch.tensor([[False] * TEXT + [True] * 6]),
        },
    ),
    "QwenImageTransformer2DModel": Case(
        shaped(
            in_channels=16,
            out_channels=LATENT,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=ROPE,
        ),
        lambda: (
            qwen()
            | {
                "controlnet_block_samples": [
                    randn(2, TOKENS, WIDTH, seed=9 + i) for i in range(DEPTH)
                ]
            }
        ),
    ),
    "RFD4ProteinaTransformer": Case(
        untried="its inputs are molecules, which its own preprocessing makes of files of structures"
    ),
    "SD3Transformer2DModel": Case(
        shaped(
            sample_size=16,
            in_channels=LATENT,
            out_channels=LATENT,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        lambda: {
            "hidden_states": picture(batch=2),
            "encoder_hidden_states": text(2),
            "pooled_projections": randn(2, POOLED, seed=2),
            "timestep": time(2),
            "block_controlnet_hidden_states": [
                randn(2, TOKENS, WIDTH, seed=9 + i) for i in range(2)
            ],
        },
    ),
    "SanaTransformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_DIM,
            sample_size=16,
        ),
        lambda: {
            "hidden_states": picture(batch=2),
            "encoder_hidden_states": text(2),
            "encoder_attention_mask": mask(2, dtype=torch.long),
            "timestep": time(2),
        },
    ),
    "SanaVideoTransformer3DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=LATENT,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=HEAD_DIM,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_DIM,
            sample_size=16,
            rope_max_seq_len=32,
        ),
        lambda: {
            "hidden_states": video(),
            "encoder_hidden_states": text(),
            "encoder_attention_mask": mask(dtype=torch.long),
            "timestep": time(),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        LTX2,
        lambda: {
            "hidden_states": randn(1, FRAMES * TOKENS, LATENT),
            "encoder_hidden_states": text(),
            "timestep": torch.full((1, FRAMES * TOKENS), 900.0),
            "video_rotary_emb": tuple(x[None] for x in rotary(FRAMES * TOKENS, WIDTH)),
            "encoder_attention_mask": mask(dtype=torch.long),
        },
    ),
    "SanaWMTransformer3DModel": Case(
        {
            "in_channels": LATENT,
            "num_layers": 2 * DEPTH,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "linear_head_dim": HEAD_DIM,
            "softmax_every_n": 2,
            "caption_channels": TEXT_DIM,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
        },
        lambda: {
            "hidden_states": video(),
            "timestep": torch.full((1, 1, FRAMES), 900.0),
            "encoder_hidden_states": randn(1, 1, TEXT, TEXT_DIM, seed=1),
            "encoder_attention_mask": mask(dtype=torch.long),
        },
    ),
    "SkyReelsV2Transformer3DModel": Case(
        WAN | WAN_IMAGE | {"inject_sample_info": True},
        lambda: wan_like() | from_image() | {"fps": torch.ones(1, dtype=torch.long)},
    ),
    "StableAudio3DiTModel": Case(
        {
            "io_channels": 8,
            "embed_dim": WIDTH,
            "depth": DEPTH,
            "num_heads": HEADS,
            "cond_token_dim": TEXT_DIM,
            "global_cond_dim": 16,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 16,
            "num_memory_tokens": 5,
        },
        lambda: {
            "hidden_states": randn(2, 8, 30),
            "timestep": time(2, 0.5),
            "encoder_hidden_states": text(2),
            "global_hidden_states": randn(2, 16, seed=2),
            "encoder_attention_mask": mask(2),
            "local_add_cond": randn(2, 9, 30, seed=3),
        },
    ),
    "StableAudioDiTModel": Case(
        shaped(
            sample_size=30,
            in_channels=8,
            out_channels=8,
            num_key_value_attention_heads=1,
            cross_attention_dim=WIDTH,
            time_proj_dim=16,
            global_states_input_dim=20,
            cross_attention_input_dim=TEXT_DIM,
        ),
        lambda: {
            "hidden_states": randn(2, 8, 30),
            "timestep": time(2, 0.5),
            "encoder_hidden_states": text(2),
            "global_hidden_states": randn(2, 1, 20, seed=2),
            "rotary_embedding": rotary(31, HEAD_DIM // 2),
        },
    ),
    "T5FilmDecoder": Case(
        {
            "input_dims": 8,
            "targets_length": 32,
            "d_model": WIDTH,
            "num_layers": DEPTH,
            "num_heads": HEADS,
            "d_kv": HEAD_DIM,
            "d_ff": 48,
        },
        lambda: {
            "encodings_and_masks": [(text(1, WIDTH), mask(dtype=torch.long))],
            "decoder_input_tokens": randn(1, 32, 8),
            "decoder_noise_time": time(at=0.9),
        },
        clock="decoder_noise_time",
    ),
    "Transformer2DModel": Case(
        shaped(
            in_channels=LATENT,
            out_channels=2 * LATENT,
            sample_size=16,
            patch_size=2,
            cross_attention_dim=WIDTH,
            caption_channels=TEXT_DIM,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
            use_additional_conditions=False,
        ),
        lambda: pixart() | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "TransformerTemporalModel": Case(
        shaped(in_channels=WIDTH, norm_num_groups=4, cross_attention_dim=None),
        lambda: {"hidden_states": randn(6, WIDTH, 5, 7), "num_frames": 3},
        clock="",
    ),
    "WanAnimate2Transformer3DModel": Case(
        {
            "text_len": TEXT,
            "in_dim": 2 * LATENT + 4,
            "dim": WIDTH,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": TEXT_DIM,
            "out_dim": LATENT,
            "num_heads": HEADS,
            "num_layers": DEPTH,
        },
        lambda: {
            "hidden_states": [randn(LATENT, FRAMES, HIGH, WIDE)],
            "timestep": time(),
            "encoder_hidden_states": [text()[0]],
            "condition_latents": [randn(LATENT + 4, FRAMES, HIGH, WIDE, seed=2)],
            "encoder_hidden_states_image": randn(1, 5, 1280, seed=3),
            "kv_cache": _wan_cache(),
            "kv_cache_mode": "extract",
            "seq_len": FRAMES * TOKENS,
            "offset_grid_sizes": torch.tensor([[FRAMES, HIGH // 2, WIDE // 2]]),
        },
    ),
    "WanAnimateTransformer3DModel": Case(
        WAN
        | WAN_IMAGE
        | {
            "in_channels": 2 * LATENT + 4,
            "latent_channels": LATENT,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "num_layers": 4,
        },
        animate,
    ),
    "WanTransformer3DModel": Case(WAN | WAN_IMAGE, lambda: wan_like() | from_image()),
    "WanVACETransformer3DModel": Case(
        WAN | {"vace_layers": [0, 2], "vace_in_channels": 6},
        lambda: (
            wan_like()
            | {
                "control_hidden_states": video(6, seed=3),
                "control_hidden_states_scale": torch.ones(2),
            }
        ),
    ),
    "ZImageTransformer2DModel": Case(
        {
            "in_channels": LATENT,
            "dim": WIDTH,
            "n_layers": DEPTH,
            "n_refiner_layers": 2,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT_DIM,
            "axes_dims": list(ROPE),
            "axes_lens": [128, 32, 32],
        },
        lambda: {
            "x": [randn(LATENT, 1, HIGH, WIDE, seed=i) for i in range(2)],
            "cap_feats": [randn(n, TEXT_DIM, seed=10 + i) for i, n in enumerate((TEXT, 20))],
            "t": time(2, 0.5),
        },
        clock="t",
    ),
}


def pixart_like_cogview() -> Inputs:
    return {
        "hidden_states": picture(batch=2),
        "encoder_hidden_states": text(2),
        "timestep": time(2),
    } | sizes(2)


def allegro_table() -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    grid = (HIGH // 2, WIDE // 2)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), grid), grid, FRAMES)
    return tuple(tables), tuple(torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None])


def lumina_table() -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(HEAD_DIM, 32, 32)


def _wan_cache() -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(DEPTH)
