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

With `order` 1, tokens that were not computed in this very step are read as they should be by now:
moved on from their last version, 0.75 times as far as a straight line through their last two
versions over time would take them, but by 3 times the change between the two at most. Time is
log(sigma / (1 - sigma)), both terms with 0.01 added. A token with one version is read as it is.

With a `mask` some steps are skipped: nothing is computed in them, and the prediction is the last
one that was computed, moved on by the same rule. Ranks turn, and keys and values age, by the steps
that are computed; the first computed step at or after one that is to be a sync step is one.

With `compression` 'int8' a rank remembers, in place of the version before, the change since, and
rounds it: each token's head has 255 steps, from minus to plus its largest number. Under `displaced`
such changes are also what arrives: what the others had is what is remembered of them, plus the
rounded change. With 'int4' changes have 15 steps, and what is remembered, whole or moved on by a
change, is rounded to 255; their lengths are numbers of bfloat16. Keys and values of the very step
are attended to as they are.

A segment of T tokens is cut into N windows of ceil(T / N); window i starts at
min(i * ceil(T / N), T - ceil(T / N)). Where windows overlap, the later part's tokens count.
"""

import math
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


def is_sync(
    policy: str, step: int, sync_steps: int | tuple[int, ...], refresh_every: int | None
) -> bool:
    """No cache is filled before the first step, so that one always is."""
    named = list(range(sync_steps)) if isinstance(sync_steps, int) else list(sync_steps)
    if policy == "gather" or step == 0 or step in named:
        return True
    after = step - max([0, *named])
    return refresh_every is not None and after > 0 and after % refresh_every == 0


def log_snr(sigma: float) -> float:
    return math.log((sigma + 0.01) / (1 - sigma + 0.01))


def rounded(x: Tensor, steps: int, unit_dtype: torch.dtype) -> Tensor:
    """To so many steps up and down for each number of a token's head."""
    unit = (x.abs().amax(-1, keepdim=True) / steps).to(unit_dtype)
    return (x / unit.clamp(min=1e-30) + 0.5).floor().clamp(-steps, steps) * unit


def rounded_version(x: Tensor, compression: str) -> Tensor:
    return rounded(x, 127, torch.bfloat16) if compression == "int4" else x


def rounded_change(x: Tensor, compression: str) -> Tensor:
    if compression == "int8":
        return rounded(x, 127, torch.float32)
    return rounded(x, 7, torch.bfloat16) if compression == "int4" else x


@dataclass
class Cache:
    """One attention's keys and values of all tokens.

    Attributes:
        versions: keys and values, (2, batch, heads, tokens, head dim), the newest first.
        times: when each token's versions were computed, likewise, (tokens,) each.
        written: the step at which each token's newest version was computed.
        exact: the newest version as it was computed.
    """

    versions: list[Tensor]
    times: list[Tensor]
    written: Tensor
    exact: Tensor

    @classmethod
    def full(cls, key: Tensor, value: Tensor, step: int, time: float) -> "Cache":
        tokens = key.shape[TOKENS]
        at = torch.full((tokens,), time, dtype=torch.float64)
        fresh = torch.stack([key, value])
        written = torch.full((tokens,), step)
        return cls([fresh, fresh.clone()], [at, at.clone()], written, fresh.clone())

    def clone(self) -> "Cache":
        versions, times = [x.clone() for x in self.versions], [x.clone() for x in self.times]
        return Cache(versions, times, self.written.clone(), self.exact.clone())

    def write(
        self, fresh: Tensor, places: Tensor, step: int, time: float, compression: str = "none"
    ) -> None:
        """What is written twice in a step is one version."""
        new = self.written[places] != step
        last = rounded_version(fresh, compression)
        before = self.versions[0][..., places[new], :]
        change = fresh[..., new, :] - before
        if compression != "none":
            before = last[..., new, :] - rounded_change(change, compression)
        new = places[new]
        self.versions[1][..., new, :] = before
        self.times[1][new] = self.times[0][new]
        self.versions[0][..., places, :] = last
        self.exact[..., places, :] = fresh
        self.times[0][places] = time
        self.written[places] = step

    def move(self, fresh: Tensor, step: int, time: float, compression: str) -> None:
        """All tokens move on by the rounded change to what was computed elsewhere."""
        change = rounded_change(fresh - self.versions[0], compression)
        last = rounded_version(self.versions[0] + change, compression)
        self.versions = [last, last - change]
        self.times = [torch.full_like(self.times[0], time), self.times[0]]
        self.exact = last.clone()
        self.written = torch.full_like(self.written, step)

    def read(self, step: int, time: float, order: int) -> Tensor:
        (last, before), (last_time, before_time) = self.versions, self.times
        last = torch.where((self.written == step)[:, None], self.exact, last)
        moves = (self.written != step) & (last_time != before_time)
        ahead = (0.75 * (time - last_time) / (last_time - before_time)).clamp(-3, 3)
        ahead = torch.where(moves, ahead, 0.0) * order
        return last + ahead[:, None].to(last.dtype) * (last - before)


