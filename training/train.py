"""Train the small FLUX pipeline, stage after stage: `python training/train.py STAGE --help`.

    autoencoder   pictures <-> latents
    flow          text encoders and transformer: flow matching on latents
    distill       classifier-free guidance into the guidance embedding
    export        a folder for FluxPipeline.from_pretrained

A stage runs for the minutes it is given, ends with a checkpoint in `--state`, and goes on from
there when it is run again. Learning rates fall to their end by the minutes in `--schedule`, not by
steps, so that a run of known length is used to its last second.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from data import COLOURS, Dataset, caption, compose, held_out, load, random_placement
from diffusers import FluxPipeline
from model import IMAGE_SIZE, TEXT_TOKENS, build_pipeline
from muon import Muon
from torch import Tensor, nn

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Sprites = Annotated[Path, typer.Option(help="What `data.py build` wrote.")]
State = Annotated[Path, typer.Option(help="The folder of checkpoints.")]
Minutes = Annotated[float, typer.Option(help="How long this run trains.")]
Planned = Annotated[float, typer.Option(help="How long all runs of the stage train together.")]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DROPPED = 0.1  # of the captions, for classifier-free guidance
SHORT = 0.15  # of the captions: the name alone, "red apple" or "a red apple"
PLAIN_GUIDANCE = 1.0  # what the guidance embedding is told before distillation
SAVE_EVERY = 2.0  # minutes
GUIDANCE = (1.0, 6.0)  # the range it learns to follow


@app.command()
def autoencoder(
    sprites: Sprites,
    state: State,
    minutes: Minutes = 2.0,
    schedule: Planned = 2.0,
    batch: int = 64,
) -> None:
    """Train the autoencoder, then set its shift and scale so that latents have mean 0 and std 1."""
    data, vae = _open(sprites), _pipeline(sprites).vae.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, fused=True, weight_decay=1e-3)
    run = Run("autoencoder", state, minutes, schedule, {"vae": vae, "optimizer": optimizer})

    @torch.compile
    def loss_of(pictures: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample.float()
        error = drawn - pictures
        across, down = error.diff(dim=-1), error.diff(dim=-2)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        # L1 on differences of neighbours keeps edges sharp where L1 on values blurs them.
        loss = error.abs().mean() + across.abs().mean() + down.abs().mean() + 1e-4 * kl
        return loss, error.square().mean()

    for progress in run.steps():
        _set_rate(optimizer, _rate(progress, run.step, peak=1e-3))
        pictures, *_ = _draw(data, batch)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, mse = loss_of(pictures.contiguous(memory_format=torch.channels_last))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if run.step % 100 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            run.log(loss=loss.item(), psnr=psnr)

    vae.eval()
    with torch.no_grad():
        latents = torch.cat([_encode(vae, _draw(data, 64)[0]) for _ in range(32)]).float()
        unseen, *_ = _draw(data, 64, held=True)
        mse = (vae.decode(_encode(vae, unseen).float()).sample - unseen).square().mean()
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
    run.save(config={"shift_factor": round(shift, 4), "scaling_factor": round(scale, 4)})
    run.log(held_out_psnr=10 * math.log10(4 / mse.item()), shift=shift, scale=scale)


@app.command()
def flow(
    sprites: Sprites,
    state: State,
    minutes: Minutes = 9.0,
    schedule: Planned = 18.0,
    batch: int = 512,
    pictures: Annotated[int, typer.Option(help="How many are drawn and encoded ahead.")] = 98304,
) -> None:
    """Train transformer and text encoders by flow matching (Lipman et al. 2023)."""
    pipe = _trained(sprites, state)
    net = Net(pipe).to(DEVICE)
    matrices, others = _by_optimizer(net)
    muon = Muon(matrices, lr=0.0)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ema = copy.deepcopy(net).requires_grad_(False)
    run = Run(
        "flow", state, minutes, schedule, {"net": net, "ema": ema, "muon": muon, "adam": adam}
    )
    set_ = Encoded(sprites, state, pipe, pictures)
    judged = Encoded(sprites, state, pipe, 1024, held=True)
    for progress in run.steps():
        rate = _rate(progress, run.step, peak=3e-3)
        _set_rate(muon, rate)
        _set_rate(adam, rate / 2)
        latents, texts = set_.batch(batch)
        loss = net.loss(latents, *texts)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        muon.step()
        adam.step()
        muon.zero_grad()
        adam.zero_grad()
        _follow(ema, net, run.step, 0.999)
        if run.step % 100 == 0:
            run.log(loss=loss.item(), rate=rate)
        if run.step % 1000 == 0:
            run.log(held_out_loss=_judge(ema, judged))
    run.save()
    run.log(held_out_loss=_judge(ema, judged))


@app.command()
def distill(
    sprites: Sprites,
    state: State,
    minutes: Minutes = 3.0,
    schedule: Planned = 3.0,
    batch: int = 256,
    pictures: int = 16384,
) -> None:
    """Teach the guidance embedding what two passes give (Meng et al. 2023), from the flow's EMA."""
    pipe = _trained(sprites, state)
    teacher = Net(pipe).to(DEVICE)
    teacher.load_state_dict(_checkpoint(state, "flow")["ema"])
    teacher.requires_grad_(False)
    net = copy.deepcopy(teacher)
    net.transformer.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        net.transformer.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    ema = copy.deepcopy(net).requires_grad_(False)
    run = Run("distill", state, minutes, schedule, {"net": net, "ema": ema, "optimizer": optimizer})
    set_ = Encoded(sprites, state, pipe, pictures)
    for progress in run.steps():
        _set_rate(optimizer, _rate(progress, run.step, peak=2e-4))
        latents, (clip_ids, t5_ids) = set_.batch(batch)
        sigma, _, noisy = _noised(latents)
        scale = torch.empty(batch, device=DEVICE).uniform_(*GUIDANCE)
        with torch.no_grad():
            none = [x.expand_as(y) for x, y in zip(set_.empty, (clip_ids, t5_ids), strict=True)]
            with_, without = (
                teacher(noisy, sigma, torch.full_like(sigma, PLAIN_GUIDANCE), *teacher.text(*ids))
                for ids in ((clip_ids, t5_ids), none)
            )
            wanted = without + scale[:, None, None] * (with_ - without)
            text = net.text(clip_ids, t5_ids)
        loss = F.mse_loss(net(noisy, sigma, scale, *text), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(net.transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _follow(ema, net, run.step, 0.999)
        if run.step % 100 == 0:
            run.log(loss=loss.item())
    run.save()


@app.command()
def export(
    sprites: Sprites,
    state: State,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    stage: Annotated[str, typer.Option(help="'distill', or 'flow' before it.")] = "distill",
) -> None:
    """Write the averaged weights in bfloat16, in files of less than 16 MB.

    After 'flow' guidance is without effect: the transformer knows one value of it, and what it
    would make of others is noise.
    """
    pipe = _trained(sprites, state)
    # Its modules are the pipeline's own, which are so loaded in place.
    Net(pipe).load_state_dict(_checkpoint(state, stage, "cpu")["ema"])
    if stage == "flow":
        _ignore_guidance(pipe.transformer)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.to("cpu", torch.bfloat16)
    pipe.save_pretrained(out, max_shard_size="15MB")


@torch.no_grad()
def _ignore_guidance(transformer: nn.Module) -> None:
    embedding = transformer.time_text_embed
    # The transformer embeds a thousand times what it is given.
    plain = embedding.time_proj(torch.tensor([1000 * PLAIN_GUIDANCE]))
    constant = embedding.guidance_embedder(plain)[0]
    embedding.guidance_embedder.linear_2.weight.zero_()
    embedding.guidance_embedder.linear_2.bias.copy_(constant)


class Net(nn.Module):
    """What is trained on latents: the text encoders and the transformer."""

    def __init__(self, pipe: FluxPipeline) -> None:
        super().__init__()
        self.clip, self.t5 = pipe.text_encoder, pipe.text_encoder_2
        self.transformer = pipe.transformer
        side = IMAGE_SIZE // 16
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_TOKENS, 3), persistent=False)

    def text(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, TEXT_TOKENS) tokens each -> (B, POOLED_DIM), (B, TEXT_TOKENS, TEXT_DIM)."""
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.clip(clip_ids).pooler_output, self.t5(t5_ids).last_hidden_state

    def forward(
        self, noisy: Tensor, sigma: Tensor, guidance: Tensor, pooled: Tensor, text: Tensor
    ) -> Tensor:
        """The velocity at packed latents, both (B, 256, 64); sigma and guidance are (B,)."""
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return _predict(
                self.transformer,
                noisy,
                sigma,
                guidance,
                pooled,
                text,
                self.image_ids,
                self.text_ids,
            ).float()

    def loss(self, latents: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        sigma, noise, noisy = _noised(latents)
        plain = torch.full_like(sigma, PLAIN_GUIDANCE)
        return F.mse_loss(self(noisy, sigma, plain, *self.text(clip_ids, t5_ids)), noise - latents)


@torch.compile
def _predict(
    transformer: nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    pooled: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
) -> Tensor:
    return transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]


class Encoded:
    """Captioned pictures as packed latents, on the GPU.

    Attributes:
        empty: the tokens of the empty caption for either encoder, each (1, tokens).
    """

    def __init__(
        self, sprites: Path, state: Path, pipe: FluxPipeline, count: int, held: bool = False
    ) -> None:
        data, vae = _open(sprites), pipe.vae.to(DEVICE).eval()
        names, config = data.names, pipe.vae.config
        captions = [""]
        captions += [f"{article}{name}" for name in names for article in ("", "a ")]
        captions += [caption(n, s, c) for n in names for s in data.styles for c in COLOURS]
        # The pipeline pads CLIP's tokens to 77, but what comes after the end has no effect on it.
        padded = {"padding": "max_length", "max_length": TEXT_TOKENS, "return_tensors": "pt"}
        self._ids = [t(captions, **padded).input_ids for t in (pipe.tokenizer, pipe.tokenizer_2)]
        self._ids = [ids.to(DEVICE) for ids in self._ids]
        if any(ids.shape[1] != TEXT_TOKENS for ids in self._ids):
            raise ValueError(f"a caption has more than {TEXT_TOKENS} tokens")
        self.empty = [ids[:1] for ids in self._ids]
        self._names, self._styles = len(names), len(data.styles)
        latents, whats = [], []
        with torch.no_grad():
            for _ in range(0, count, 256):
                drawn, *what = _draw(data, 256, held)
                x = _encode(vae, drawn)
                x = (x - config.shift_factor) * config.scaling_factor
                latents.append(FluxPipeline._pack_latents(x, *x.shape).bfloat16())
                whats.append(torch.stack(what))
        self.latents = torch.cat(latents)
        self._what = torch.cat(whats, dim=1)
        self.shuffle()

    def shuffle(self) -> None:
        self._deck = torch.randperm(len(self.latents), device=DEVICE)

    def batch(self, size: int, drop: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Latents (size, 256, 64) in float32 and both encoders' tokens, each (size, tokens)."""
        if len(self._deck) < size:
            self.shuffle()
        chosen, self._deck = self._deck[:size], self._deck[size:]
        concept, style, colour = self._what[:, chosen]
        whole = 1 + 2 * self._names + (concept * self._styles + style) * len(COLOURS) + colour
        if drop:
            luck = torch.rand(size, device=DEVICE)
            article = (torch.rand(size, device=DEVICE) < 0.5).long()
            whole = torch.where(luck < DROPPED + SHORT, 1 + 2 * concept + article, whole)
            whole = torch.where(luck < DROPPED, 0, whole)
        return self.latents[chosen].float(), [ids[whole] for ids in self._ids]


