"""An independent judge of the policies: N ranks played one after the other in one process.

It knows nothing of graphs, compilers or process groups. A virtual rank is the untouched diffusers
model run on one window of every token input, with `F.scaled_dot_product_attention` replaced by
attention over that rank's own cache of keys and values.

    sync step     the exact computation; every rank's cache is filled with fresh keys and values
    gather        every step is a sync step
    rotate        at step t rank r computes part (r + t) mod N: it writes that part's fresh keys and
                  values into its own cache, then attends to the whole of it
    displaced     rank r keeps part r: it attends to its own fresh keys and values and to what the
                  others had at the step before

A segment of T tokens is cut into N windows of ceil(T / N); window i starts at
min(i * ceil(T / N), T - ceil(T / N)). Where windows overlap, the later part's tokens count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

TOKENS = -2  # the token dimension of queries, keys and values, and of hidden states

exact_attention = F.scaled_dot_product_attention


def window(tokens: int, parts: int, part: int) -> slice:
    length = -(-tokens // parts)
    start = min(part * length, tokens - length)
    return slice(start, start + length)


def is_sync(policy: str, step: int, sync_steps: int, refresh_every: int | None) -> bool:
    """No cache is filled before the first step, so `sync_steps=0` means 1."""
    first = max(1, sync_steps)
    if policy == "gather" or step < first:
        return True
    return refresh_every is not None and (step - first + 1) % refresh_every == 0


@dataclass
class Cache:
    """One attention's keys and values of all tokens, and the step at which each was computed."""

    key: Tensor
    value: Tensor
    written: Tensor

    @classmethod
    def full(cls, key: Tensor, value: Tensor, step: int) -> "Cache":
        written = torch.full((key.shape[TOKENS],), step)
        return cls(key.clone(), value.clone(), written)

    def clone(self) -> "Cache":
        return Cache(self.key.clone(), self.value.clone(), self.written.clone())

    def write(self, key: Tensor, value: Tensor, places: Tensor, step: int) -> None:
        self.key[..., places, :] = key
        self.value[..., places, :] = value
        self.written[places] = step


