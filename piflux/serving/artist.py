"""What draws in a worker: one pipeline, split over as many ranks as each call has."""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import piflux
from piflux.errors import CannotLoad, Stopped
from piflux.integrations.diffusers import ranks_of, set_compute, sharing
from piflux.launch import cores
from piflux.pipelines.arguments import SISTERS, arguments, sister_of, takes, takes_several
from piflux.pipelines.folders import as_kind, load
from piflux.ranks.board import bounded
from piflux.ranks.groups import own_device
from piflux.ranks.meeting import Meeting
from piflux.ranks.processes import ProcessRanks
from piflux.serving.adapters import Adapters
from piflux.serving.messages import Draw, Finished, Group, Loaded, Shown, Source, Step, Told
from piflux.serving.previews import Previews

STORE_S = 30.0
"""How long the engine's store may take to answer."""

Tell = Callable[[Told], None]


class Artist:
    """A pipeline, and what it was parallelized to.

    Args:
        source: of the pipeline.
        inner: what compiles, see `parallelize`.

    Raises:
        CannotLoad: there is none, or it draws no pictures.
    """

    def __init__(self, source: Source, inner: str) -> None:
        self._device = own_device()
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, min(cores(), torch.get_num_threads())))
        if isinstance(source, str):
            self._pipe, self._more = load(source, self._device)
        else:
            self._pipe, self._more = source(self._device)
        self._pipe.set_progress_bar_config(disable=True)
        if takes(type(self._pipe), "num_frames"):
            raise CannotLoad(f"{type(self._pipe).__name__} makes videos; only pictures are served")
        self._inner = inner
        self._adapters = Adapters(self._pipe)
        self._previews = Previews.fit(self._pipe)
        self._stores: dict[tuple[str, int], dist.Store] = {}
        self._split: dict[int, _Split] = {}  # by how many ranks share it

    def loaded(self) -> Loaded:
        kind = type(self._pipe)
        taken = inspect.signature(kind.__call__).parameters
        names = set(taken)
        names |= {x for x in SISTERS if sister_of(kind, x) is not None}
        factor = int(getattr(self._pipe, "vae_scale_factor", 8))
        side = getattr(self._pipe, "default_sample_size", None)
        side = side * factor if isinstance(side, int) else 1024
        steps = taken["num_inference_steps"].default
        return Loaded(
            self._device.type,
            kind.__name__,
            frozenset(names),
            takes_several(kind),
            hasattr(self._pipe, "load_lora_weights") and find_spec("peft") is not None,
            2 * factor,
            (side, side),
            steps,
            _memory(self._device),
        )

    def draw(self, draw: Draw, is_stopped: Callable[[], bool], tell: Tell) -> Finished:
        """Draw on all ranks of the group together.

        Args:
            draw: what; the same on all of them.
            is_stopped: whether nobody wants it any more, as far as this rank knows.
            tell: gets each step, and previews.

        Raises:
            CannotLoad: the pipeline doesn't take what was asked, or an adapter is unfit.
            RankFailed: another rank is the reason.
            Exception: whatever the pipeline raises.
        """
        began = time.perf_counter()
        kind, given = arguments(type(self._pipe), draw.asked)
        given |= self._more | _batched(draw)
        if draw.true_cfg is not None:
            given["true_cfg_scale"] = draw.true_cfg
        unknown = given.keys() - inspect.signature(kind.__call__).parameters.keys()
        if unknown:
            raise CannotLoad(f"{kind.__name__} takes no {', '.join(sorted(unknown))}")
        self._adapters.wear(draw.loras)
        pipe = self._parallel(draw.group, draw.settings, kind)
        set_compute(pipe, draw.compute)
        ranks = ranks_of(pipe)
        size = (given["width"], given["height"]) if "width" in given else None
        watch = _Watch(draw, size, ranks, self._device, self._previews, is_stopped, tell)
        if takes(kind, "callback_on_step_end"):
            given["callback_on_step_end"] = watch
        try:
            images = pipe(**given).images
        except Stopped:
            images = None
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        first = ranks is None or ranks.rank == 0
        return Finished(
            draw.number,
            images if first else None,
            images is None,
            1 if ranks is None else ranks.size,
            time.perf_counter() - began,
            watch.step_s(),
            _memory(self._device),
        )

    def _parallel(self, group: Group, settings: Mapping[str, Any], kind: Any) -> Any:
        split = self._split.get(group.size)
        if split is None or split.name != group.name:
            self._split.pop(group.size, None)  # its ranks have parted
            split = self._split[group.size] = _Split(group.name, self._meeting(group))
        key = json.dumps(dict(settings), sort_keys=True)
        if key not in split.pipes:
            split.pipes[key] = {
                type(self._pipe): piflux.parallelize(
                    self._pipe, group=split.meeting, inner=self._inner, **settings
                )
            }
        pipes = split.pipes[key]
        if kind not in pipes:
            pipes[kind] = sharing(pipes[type(self._pipe)], as_kind(self._pipe, kind))
        return pipes[kind]

    def _meeting(self, group: Group) -> Meeting | None:
        """None for one rank alone."""
        if group.size == 1:
            return None
        if group.store not in self._stores:
            host, port = group.store
            self._stores[group.store] = bounded(
                lambda: dist.TCPStore(host, port, is_master=False, wait_for_workers=False), STORE_S
            )
        return Meeting(self._stores[group.store], group.name, group.rank, group.size)