class Run:
    """One run of a stage: its clock, its log and its checkpoint."""

    def __init__(
        self, stage: str, state: Path, minutes: float, schedule: float, parts: dict[str, Any]
    ) -> None:
        self.stage, self.path, self.parts = stage, state / f"{stage}.pt", parts
        self.minutes, self.schedule = minutes, schedule
        self.step, self.trained, self.extra = 0, 0.0, {}
        state.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            saved = _checkpoint(state, stage)
            self.step, self.trained = saved["step"], saved["trained"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        self._logged = (self.step, time.perf_counter())

    def steps(self) -> Iterator[float]:
        """Yields the share of the schedule that is over, until this run's minutes are."""
        before, saved, start = self.trained, self.trained, None
        while True:
            yield min(1.0, self.trained / self.schedule)
            self.step += 1
            if start is None:  # compilation is not training
                _wait()
                start = time.perf_counter()
                self._logged = (self.step, start)
            if self.step % 10 == 0:
                _wait()
            passed = (time.perf_counter() - start) / 60
            self.trained = before + passed
            if passed >= self.minutes:
                return
            if self.trained >= saved + SAVE_EVERY:
                saved = self.trained
                self.save()

    def log(self, **values: float) -> None:
        now, (step, then) = time.perf_counter(), self._logged
        if self.step > step:
            values["ms"] = 1000 * (now - then) / (self.step - step)
        self._logged = (self.step, now)
        line = {"stage": self.stage, "step": self.step, "minutes": round(self.trained, 2)}
        line |= {name: float(f"{value:.4g}") for name, value in values.items()}
        print(json.dumps(line), flush=True)
        with (self.path.parent / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, **extra: Any) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"step": self.step, "trained": self.trained, **parts, **extra}, self.path)


