"""What a compiled graph calls while it runs: the boundary ops, attention, caches and agreement."""

from piflux.runtime.ops import cached_sdpa as cached_sdpa
from piflux.runtime.ops import send_kv as send_kv
from piflux.runtime.ops import shard as shard
from piflux.runtime.ops import unshard as unshard
