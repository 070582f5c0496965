"""The ops that piflux puts into graphs, by name: all that passes know of the runtime."""

from __future__ import annotations

import torch

from piflux.kernels import products, rotary  # noqa: F401 (to register their ops)
from piflux.runtime import ops

SHARD = torch.ops.piflux.shard.default
UNSHARD = torch.ops.piflux.unshard.default
SEND = torch.ops.piflux.send_kv.default
CACHED = torch.ops.piflux.cached_sdpa.default
SLOTS_FROM = ops.slots_from
FETCH = ops.fetch

LINEAR_GELU = torch.ops.piflux.linear_gelu.default
LINEAR_OF_CAT = torch.ops.piflux.linear_of_cat.default
NORM_ROTARY = torch.ops.piflux.norm_rotary.default
