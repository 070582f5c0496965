"""`benchmarks/scaling.py`: the model of an image's time, against what is counted by hand."""

import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from test_cost import CONFIG
from typer.testing import CliRunner

from piflux.cost.cost import Layer
from piflux.policies.schedule import Schedule
from piflux.tools.preview import preview

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
assert spec is not None and spec.loader is not None
scaling = importlib.util.module_from_spec(spec)
sys.modules["scaling"] = scaling  # where its dataclasses look for their module
spec.loader.exec_module(scaling)

FREE = scaling.Link(math.inf, 0.0, 0.0)
SLOW = scaling.Link(gbs=1.0, latency_s=1e-4, hop_s=5e-5)


def work(ranks, tokens=528):
    """Two layers; at 1 TFLOP/s one rank computes 6 ms of products and 2 ms of attention in each."""
    part = Layer(
        linear_flops=6 * 10**9 // ranks,
        attention_flops=2 * 10**9 // ranks,
        kv_bytes=2 * 10**6 * (ranks - 1) // ranks,
        beside_flops=2 * 10**9 // ranks,
        gathers=2,
    )
    whole = Layer(6 * 10**9, 2 * 10**9, 0)
    final = 4 * 10**5 * (ranks - 1) // ranks
    return scaling.Work(ranks, tokens, [part] * 2, [whole] * 2, final)


def kernels(exchange_ms):
    return [["product", 10.0, 3.0], ["_exchange", 4.0, exchange_ms]]


def steps_json():
    """Of 16 image and 512 text tokens: beside arithmetic and prediction, 2 ms on two ranks and 1.5
    on four; a rank's caches are filled in 2 ms."""
    rows = [
        {
            "variant": "rotate",
            "ranks": 2,
            "step_ms": 10.6,
            "sync_ms": 20.0,
            "longest": kernels(0.6),
        },
        {"variant": "rotate order=0", "ranks": 2, "step_ms": 9.0, "sync_ms": 19.0, "longest": []},
        {"variant": "rotate", "ranks": 4, "step_ms": 6.1, "sync_ms": 24.0, "longest": kernels(0.6)},
    ]
    floor = {"linear_tflops": 1.0, "attention_tflops": 1.0}
    return {"hardware": "a GPU", "size": 64, "floor": floor, "rows": rows}


def bench_json():
    """One rank's fastest row: 16 ms of arithmetic, 4 beside."""
    rows = [
        {"row": "eager", "ranks": 1, "step_ms": [30.0], "error": None},
        {"row": "compiled", "ranks": 1, "step_ms": [19.0, 20.0, 25.0], "error": None},
        {"row": "piflux-1", "ranks": 1, "step_ms": [], "error": "out of memory"},
        {"row": "gather", "ranks": 2, "step_ms": [5.0], "error": None},
    ]
    return {"hardware": "a GPU", "width": 64, "height": 64, "rows": rows}


def model(host_s=0.0):
    measured = scaling.Measured.of(steps_json(), bench_json())
    return scaling.Model(measured, {2: work(2), 4: work(4)}, host_s)


def schedule(row, ranks):
    return Schedule(**scaling.ROWS[row], world_size=ranks)


def ms(step):
    return [1000 * getattr(step, f"{name}_s") for name in TERMS]


TERMS = ("arithmetic", "rest", "memory", "wait", "final", "host")


# Reading all keys and values once takes a third of prediction: 0.2 ms. A layer's travel 1.2 ms on
# two ranks, of which 1 is hidden, and 1.9 on four, of which 0.5 is.
@pytest.mark.parametrize(
    ("row", "ranks", "steady", "sync"),
    [
        ("gather", 2, [8, 2, 0.4, 0.4, 0.3, 0], [8, 2, 0.4, 0.4, 0.3, 0]),
        ("gather", 4, [4, 1.5, 0.4, 2.8, 0.5, 0], [4, 1.5, 0.4, 2.8, 0.5, 0]),
        ("rotate", 2, [8, 2, 0.6, 0, 0.3, 0], [8, 2, 2, 0.4, 0.3, 0]),
        ("rotate", 4, [4, 1.5, 0.6, 0, 0.5, 0], [4, 1.5, 2, 2.8, 0.5, 0]),
        ("rotate-recompute", 2, [8, 2, 0.6, 0, 0.3, 0], [16, 4, 2, 0, 0, 0]),
        ("displaced", 2, [8, 2, 1.1, 0, 0.3, 0], [8, 2, 2, 0.4, 0.3, 0]),
    ],
)
def test_steps_by_hand(row, ranks, steady, sync):
    found = model().steps(work(ranks), schedule(row, ranks), SLOW)
    assert [ms(step) for step in found] == [pytest.approx(steady), pytest.approx(sync)]


