"""What the compiler makes of a FLUX transformer, from its config alone: no weights, no step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from piflux.capture.dynamo import let_through
from piflux.compile.program import PASSES, prepare
from piflux.compile.report import GraphReport
from piflux.cost.cost import Layer, layers_of
from piflux.cost.memory import Own
from piflux.cost.shares import SharedWeights
from piflux.graph.plan import Context
from piflux.passes.runner import run_passes
from piflux.passes.split.layout import layout
from piflux.passes.split.rewrite_attention import rewrite_attention
from piflux.policies.schedule import Schedule


@dataclass(frozen=True)
class Preview:
    """One step under a schedule, on its ranks.

    Attributes:
        report: what the compiler says.
        ctx: what it found out, from which other schedules' reports follow.
        layers: what one of the ranks does, layer by layer.
        whole: likewise of one rank alone, which does everything.
    """

    report: GraphReport
    layers: tuple[Layer, ...]
    whole: tuple[Layer, ...]
    ctx: Context

    def under(self, schedule: Schedule) -> Preview:
        """The same under another schedule, on as many ranks."""
        assert schedule.world_size == self.ctx.world_size
        shared, weights = self.report.shared, self.report.weight_bytes
        if shared is not None:
            weights += shared.whole_bytes - shared.held_bytes
        own = Own(weights, self.report.step_bytes)
        return replace(self, report=GraphReport.of(self.ctx, schedule, own))


def preview(
    config: Mapping[str, Any],
    schedule: Schedule,
    *,
    width: int,
    height: int,
    text_tokens: int,
    dtype: torch.dtype,
    shard_weights: bool = False,
) -> Preview:
    """Capture the transformer of `config` on the meta device and run the passes.

    Args:
        config: of a diffusers FluxTransformer2DModel.
        schedule: with its ranks.
        width: pixels, a multiple of 16; likewise `height`.
        text_tokens: of a prompt.
        dtype: of weights and activations.
        shard_weights: whether each rank holds a share of the weights.

    Raises:
        CannotShard: there are fewer tokens than ranks.
    """
    from diffusers import FluxTransformer2DModel

    found: list[Preview] = []
    ranks = schedule.world_size

    @let_through()
    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        whole, original = copy.deepcopy(gm), copy.deepcopy(gm)
        alone, ctx = Context(1), Context(ranks)
        run_passes(whole, alone, (layout, rewrite_attention))
        # As the compiler does: on one rank the layout is all there is to find.
        run_passes(gm, ctx, PASSES if ranks > 1 else PASSES[:1])
        own, everything = Own.of(gm.graph), layers_of(whole, alone)
        mine = layers_of(gm, ctx) if ranks > 1 else everything
        report = GraphReport.of(ctx, schedule, own)
        if shard_weights and ranks > 1:
            prepare(gm, ctx, shares=True)
            report = report.sharing(SharedWeights.of(ctx.gathered, ranks))
        found.append(Preview(report, mine, everything, ctx))
        return original.forward

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(dict(config)).eval()
        nn.Module.to(model, dtype)  # the model's own warns of parts that FLUX doesn't have
        inputs = _inputs(config, width, height, text_tokens, dtype)

    def step(**kwargs: Any) -> Any:
        return model(**kwargs, return_dict=False)

    try:
        with torch.no_grad():
            torch.compile(step, backend=keep, fullgraph=True, dynamic=False)(**inputs)
    finally:
        # Dynamo would keep the graph for good, and count it as one of the next preview's.
        torch._dynamo.eval_frame.reset_code(step.__code__)
    (result,) = found
    return result


def _inputs(
    config: Mapping[str, Any], width: int, height: int, text_tokens: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What FluxPipeline passes for one image, on the current device, without values."""
    tokens = width * height // 256
    shapes = {
        "hidden_states": (1, tokens, config["in_channels"]),
        "encoder_hidden_states": (1, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
        "timestep": (1,),
        "img_ids": (tokens, 3),
        "txt_ids": (text_tokens, 3),
    }
    if config.get("guidance_embeds"):
        shapes["guidance"] = (1,)
    return {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
