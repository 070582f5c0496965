"""The small FLUX before it is trained: every part of the pipeline, its sizes and its tokenizers."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

IMAGE_SIZE = 256  # pixels a side: 32 x 32 latents, 256 tokens
TEXT_TOKENS = 24  # what the T5 tokenizer pads captions to; the longest has fewer
LATENT_CHANNELS = 16
POOLED_DIM = 192  # of CLIP's pooled embedding
TEXT_DIM = 256  # of T5's token embeddings


def build_pipeline(captions: Iterable[str], seed: int = 0) -> FluxPipeline:
    """An untrained pipeline in float32 on the CPU, with tokenizers that know `captions`."""
    captions = sorted(set(captions))
    torch.manual_seed(seed)
    clip_tokenizer = _clip_tokenizer(captions)
    t5_tokenizer = _t5_tokenizer(captions)
    return FluxPipeline(
        # FLUX.1-dev's: more steps at high noise, the more tokens the more of them.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=_clip(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=_transformer(),
    )


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,  # 2 x 2 latents are one token
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    # Every block starts as the identity and the prediction as 0 (adaLN-Zero, Peebles & Xie 2023,
    # section 3.2): gates, shifts and scales grow from nothing.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if ".norm" in name or name.startswith(("norm_out", "proj_out")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=LATENT_CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # set when it is trained
        shift_factor=0.0,
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_DIM,
            projection_dim=POOLED_DIM,
            intermediate_size=2 * POOLED_DIM,
            num_hidden_layers=2,
            num_attention_heads=3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=64,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def _clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, its merges learned from the captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    untrained = CLIPTokenizer(vocab={start: 0, end: 1}, merges=[]).backend_tokenizer
    learner.normalizer, learner.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1024,
            end_of_word_suffix="</w>",
            special_tokens=[start, end],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    vocab = model["vocab"]
    # The learner knows those ends of words that it saw; any prompt must be encodable.
    for symbol in alphabet:
        vocab.setdefault(f"{symbol}</w>", len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """T5's unigram model over whole words, with letters for words that no caption has.

    Written down rather than learned, since the learner would split words as common as
    'background'. Unlike T5's it lowers letters, all that it knows being lower case.
    """
    splits = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words = Counter(
        word for caption in captions for word, _ in splits.pre_tokenize_str(caption.lower())
    )
    total = words.total()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", math.log(n / total)) for word, n in words.most_common()]
    known = {piece for piece, _ in pieces}
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation, "\u2581"]
    # Worse than any word, so that letters serve only where no word does.
    pieces += [(letter, -2 * math.log(total)) for letter in letters if letter not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    metaspace = {"replacement": "\u2581", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splits, pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )
