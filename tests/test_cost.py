"""The arithmetic of a step, the policy that follows, and what is counted of a captured FLUX."""

import pytest
import torch

from piflux.compile.report import BoundaryReport, GraphReport
from piflux.cost.cost import Layer, Rates, choose
from piflux.policies.schedule import Schedule
from piflux.tools.image_cost import Cost, measured_cost, modelled_cost
from piflux.tools.preview import Preview, preview

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
WIDTH = 64  # channels


def foresee(schedule: Schedule) -> Preview:
    """16 image and 6 text tokens."""
    return preview(CONFIG, schedule, width=64, height=64, text_tokens=6, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def small() -> Preview:
    return foresee(Schedule("gather", world_size=2))


def test_what_a_rank_computes_and_sends(small: Preview) -> None:
    """A double block, then two single ones: 8 image and 3 text tokens on each rank."""
    tokens, square = 11, WIDTH**2
    _, single, _ = small.layers
    for layer in small.layers:
        assert layer.kv_bytes == 2 * tokens * WIDTH * 2  # keys, values; 2 bytes each
        assert layer.gathers == 1
        assert layer.attention_flops == 4 * tokens * 22 * WIDTH
    # After the double block's attention its projection and MLP, then the single's first products.
    assert single.linear_flops == 2 * tokens * (1 + 8 + 3 + 4) * square
    # While keys and values travel: queries, and in single blocks the MLP's first product.
    assert [layer.beside_flops for layer in small.layers] == [
        2 * tokens * products * square for products in (1, 1 + 4, 1 + 4)
    ]


def test_one_rank_does_it_all(small: Preview) -> None:
    # A block multiplies each token by 12 WIDTH^2 weights, and attends to all 22.
    linear, attention = 3 * 2 * 12 * WIDTH**2 * 22, 3 * 4 * 22**2 * WIDTH
    assert sum(layer.attention_flops for layer in small.whole) == attention
    # Beside the blocks there are embedders, modulations and the head.
    assert linear < sum(layer.linear_flops for layer in small.whole) < 1.5 * linear
    assert all(layer.kv_bytes == layer.gathers == 0 for layer in small.whole)


@pytest.mark.parametrize("policy", ["gather", "rotate", "displaced"])
def test_reports_of_every_policy(small: Preview, policy: str) -> None:
    sent = sum(layer.kv_bytes for layer in small.layers)
    final = 8 * 16 * 2
    report = small.under(Schedule(policy, world_size=2)).report
    assert report.sync_bytes == sent + final
    assert report.steady_bytes == final + (0 if policy == "rotate" else sent)


@pytest.mark.parametrize("policy", ["gather", "rotate", "displaced"])
def test_reports_of_compressed_changes(small: Preview, policy: str) -> None:
    """Only `displaced` sends them: a scale of 4 bytes and 16 numbers in 8 bits for each head."""
    sent, final = sum(layer.kv_bytes for layer in small.layers), 8 * 16 * 2
    changes = 3 * 2 * 11 * 4 * (4 + 16)
    report = small.under(Schedule(policy, world_size=2, compression="int8")).report
    assert report.sync_bytes == sent + final
    steady = {"gather": sent, "rotate": 0, "displaced": changes}[policy]
    assert report.steady_bytes == final + steady
    # A second of computing is shared; what travels takes longer.
    cost = modelled_cost(report, 28, 1.0, 1e-5)
    hidden = 0.5 if policy == "displaced" else 0.0
    assert cost.steady_s == pytest.approx(0.5 - hidden + (final + steady) / 1e4)


def test_one_rank_is_foreseen_too(small: Preview) -> None:
    alone = foresee(Schedule())
    assert alone.layers == alone.whole == small.whole
    assert alone.report.sync_bytes == alone.report.cache_bytes == 0


def test_many_previews_in_one_process() -> None:
    """Dynamo keeps so many graphs for one function, then refuses; a preview leaves none."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(3):
            assert foresee(Schedule(world_size=2)).report.attentions == 3


LAYERS = 3 * (Layer(linear_flops=6 * 10**9, attention_flops=10**9, kv_bytes=10**6),)


@pytest.mark.parametrize(
    ("link_gbs", "policy"),
    [
        (1 / 0.4, "gather"),  # exactly 5 % of a layer's 8 ms
        (1 / 0.41, "displaced"),
        (1 / 8, "displaced"),  # as long as the step
        (1 / 8.1, "rotate"),
        (1e-3, "rotate"),
    ],
)
def test_choice_follows_the_link(link_gbs: float, policy: str) -> None:
    choice = choose(LAYERS, Rates(1.0, 0.5, link_gbs))
    assert choice.policy == policy
    assert choice.compute_s == pytest.approx(0.024)
    assert choice.gather_s == pytest.approx(3e-3 / link_gbs)
    assert f"{link_gbs:.3g} GB/s" in choice.reason


@pytest.mark.parametrize(
    ("steps", "most"),
    [
        (56, 0.05 * 56 / (54 - 0.05 * 2)),  # as much as of 28
        (28, 0.05 * 28 / (26 - 0.05 * 2)),
        (8, 0.175 * 8 / (6 - 0.175 * 2)),  # 28 / 8 times as much
        (4, 0.35 * 4 / (2 - 0.35 * 2)),
    ],
)
def test_the_fewer_steps_the_longer_exact_ones_are_waited_for(steps: int, most: float) -> None:
    """Of 24 ms a step: two sync steps wait in any case, the others may by the price."""
    for share, policies in [(0.999, {"gather"}), (1.001, {"displaced", "rotate"})]:
        rates = Rates(1.0, 0.5, 3e-3 / (share * most * 0.024))
        choice = choose(LAYERS, rates, steps, 2)
        assert choice.policy in policies
        price = 0.05 * max(1, 28 / steps)
        assert f"an image of {steps} steps {share * price:.1%} longer" in choice.reason
    # All of them sync steps: an image by any policy is as long.
    assert choose(LAYERS, Rates(1.0, 0.5, 1e-6), 2, 2).policy == "gather"


def test_what_is_hidden_need_not_be_waited_for() -> None:
    hiding = [Layer(x.linear_flops, x.attention_flops, x.kv_bytes, 10**9) for x in LAYERS]
    # Of 1.3 ms a layer 1 ms is hidden; the rest is less than 5 % of 8 ms.
    rates = Rates(1.0, 0.5, 1 / 1.3)
    assert choose(LAYERS, rates).policy == "displaced"
    choice = choose(hiding, rates)
    assert choice.policy == "gather"
    assert "attention waits for 0.9 ms" in choice.reason


def test_each_gather_takes_its_latency() -> None:
    """Of 1 ms for the bytes and 2 x 0.5 ms in which nothing else is sent, 1 ms is hidden."""
    layer = Layer(6 * 10**9, 10**9, 10**6, beside_flops=10**9, gathers=2)
    rates = Rates(1.0, 0.5, 1.0, latency_s=5e-4)
    assert layer.gather_s(rates) == pytest.approx(2e-3)
    assert layer.wait_s(rates) == pytest.approx(1e-3)
    assert rates.gather_s(0, 3) == pytest.approx(1.5e-3)
    assert "travel 6 ms" in choose(3 * [layer], rates).reason


# ----------------------------------------------------------------------------- of whole schedules


def report(policy="rotate", sync="gather", sync_bytes=0, steady_bytes=0):
    """Of two ranks: 31 tokens in parts of 16."""
    cut = BoundaryReport("shard", "x", 1, (31,), (16,), (1,), 0)
    join = BoundaryReport("unshard", "y", 1, (31,), (16,), (1,), steady_bytes)
    schedule = Schedule(policy, 2, None, 2, sync)
    return GraphReport(schedule, 1, 1, (cut, join), sync_bytes, steady_bytes, 0)


def test_cost_is_shared_computing_and_what_travels():
    local = 31.0 * 16 / 31  # seconds of one rank's 31
    cost = modelled_cost(report(sync_bytes=8 * 10**9, steady_bytes=10**9), 10, 31.0, 1.0)
    assert cost == Cost(31.0, local + 8, local + 1, pytest.approx(local + (2 * 8 + 8 * 1) / 10))
    # Two pictures' bytes at once.
    cost = modelled_cost(report(sync_bytes=8 * 10**9), 10, 31.0, 1.0, batch=2)
    assert cost.sync_s == local + 4
    # Behind computing, as far as it reaches.
    for sent, steady in ((10, local), (20, 20.0)):
        travelling = report("displaced", sync_bytes=1, steady_bytes=sent * 10**9)
        assert modelled_cost(travelling, 10, 31.0, 1.0).steady_s == steady
    assert modelled_cost(report(sync="recompute"), 10, 31.0, 1.0).sync_s == 31.0


def timed(*rows):
    return {"rows": [{"row": r, "ranks": n, "step_ms": ms, "error": e} for r, n, ms, e in rows]}


def test_measured_cost_is_of_the_rows_of_the_policy():
    record = timed(
        ("eager", 1, [176.0], None),
        ("compiled", 1, [130.0, 140.0, 132.0], None),
        ("gather", 2, [80.0], None),
        ("rotate", 2, [90.0, 72.0, 73.0], None),
        ("rotate-int8", 2, [75.0], None),
        ("displaced", 2, [], "out of memory"),
    )
    cost = measured_cost(record, Schedule("rotate", 1, None, 2), 4)
    assert cost == Cost(0.132, 0.08, 0.073, pytest.approx((0.08 + 3 * 0.073) / 4))
    assert measured_cost(record, Schedule("rotate", 1, None, 2, "recompute"), 4).sync_s == 0.132
    assert measured_cost(record, Schedule("gather", 1, None, 2), 4).mean_s == 0.08
    assert measured_cost(record, Schedule(world_size=2, compression="int8"), 4).steady_s == 0.075
    # Where nothing is predicted, nothing is compressed.
    assert measured_cost(record, Schedule("gather", world_size=2, compression="int8"), 4) == (
        measured_cost(record, Schedule("gather", world_size=2), 4)
    )
    with pytest.raises(ValueError, match=r"did not measure 'displaced-int8' on 2 ranks$"):
        measured_cost(record, Schedule("displaced", world_size=2, compression="int8"), 4)
    with pytest.raises(ValueError, match=r"did not measure 'displaced' on 2 ranks$"):
        measured_cost(record, Schedule("displaced", 1, None, 2), 4)
    with pytest.raises(ValueError, match=r"'gather' on 4 ranks, 'rotate' on 4 ranks$"):
        measured_cost(record, Schedule("rotate", 1, None, 4), 4)
    with pytest.raises(ValueError, match="any row on one rank"):
        measured_cost(timed(("gather", 2, [80.0], None)), Schedule("gather", 1, None, 2), 4)