@dataclass
class _Split:
    """The pipeline as one group of ranks has it.

    Attributes:
        name: the group's.
        meeting: where it meets, which ends with this.
        pipes: by settings and by class.
    """

    name: str
    meeting: Meeting | None
    pipes: dict[str, dict[type, Any]] = field(default_factory=dict)


class _Watch:
    """What is called after each step: it tells of it, shows what is there, and stops.

    Ranks stop after the same step: one that knows that it should lets the others know by its next
    prediction, see `piflux.ranks.header`.
    """

    def __init__(
        self,
        draw: Draw,
        size: tuple[int, int] | None,
        ranks: ProcessRanks | None,
        device: torch.device,
        previews: Previews | None,
        is_stopped: Callable[[], bool],
        tell: Tell,
    ) -> None:
        self._draw, self._ranks, self._device = draw, ranks, device
        self._size = size
        self._previews = previews if draw.previews and size else None
        self._is_stopped, self._tell = is_stopped, tell
        self._ends: list[float] = []
        self._shown = 0
        self._last: torch.cuda.Event | None = None
        if previews is not None:
            previews.begin()

    def __call__(self, pipe: Any, step: int, time_: Any, given: dict[str, Any]) -> dict[str, Any]:
        self._pace()
        self._ends.append(time.perf_counter())
        steps = int(getattr(pipe, "num_timesteps", 0) or self._draw.asked.steps or 0)
        self._tell(Step(self._draw.number, step + 1, max(steps, step + 1)))
        if self._has_to_stop():
            raise Stopped("nobody wants this image any more")
        latents = given.get("latents")
        if self._previews is not None and isinstance(latents, Tensor):
            self._show(pipe, step, steps, latents)
        return given

    def _pace(self) -> None:
        """A GPU is given no more than the step after the one that it is at: so what is told of
        steps is true, and an image can still be stopped."""
        if self._device.type != "cuda" or self._ranks is not None:
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.Event()
        self._last.record()

    def _has_to_stop(self) -> bool:
        if self._ranks is None:
            return self._is_stopped()
        if self._is_stopped():
            self._ranks.wish = True
        return self._ranks.wished()

    def _show(self, pipe: Any, step: int, steps: int, latents: Tensor) -> None:
        assert self._previews is not None, "asked by the caller"
        wanted = self._draw.previews
        due = self._shown < wanted and (step + 1) * (wanted + 1) >= (self._shown + 1) * steps
        speaks = self._ranks is None or self._ranks.rank == 0
        found = self._previews.after(pipe.scheduler, latents, wanted=due and speaks)
        if due:
            self._shown += 1
        if found is not None:
            assert self._size is not None, "else there are no previews"
            width, height = self._size
            images = self._previews.pictures(found, height, width)
            self._tell(Shown(self._draw.number, self._shown - 1, images))

    def step_s(self) -> float | None:
        """Median seconds of a step that was computed: the longer ones, where some were left out."""
        times = sorted(b - a for a, b in zip(self._ends, self._ends[1:], strict=False))
        return statistics.median(times[len(times) // 2 :]) if len(times) > 1 else None


def _batched(draw: Draw) -> dict[str, Any]:
    """The arguments of which there is one a picture; alone it stands by itself."""
    generators = [torch.Generator().manual_seed(picture.seed) for picture in draw.pictures]
    prompts = [picture.prompt for picture in draw.pictures]
    several = len(prompts) > 1
    given: dict[str, Any] = {
        "prompt": prompts if several else prompts[0],
        "generator": generators if several else generators[0],
    }
    negatives = [x.negative for x in draw.pictures if x.negative is not None]
    if negatives:
        given["negative_prompt"] = negatives if several else negatives[0]
    return given


def _memory(device: torch.device) -> int:
    """Bytes in use, by the device's count or the process's."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