class Oracle:
    """One stream of one image: call it once a step with the model's keyword arguments."""

    def __init__(
        self,
        model: nn.Module,
        ranks: int,
        policy: str,
        *,
        sync_steps: int = 1,
        refresh_every: int | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.policy = policy
        self.sync_steps = sync_steps
        self.refresh_every = refresh_every
        self.step = 0
        self.oldest = 0  # age, in steps, of the oldest key ever attended to
        self._caches: list[list[Cache]] = []  # [rank][attention], at the end of the last step

    @torch.no_grad()
    def __call__(self, **inputs) -> Tensor:
        if is_sync(self.policy, self.step, self.sync_steps, self.refresh_every):
            sample = self._sync(inputs)
        else:
            sample = self._steady(inputs)
        self.step += 1
        return sample

    def _sync(self, inputs: dict) -> Tensor:
        filled = []

        def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
            filled.append(Cache.full(key, value, self.step))
            return exact_attention(query, key, value, **options)

        with _attention(attend):
            sample = self.model(**inputs, return_dict=False)[0]
        self._caches = [[cache.clone() for cache in filled] for _ in range(self.ranks)]
        return sample

    def _steady(self, inputs: dict) -> Tensor:
        """A step after the sync steps: the ranks one after the other, in the order of parts."""
        tokens = _tokens(self.model, inputs)
        canvas = torch.zeros(
            inputs["hidden_states"].shape[0], tokens.image, self.model.proj_out.out_features
        )
        for part in range(self.ranks):
            rank = (part - self.step) % self.ranks if self.policy == "rotate" else part
            attend = self._attend(self._caches[rank], tokens, part)
            text = window(tokens.text, self.ranks, part)
            image = window(tokens.image, self.ranks, part)
            with _attention(attend), _assembled(self.model, canvas, image):
                sample = tokens.run(text, image)
        if self.policy == "displaced":
            self._exchange(tokens)
        return sample

    def _attend(self, caches: list[Cache], tokens: "Tokens", part: int) -> Callable[..., Tensor]:
        """Attention that first writes its fresh keys and values, then sees the whole cache."""
        unvisited = iter(caches)

        def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
            cache = next(unvisited)
            cache.write(key, value, _places(tokens, cache, self.ranks, part), self.step)
            self.oldest = max(self.oldest, self.step - int(cache.written.min()))
            return exact_attention(query, cache.key, cache.value, **options)

        return attend

    def _exchange(self, tokens: "Tokens") -> None:
        """Every rank's own part lands in every other rank's cache."""
        sent = [[cache.clone() for cache in caches] for caches in self._caches]
        for caches in self._caches:
            for number, cache in enumerate(caches):
                for part, theirs in enumerate(sent):
                    places = _places(tokens, cache, self.ranks, part)
                    key, value = theirs[number].key, theirs[number].value
                    cache.write(key[..., places, :], value[..., places, :], places, self.step)


class Tokens:
    """Where a model's tokens are born, and in which order its attentions join them."""

    text: int
    image: int

    def segments(self, joined: int) -> list[int]:
        """The lengths of the segments that an attention over `joined` tokens sees, in order."""
        raise NotImplementedError

    def run(self, text: slice, image: slice) -> Tensor:
        """The model's output, its tokens cut to these windows where they are born."""
        raise NotImplementedError


class FluxTokens(Tokens):
    def __init__(self, model: FluxTransformer2DModel, inputs: dict) -> None:
        self.model, self.inputs = model, inputs
        self.text = inputs["encoder_hidden_states"].shape[1]
        self.image = inputs["hidden_states"].shape[1]

    def segments(self, joined: int) -> list[int]:
        return [self.text, self.image]

    def run(self, text: slice, image: slice) -> Tensor:
        cut = {
            "hidden_states": image,
            "img_ids": image,
            "encoder_hidden_states": text,
            "txt_ids": text,
            "controlnet_block_samples": image,
            "controlnet_single_block_samples": image,
        }
        local = {name: _cut(value, cut.get(name)) for name, value in self.inputs.items()}
        return self.model(**local, return_dict=False)[0]


class SD3Tokens(Tokens):
    def __init__(self, model: SD3Transformer2DModel, inputs: dict) -> None:
        self.model, self.inputs = model, inputs
        patch = model.config.patch_size
        height, width = inputs["hidden_states"].shape[-2:]
        self.text = inputs["encoder_hidden_states"].shape[1]
        self.image = (height // patch) * (width // patch)

    def segments(self, joined: int) -> list[int]:
        """Joint attention sees image and text, dual attention the image alone."""
        return [self.image] if joined == self.image else [self.image, self.text]

    def run(self, text: slice, image: slice) -> Tensor:
        local = self.inputs | {
            "encoder_hidden_states": _cut(self.inputs["encoder_hidden_states"], text)
        }
        patchified = self.model.pos_embed.register_forward_hook(
            lambda module, args, patches: _cut(patches, image)
        )
        with patchified:
            return self.model(**local, return_dict=False)[0]


def _tokens(model: nn.Module, inputs: dict) -> Tokens:
    kinds = {FluxTransformer2DModel: FluxTokens, SD3Transformer2DModel: SD3Tokens}
    return kinds[type(model)](model, inputs)


def _cut(value, where: slice | None):
    if where is None or value is None:
        return value
    if isinstance(value, list):
        return [_cut(each, where) for each in value]
    return value[..., where, :]


def _places(tokens: Tokens, cache: Cache, parts: int, part: int) -> Tensor:
    """The positions of a part's tokens among all tokens that this cache's attention joins."""
    joined = cache.key.shape[TOKENS]
    places, start = [], 0
    for length in tokens.segments(joined):
        places.append(start + torch.arange(length)[window(length, parts, part)])
        start += length
    assert start == joined, f"an attention joins {joined} tokens, its segments {start}"
    return torch.cat(places)


@contextmanager
def _attention(attend: Callable[..., Tensor]) -> Iterator[None]:
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def _assembled(model: nn.Module, canvas: Tensor, image: slice) -> Iterator[None]:
    """Every part's output tokens are put on one canvas; the model goes on with all of it."""

    def put(module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        canvas[:, image] = tokens
        return canvas.clone()

    with model.proj_out.register_forward_hook(put):
        yield