class Oracle:
    """One stream of one image: call it once a step with the model's keyword arguments."""

    def __init__(
        self,
        model: nn.Module,
        ranks: int,
        policy: str,
        *,
        sync_steps: int | tuple[int, ...] = (0, 2),
        refresh_every: int | None = None,
        order: int = 1,
        compression: str = "none",
        mask: str = "",
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.policy = policy
        self.sync_steps = sync_steps
        self.refresh_every = refresh_every
        self.order = order
        self.compression = compression
        self.mask = mask
        self.step = 0
        self.turn = 0  # steps computed so far
        self.time = 0.0
        self._due = False
        self._predictions: list[tuple[float, Tensor]] = []
        self._unit = 1.0
        self.oldest = 0  # age, in steps, of the oldest key ever attended to
        self._caches: list[list[Cache]] = []  # [rank][attention], at the end of the last step

    @torch.no_grad()
    def __call__(self, **inputs) -> Tensor:
        clock = float(inputs["timestep"].flatten()[0])
        if self.step == 0:
            self._unit = 1000.0 if clock > 1 else 1.0
        self.time = log_snr(clock / self._unit)
        self._due |= is_sync(self.policy, self.step, self.sync_steps, self.refresh_every)
        if self.mask[self.step : self.step + 1] == ".":
            sample = self._continued()
        else:
            sample = self._sync(inputs) if self._due else self._steady(inputs)
            self._predictions.append((self.time, sample))
            self._due = False
            self.turn += 1
        self.step += 1
        return sample

    def _continued(self) -> Tensor:
        (before_time, before), (last_time, last) = self._predictions[-2:]
        ahead = 0.75 * (self.time - last_time) / (last_time - before_time)
        return last + max(-3.0, min(3.0, ahead)) * (last - before)

    def _sync(self, inputs: dict) -> Tensor:
        filled = []

        def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
            filled.append(Cache.full(key, value, self.step, self.time))
            return exact_attention(query, key, value, **options)

        with _attention(attend):
            sample = self.model(**inputs, return_dict=False)[0]
        if self.step == 0:
            self._caches = [[cache.clone() for cache in filled] for _ in range(self.ranks)]
        for caches in self._caches:
            for cache, new in zip(caches, filled, strict=True):
                everywhere = torch.arange(len(cache.written))
                cache.write(new.versions[0], everywhere, self.step, self.time, self.compression)
        return sample

    def _steady(self, inputs: dict) -> Tensor:
        """A step after the sync steps: the ranks one after the other, in the order of parts."""
        tokens = _tokens(self.model, inputs)
        canvas = torch.zeros(
            *(inputs["hidden_states"].shape[0], tokens.image, self.model.proj_out.out_features),
            dtype=self.model.dtype,
        )
        remembered = [[cache.clone() for cache in caches] for caches in self._caches]
        for part in range(self.ranks):
            rank = (part - self.turn) % self.ranks if self.policy == "rotate" else part
            attend = self._attend(self._caches[rank], tokens, part)
            text = window(tokens.text, self.ranks, part)
            image = window(tokens.image, self.ranks, part)
            with _attention(attend), _assembled(self.model, canvas, image):
                sample = tokens.run(text, image)
        if self.policy == "displaced":
            self._exchange(tokens, remembered)
        return sample

    def _attend(self, caches: list[Cache], tokens: "Tokens", part: int) -> Callable[..., Tensor]:
        """Attention that first writes its fresh keys and values, then sees the whole cache."""
        unvisited = iter(caches)

        def attend(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
            cache = next(unvisited)
            places = _places(tokens, cache, self.ranks, part)
            fresh = torch.stack([key, value])
            cache.write(fresh, places, self.step, self.time, self.compression)
            self.oldest = max(self.oldest, self.step - int(cache.written.min()))
            seen = cache.read(self.step, self.time, self.order)
            return exact_attention(query, *seen, **options)

        return attend

    def _exchange(self, tokens: "Tokens", remembered: list[list[Cache]]) -> None:
        """Every rank's own part lands in every other rank's cache.

        Where changes are sent, also in its own: all must go on from the same versions.
        """
        sent = [[cache.clone() for cache in caches] for caches in self._caches]
        if self.compression != "none":
            self._caches = remembered
            return self._change(tokens, sent)
        for caches in self._caches:
            for number, cache in enumerate(caches):
                for part, theirs in enumerate(sent):
                    places = _places(tokens, cache, self.ranks, part)
                    fresh = theirs[number].versions[0][..., places, :]
                    cache.write(fresh, places, self.step, self.time)

    def _change(self, tokens: "Tokens", sent: list[list[Cache]]) -> None:
        """Every cache moves on by the rounded change to what the ranks computed."""
        for caches in self._caches:
            for number, cache in enumerate(caches):
                fresh = torch.empty_like(cache.versions[0])
                for part, theirs in enumerate(sent):
                    places = _places(tokens, cache, self.ranks, part)
                    fresh[..., places, :] = theirs[number].exact[..., places, :]
                cache.move(fresh, self.step, self.time, self.compression)


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
    joined = len(cache.written)
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