@functools.cache
def _open(sprites: Path) -> Dataset:
    data = load(sprites)
    data = dataclasses.replace(data, sprites=data.sprites.to(DEVICE))
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward with CLIP's mask reads out of bounds
    torch.set_float32_matmul_precision("high")
    return data


def _pipeline(sprites: Path) -> FluxPipeline:
    data = _open(sprites)
    return build_pipeline(
        caption(n, s, c) for n in data.names for s in data.styles for c in COLOURS
    )


def _trained(sprites: Path, state: Path) -> FluxPipeline:
    """The pipeline with its trained autoencoder."""
    pipe = _pipeline(sprites)
    saved = _checkpoint(state, "autoencoder", "cpu")
    pipe.vae.load_state_dict(saved["vae"])
    pipe.vae.register_to_config(**saved["config"])
    return pipe


def _checkpoint(state: Path, stage: str, device: torch.device | str = DEVICE) -> dict[str, Any]:
    return torch.load(state / f"{stage}.pt", map_location=device, weights_only=True)


def _wait() -> None:
    """Until the device has done what it was given: time is what it took, not what it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _draw(data: Dataset, count: int, held: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pictures (count, 3, 256, 256) in [-1, 1]; concept, style and colour (count,)."""
    mask = torch.ones(len(data.names), len(data.styles), dtype=torch.bool, device=DEVICE)
    for concept, style in held_out(data.names):
        mask[concept, style] = False
    pairs = (~mask if held else mask).nonzero()
    concept, style = pairs[torch.randint(len(pairs), (count,), device=DEVICE)].unbind(1)
    colour = torch.randint(len(COLOURS), (count,), device=DEVICE)
    palette = torch.tensor([*COLOURS.values()], device=DEVICE)
    placement = random_placement(count, DEVICE)
    pictures = compose(data.sprites[concept, style], palette[colour], *placement, IMAGE_SIZE)
    return pictures, concept, style, colour