@pytest.mark.parametrize(("row", "memory"), [("gather", 0), ("rotate", 0.6), ("displaced", 0.7)])
def test_what_arrives_in_its_place_is_not_joined(row, memory):
    steady, _ = model().steps(work(2), schedule(row, 2), replace(SLOW, direct=True))
    assert ms(steady)[2] == pytest.approx(memory)


def test_displaced_waits_for_what_travels_longer_than_the_step():
    slower = scaling.Link(gbs=0.1, latency_s=0.0, hop_s=0.0)
    steady, _ = model().steps(work(2), schedule("displaced", 2), slower)
    assert ms(steady) == pytest.approx([8, 2, 1.1, 20 - 11.1, 2, 0])


@pytest.mark.parametrize(
    ("row", "steady", "sync"),
    [("gather", 0, 0), ("rotate", 0, 0), ("rotate-recompute", 0, 3), ("displaced", 0, 12.3)],
)
def test_a_step_that_is_not_recorded_takes_what_the_host_does(row, steady, sync):
    """25 ms. Only sync steps that are recomputed, or of `displaced`, are not recorded."""
    found = model(host_s=0.025).steps(work(2), schedule(row, 2), SLOW)
    assert [1000 * step.host_s for step in found] == pytest.approx([steady, sync])


def test_an_image_by_hand():
    """Of four steps 0 and 2 are sync steps."""
    image = model().image(work(2), schedule("rotate", 2), SLOW, 4)
    assert 1000 * image.image_s == pytest.approx(2 * 10.9 + 2 * 12.7)
    assert 1000 * image.cost.mean_s == pytest.approx(11.8)
    assert image.faster == pytest.approx(20 / 11.8)
    assert image.sync_share == pytest.approx(25.4 / 47.2)
    assert model().image(work(2), schedule("gather", 2), SLOW, 4).sync_share == pytest.approx(1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_over_a_free_link_a_step_is_what_was_measured(ranks):
    """To the digit for `rotate`; `gather` joins keys and values in place of predicting them."""
    step_ms = {2: 10.6, 4: 6.1}[ranks]
    rotate, _ = model().steps(work(ranks), schedule("rotate", ranks), FREE)
    assert 1000 * rotate.total_s == pytest.approx(step_ms)
    gather, _ = model().steps(work(ranks), schedule("gather", ranks), FREE)
    assert 1000 * gather.total_s == pytest.approx(step_ms - 0.2)
    assert 1000 * model().one_s(work(ranks)) == pytest.approx(20)


def test_one_rank_may_be_of_a_run_on_several_gpus():
    several = bench_json() | {"hardware": "2 x a GPU"}
    several["rows"] = [*several["rows"], {"row": "piflux-1-fp8", "ranks": 1, "step_ms": [9.0]}]
    assert scaling.Measured.of(steps_json(), several).one_s == pytest.approx(0.020)


def test_a_worse_link_makes_nothing_faster():
    for row in scaling.ROWS:
        for ranks in (2, 4):
            for worse in (
                replace(SLOW, gbs=0.9),
                replace(SLOW, latency_s=2e-4),
                replace(SLOW, hop_s=9e-5),
            ):
                before, after = (
                    model().image(work(ranks), schedule(row, ranks), link, 28).image_s
                    for link in (SLOW, worse)
                )
                hop_alone = ranks == 2 and worse.hop_s != SLOW.hop_s
                assert (after == before) if hop_alone else (after > before), (row, ranks, worse)


def test_what_else_a_step_takes_follows_the_tokens_of_a_part():
    """Measured: 1.5 ms for 132, 2 for 264 and 4 for 528."""
    rest = [1000 * model().rest_s(tokens) for tokens in (10, 132, 198, 264, 396, 528, 1056)]
    assert rest == pytest.approx([1.5, 1.5, 1.75, 2, 3, 4, 8])


def test_at_another_size_memory_follows_the_tokens():
    """Twice as many on two ranks; keys and values are twice as many, too."""
    small = work(2)
    part = [replace(layer, kv_bytes=2 * layer.kv_bytes) for layer in small.part]
    large = scaling.Work(2, 2 * small.tokens, part, small.whole, small.final_bytes)
    steady, sync = model().steps(large, schedule("rotate", 2), FREE)
    assert ms(steady) == pytest.approx([8, 4, 1.2, 0, 0, 0])
    assert ms(sync) == pytest.approx([8, 4, 4, 0, 0, 0])


def test_work_is_counted_in_the_captured_graph():
    """A double and two single blocks, 16 image and 6 text tokens, bfloat16."""
    options = {"width": 64, "height": 64, "text_tokens": 6, "dtype": torch.bfloat16}
    found = scaling.Work.of(preview(CONFIG, Schedule("rotate", world_size=2), **options), 22)
    assert (found.ranks, len(found.part), found.final_bytes) == (2, 3, 8 * 16 * 2)
    assert found.held_bytes == 3 * 2 * 22 * 64 * 2
    assert all(layer.gathers == 1 and layer.beside_flops > 0 for layer in found.part)


# ------------------------------------------------------------------------------------------ links


def test_links_reach_what_was_measured():
    """A layer's 28.3 MB and the prediction's 0.26 MB, on two ranks."""
    for name, count, seconds in [
        ("nvlink", 28311552, 0.137e-3),
        ("nvlink", 262144, 0.03e-3),
        ("no-p2p", 28311552, 1.15e-3),
    ]:
        rates = scaling.LINKS[name].rates(2, 1.0, 1.0)
        assert rates.gather_s(count, 1) == pytest.approx(seconds)
    nvlink, no_p2p, sockets = scaling.LINKS.values()
    assert nvlink.gbs > 10 * no_p2p.gbs > 50 * sockets.gbs
    eight, two = (nvlink.rates(n, 1.0, 1.0).latency_s for n in (8, 2))
    assert eight - two == pytest.approx(6 * 3.4e-6)


def test_a_link_of_ones_own():
    name, link = scaling.Link.parse("pcie5:50:20:5")
    assert (name, link) == ("pcie5", scaling.Link(50.0, pytest.approx(2e-5), pytest.approx(5e-6)))
    for wrong in ("infiniband", "x:50:20", "x:0:1:1", "x:nan:1:1", "x:1:-1:1", "x:a:1:1"):
        with pytest.raises(
            ValueError, match=r"choose from nvlink, no-p2p, sockets, or write name:"
        ):
            scaling.Link.parse(wrong)


# ---------------------------------------------------------------------------------------- records


def broken(record, **changes):
    """The record with an entry of its last row, or of itself, changed."""
    changed = json.loads(json.dumps(record))
    for name, value in changes.items():
        (changed["rows"][-1] if name in changed["rows"][-1] else changed)[name] = value
    return changed


@pytest.mark.parametrize(
    ("steps", "bench", "message"),
    [
        ([], bench_json(), "steps.json is no record of a benchmark"),
        ({"rows": [1]}, bench_json(), "steps.json is no record of a benchmark"),
        (steps_json(), {"rows": None}, "bench.json is no record of a benchmark"),
        (broken(steps_json(), size=None), bench_json(), "size is None, not a number above 0"),
        (broken(steps_json(), hardware="CPU"), bench_json(), "of two machines"),
        (broken(steps_json(), size=128), bench_json(), "128 x 128 pixels, bench.json is not"),
        (steps_json(), bench_json() | {"rows": []}, "no row of one rank"),
        (
            broken(steps_json(), variant="displaced"),
            bench_json(),
            "has 1 rows of 'rotate', and two",
        ),
        (broken(steps_json(), step_ms=-1), bench_json(), "4 ranks: step_ms is -1, not"),
        (broken(steps_json(), sync_ms=math.nan), bench_json(), "4 ranks: sync_ms is nan, not"),
        (
            broken(steps_json(), longest=[]),
            bench_json(),
            "_exchange takes 0 ms of a step of 6.1 ms",
        ),
        (
            broken(steps_json(), longest=kernels(7.0)),
            bench_json(),
            "_exchange takes 7 ms of a step",
        ),
        (broken(steps_json(), sync_ms=20.0), bench_json(), "fills more caches takes no longer"),
        (broken(steps_json(), floor=None), bench_json(), "linear_tflops is None, not a number"),
    ],
)
def test_nonsense_is_refused(steps, bench, message):
    with pytest.raises(ValueError, match=message):
        scaling.Measured.of(steps, bench)


def test_steps_that_are_faster_than_their_arithmetic_are_refused():
    """4 ms of arithmetic on four ranks."""
    measured = scaling.Measured.of(broken(steps_json(), step_ms=4.5), bench_json())
    with pytest.raises(ValueError, match=r"of 132 tokens takes 0\.1 ms less than its arithmetic"):
        scaling.Model(measured, {2: work(2), 4: work(4)}, 0.0)


def test_the_measured_files_are_understood():
    results = ROOT / "benchmarks" / "results"
    names = ("2026-11-28-steps-h200.json", "2026-11-28-bench-two-h200-fp8.json")
    found = scaling.Measured.of(*(json.loads((results / name).read_text()) for name in names))
    assert found.tokens == 4096 + 512
    assert found.one_s > found.step_s[2] > found.step_s[4] > found.step_s[8]
    assert all(0.001 < seconds < 0.01 for seconds in (found.fill_s, *found.exchange_s.values()))


def test_the_documentation_shows_what_the_model_said():
    """Each line of the table over NVLink at 1024 x 1024, but for its last digits."""
    record = json.loads((ROOT / "benchmarks/results/2026-11-28-scaling-model.json").read_text())
    page = (ROOT / "docs" / "measuring.md").read_text()
    lines = re.findall(r"^\| (\d) \| `(\w+)` \| (\S+) \| (\S+)x \| (\S+) \|", page, re.MULTILINE)
    assert len(lines) == 9
    images = {
        (row["ranks"], row["row"]): row["image"]
        for row in record["rows"]
        if (row["size"], row["link"]) == (1024, "nvlink")
    }
    for ranks, row, *shown in lines:
        image = images[int(ranks), row]
        said = (image["image_s"], image["faster"], 1000 * image["cost"]["steady_s"])
        assert [float(number) for number in shown] == pytest.approx(said, abs=0.05)


# ---------------------------------------------------------------------------------------- command


@pytest.fixture
def app(monkeypatch):
    monkeypatch.setattr(scaling, "count", lambda size, ranks: work(ranks, size**2 // 256 + 512))
    command = typer.Typer()
    command.command()(scaling.main)
    return command


def invoke(app, folder, steps, *arguments):
    for name, record in (("steps", steps), ("bench", bench_json())):
        (folder / f"{name}.json").write_text(json.dumps(record))
    files = (f"--steps-json={folder}/steps.json", f"--bench-json={folder}/bench.json")
    return CliRunner().invoke(app, [*files, f"--out={folder}/out", "--size=64", *arguments])


def test_the_command_writes_what_it_prints(app, tmp_path):
    done = invoke(app, tmp_path, steps_json(), "--link=mine:1:100:50", "--host-ms=0", "--steps=4")
    assert done.exit_code == 0, done.output
    assert "64 x 64, mine; one rank: 20.0 ms a step" in done.output
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert record["measured"]["steps.json"]["hardware"] == "a GPU"
    assert [(row["ranks"], row["row"]) for row in record["rows"]] == [
        (ranks, row) for ranks in (2, 4) for row in scaling.ROWS
    ]
    rotate = record["rows"][1]["image"]
    assert rotate["cost"]["mean_s"] == pytest.approx(11.8e-3)
    assert "1.69x" in done.output  # 20 / 11.8


@pytest.mark.parametrize(
    ("steps", "arguments", "message"),
    [
        (broken(steps_json(), step_ms=0), (), "step_ms is 0, not a number above 0"),
        (broken(steps_json(), step_ms=4.5), (), "0.1 ms less than its arithmetic"),
        (steps_json(), ("--link=rope",), "'rope': choose from"),
        (steps_json(), ("--size=100",), "multiple of 16"),
        (steps_json(), ("--steps-json=none.json",), "No such file"),
    ],
)
def test_wrong_arguments(app, tmp_path, steps, arguments, message):
    done = invoke(app, tmp_path, steps, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
