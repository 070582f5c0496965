"""What is served: the model as its ranks told, and jobs held against it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from piflux.demo import NOTE, PROMPTS
from piflux.errors import CannotLoad
from piflux.pipelines.arguments import Asked
from piflux.serving.jobs import Job, Model, Quality, Refused
from piflux.serving.messages import Loaded, Source
from piflux.serving.qualities import Promise


class Served:
    """A model, and what may be asked of it.

    Args:
        source: of it.
        name: as requests have it; None for the source's.
        sizes: that are compiled first, see `RankEngine`.
        promises: by quality.
        adapters: a folder of them; None for none.

    Attributes:
        promises: by quality.
        model: None until a rank has told; likewise `loaded`, what it told.

    Raises:
        CannotLoad: there is no such folder.
    """

    def __init__(
        self,
        source: Source,
        name: str | None,
        sizes: Sequence[tuple[int, int]],
        promises: Mapping[Quality, Promise],
        adapters: Path | None,
    ) -> None:
        self._source, self._name = source, name or _named(source)
        self._sizes = tuple(sizes)
        self.promises = promises
        self._adapters = _adapters_in(adapters)
        self.loaded: Loaded | None = None
        self.model: Model | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """That are compiled first."""
        assert self.model is not None, "asked once it is known"
        return self._sizes or (self.model.default_size,)

    def learn(self, told: Loaded) -> None:
        """What a rank has loaded. All load the same: the first one is believed."""
        if self.model is not None:
            return
        is_demo = self._source == "demo"
        self.loaded = told
        self.model = Model(
            self._name,
            int(time.time()),
            told.pipeline,
            "image" in told.takes,
            "mask_image" in told.takes,
            "negative_prompt" in told.takes,
            told.multiple,
            self._sizes[0] if self._sizes else told.default_size,
            told.default_steps,
            {quality: promise.tell() for quality, promise in self.promises.items()},
            tuple(sorted(self._adapters)) if told.adapts else (),
            PROMPTS[1] if is_demo else "",
            NOTE if is_demo else "",
            told.several,
        )

    def asked(self, job: Job) -> Asked:
        """What a job asks of the pipeline's call, steps and size included.

        Raises:
            Refused: the model can't be asked for that.
        """
        model, loaded = self.model, self.loaded
        assert model is not None and loaded is not None, "asked once it is known"
        if not job.seeds:
            raise Refused(400, "invalid_value", "at least one picture", field="n")
        for field, given, takes in (
            ("negative_prompt", job.negative is not None, model.negative),
            ("image", bool(job.images), model.edits),
            ("mask", job.mask is not None, model.masks),
            ("guidance_scale", job.guidance is not None, "guidance_scale" in loaded.takes),
            ("true_cfg_scale", job.true_cfg is not None, "true_cfg_scale" in loaded.takes),
        ):
            if given and not takes:
                what = f"{model.pipeline} takes no {field}"
                raise Refused(400, "unsupported_value", what, field=field)
        if len(job.images) > 1 and not model.several:
            what = f"{model.pipeline} takes one picture, not {len(job.images)}"
            raise Refused(400, "unsupported_value", what, field="image")
        if job.mask is not None and not job.images:
            raise Refused(400, "invalid_value", "a mask is of a picture", field="image")
        if job.size is not None and any(side < 1 or side % model.multiple for side in job.size):
            raise Refused(
                400, "invalid_value", f"sides must be multiples of {model.multiple}", field="size"
            )
        for name, _ in job.loras:
            if name not in self._adapters:
                known = ", ".join(sorted(self._adapters)) or "none"
                raise Refused(
                    400, "invalid_value", f"no lora {name!r}: there are {known}", field="lora"
                )
        if job.steps is not None and job.steps < 1:
            raise Refused(400, "invalid_value", "at least 1 step", field="num_inference_steps")
        return Asked(
            job.steps or model.default_steps,
            job.size if job.images else job.size or model.default_size,
            job.guidance,
            job.negative,
            job.images,
            job.mask,
        )

    def files(self, loras: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
        """Adapters by their files in place of their names."""
        return tuple((str(self._adapters[name]), scale) for name, scale in loras)


def _named(source: Source) -> str:
    if isinstance(source, str):
        return Path(source).name if Path(source).is_dir() else source
    return source.__name__


def _adapters_in(folder: Path | None) -> dict[str, Path]:
    """By name."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise CannotLoad(f"{folder}: no folder of adapters; name one, with files NAME.safetensors")
    return {path.stem: path.resolve() for path in sorted(folder.glob("*.safetensors"))}
