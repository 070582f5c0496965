"""A small FLUX pipeline of piflux's own, built from configs alone: for demos and tests on CPUs."""

from __future__ import annotations

import math

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

IMAGE_SIZE = 512
"""Pixels a side that the demo draws: 1024 image tokens."""

TEXT_TOKENS = 64
"""`max_sequence_length` of the demo's calls."""

WEIGHTS_NOTE = "The weights are random: the image shows a texture, not the prompt."
"""What every program that shows the pipeline's images has to say beside them."""

_POOLED_DIM = 128  # of CLIP's pooled embedding
_TEXT_DIM = 256  # of T5's token embeddings


def demo_pipeline(seed: int = 0) -> FluxPipeline:
    """FLUX in small: every part of the real pipeline, with random weights, nothing downloaded.

    The transformer has 4 double and 8 single blocks of 4 heads of 64, takes guidance, and computes
    most of what a call costs. Sizes must be divisible by 16, as with FLUX.1-dev.

    Args:
        seed: of the weights. The global random state is left as it was.

    Returns:
        A pipeline in float32 on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_clip(),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5(),
            tokenizer_2=ByT5Tokenizer(),
            transformer=_transformer(),
        )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=64,  # 16 latent channels, 2 x 2 packed
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=_TEXT_DIM,
        pooled_projection_dim=_POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    return _variance_preserving(model)


def _vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return _variance_preserving(model)


def _variance_preserving(model: nn.Module) -> nn.Module:
    """PyTorch's own initialisation shrinks activations layer by layer, down to a grey image."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=_POOLED_DIM,
            projection_dim=_POOLED_DIM,
            intermediate_size=4 * _POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: 256 bytes, the same at the end of a word, start and end."""
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384,  # ByT5's: 256 bytes, 3 special tokens and 125 sentinels
            d_model=_TEXT_DIM,
            d_kv=64,
            d_ff=2 * _TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
