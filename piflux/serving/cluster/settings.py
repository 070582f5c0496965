"""What a server on a cluster is asked for, and the resources that this takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from piflux.serving.jobs import Quality


class Settings(BaseModel):
    """As `serve run piflux.serving.cluster:app NAME=VALUE ...` takes them, and a config's `args`.

    Files and folders are looked for on the machines where replicas run.

    Attributes:
        model: 'demo', or a folder of a diffusers pipeline.
        name: of the model, as requests have it; None for the folder's.
        ranks: of a replica.
        hosts: over which a replica's ranks are spread, as many on each.
        gpus: of a rank; None for one where the cluster has any.
        cpus: cores of a rank, as Ray counts them.
        replicas: groups of ranks.
        most_replicas: up to so many are started as more jobs come than `ranks` a replica; None for
            no more than `replicas`.
        jobs: that a replica may have at a time, drawn or waiting there; None for four a rank.
        queue: jobs that may wait for a replica; see `RankEngine` for what is not said here.
        api_keys: a file of keys, one a line, on the front's machine; also PIFLUX_API_KEYS.
        insecure: let everyone ask who reaches the front.
        names: without keys, the names by which it may be called; None for any.
        quality: of requests that name none.
        schedules: files, by quality.
        drain_s: seconds that jobs have when a replica is ended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "demo"
    name: str | None = None
    ranks: int = Field(default=1, ge=1)
    hosts: int = Field(default=1, ge=1)
    gpus: Literal[0, 1] | None = None
    cpus: float = Field(default=1.0, gt=0)
    replicas: int = Field(default=1, ge=1)
    most_replicas: int | None = Field(default=None, ge=1)
    jobs: int | None = Field(default=None, ge=1)
    queue: int = Field(default=256, ge=1)
    api_keys: Path | None = None
    insecure: bool = False
    names: tuple[str, ...] | None = None
    quality: Quality = "lossless"
    sizes: tuple[tuple[int, int], ...] = ()
    groups: tuple[int, ...] | None = None
    loras: Path | None = None
    schedules: dict[str, Path] = Field(default_factory=dict)
    batch: int = Field(default=1, ge=1)
    deadline_s: float = Field(default=600.0, gt=0)
    stuck_s: float = Field(default=120.0, gt=0)
    drain_s: float = Field(default=30.0, ge=0)
    cache: Path | None = None
    inner: Literal["inductor", "eager"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.ranks % self.hosts:
            raise ValueError(f"hosts: {self.ranks} ranks can't be spread evenly over {self.hosts}")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"most_replicas: fewer than replicas, which is {self.replicas}")
        return self

    @property
    def ranks_a_host(self) -> int:
        return self.ranks // self.hosts

    @property
    def jobs_a_replica(self) -> int:
        return 4 * self.ranks if self.jobs is None else self.jobs

    def bundles(self, gpus: int) -> list[dict[str, float]]:
        """A replica's resources: of each host that its ranks are spread over, one bundle.

        The leader is in the first one. It waits almost all of the time, and takes no core.

        Args:
            gpus: of a rank.
        """
        bundle = {"CPU": self.ranks_a_host * self.cpus}
        if gpus:
            bundle["GPU"] = float(self.ranks_a_host * gpus)
        return [dict(bundle) for _ in range(self.hosts)]

    @property
    def strategy(self) -> Literal["STRICT_PACK", "STRICT_SPREAD"]:
        """How the bundles lie: each on a host of its own."""
        return "STRICT_PACK" if self.hosts == 1 else "STRICT_SPREAD"