def _encode(vae: nn.Module, pictures: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return vae.encode(pictures).latent_dist.mean


def _noised(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (B,), noise and their mixture with the latents, both like `latents`.

    sigma is logit-normal (Esser et al. 2024), shifted as FLUX's scheduler shifts it for 256 tokens.
    """
    sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device) + 0.5)
    noise = torch.randn_like(latents)
    at = sigma[:, None, None]
    return sigma, noise, (1 - at) * latents + at * noise


@torch.no_grad()
def _judge(net: Net, judged: Encoded) -> float:
    """Mean loss on pairs of concept and style that training never sees, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judged.shuffle()
        losses = [net.loss(x, *ids) for x, ids in (judged.batch(256, drop=False) for _ in range(4))]
    return torch.stack(losses).mean().item()


@torch.no_grad()
def _follow(ema: nn.Module, net: nn.Module, step: int, decay: float) -> None:
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), weight)


def _by_optimizer(net: Net) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between activations, and the rest: embeddings, modulations, ends, vectors."""
    matrices, others = [], []
    for name, parameter in net.named_parameters():
        inside = any(key in name for key in ("transformer_blocks.", "layers.", "block."))
        outside = any(key in name for key in (".norm", "embed", "relative"))
        (matrices if parameter.dim() == 2 and inside and not outside else others).append(parameter)
    return matrices, others


def _rate(progress: float, step: int, peak: float) -> float:
    """Up over 200 steps, flat, and down to 0 over the schedule's second half."""
    return peak * min(1.0, (step + 1) / 200, 2 * (1 - progress) + 0.01)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


if __name__ == "__main__":
    app()
