"""What the compiler tells: explain, the log and the trace."""

import json
import os
import subprocess
import sys

import pytest
from expecttest import TestCase
from graphs import captured_flux, transformed
from models import tiny_flux

import piflux
from piflux.compile.report import GraphReport
from piflux.cost.memory import Own
from piflux.policies.schedule import Schedule

PROGRAM = """
import torch, torch.nn.functional as F, piflux
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q)

print(piflux.parallelize(Model(), inner="eager")(torch.randn(1, 8, 4)).shape)
"""


def report(policy, world_size=2, **options):
    gm = captured_flux()
    ctx = transformed(gm, world_size)
    schedule = Schedule(policy, world_size=world_size, **options)
    return GraphReport.of(ctx, schedule, Own.of(gm.graph))


class TestExplain(TestCase):
    def test_as_text(self):
        self.assertExpectedInline(
            str(report("rotate")),
            """\
rotate on 2 ranks, sync at 0, 2, predicted between
  attentions rewritten   2
  nodes on a part        192
  sent in a sync step    20.35 kB a rank
  sent in a steady step  1.152 kB a rank
  cache                  73.73 kB a rank and stream
  memory                 192.9 kB a rank: weights 0 B, cache, sending 57.6 kB, a step 61.57 kB
  boundaries
    shard    %hidden_states dim 1: 35 -> 18 (1 twice) tokens
    shard    %encoder_hidden_states dim 1: 13 -> 7 (1 twice) tokens
    shard    %txt_ids dim 0: 13 -> 7 (1 twice) tokens
    shard    %img_ids dim 0: 35 -> 18 (1 twice) tokens
    unshard  %output dim 1: 35 -> 18 (1 twice) tokens""",
        )

    def test_schedules_as_text(self):
        for options, first_line in [
            ({"policy": "gather"}, "gather on 2 ranks, every step a sync step"),
            (
                {"policy": "rotate", "sync_steps": (0, 3), "refresh_every": 9, "order": 0},
                "rotate on 2 ranks, sync at 0, 3, then one every 9",
            ),
            (
                {"policy": "displaced", "sync": "recompute"},
                "displaced on 2 ranks, sync at 0, 2, recomputed, predicted between",
            ),
            (
                {"policy": "rotate", "compression": "int8"},
                "rotate on 2 ranks, sync at 0, 2, predicted between by changes in 8 bits",
            ),
            (
                {"policy": "rotate", "compression": "int4"},
                "rotate on 2 ranks, sync at 0, 2, predicted between from versions in 8 bits by "
                "changes in 4",
            ),
            (
                {"policy": "gather", "compute": 18},
                "gather on 2 ranks, every step a sync step, computing 18 steps of an image",
            ),
            (
                {"policy": "gather", "compute": "xxx.x"},
                "gather on 2 ranks, every step a sync step, computing 4 of 5 steps: xxx.x",
            ),
            (
                {"policy": "gather", "compute": "auto"},
                "gather on 2 ranks, every step a sync step, computing about 64% of the steps",
            ),
        ]:
            self.assertEqual(str(report(**options)).splitlines()[0], first_line)

    def test_as_data(self):
        """13 text and 35 image tokens, 3 heads of 16 in fp32, 16 channels out, 2 attentions."""
        token = 2 * 3 * 16 * 4  # a key and a value
        final = 18 * 16 * 4
        for policy, steady, cache in [
            ("gather", final + 2 * 25 * token, 0),
            ("rotate", final, 2 * 2 * 48 * token),
            ("displaced", final + 2 * 25 * token, 2 * (2 * 48 + 3 * 25) * token),
        ]:
            data = report(policy)
            self.assertEqual(data.attentions, 2)
            self.assertEqual(data.sync_bytes, final + 2 * 25 * token)
            self.assertEqual((policy, data.steady_bytes), (policy, steady))
            self.assertEqual((policy, data.cache_bytes), (policy, cache))
        self.assertEqual(report("rotate", sync="recompute").sync_bytes, 0)
        self.assertEqual(report("rotate", order=0).cache_bytes, 2 * 48 * token)
        # A change of both: a scale and 16 numbers for each head, of 8 bits or of 4.
        for compression, row, version in [
            ("int8", 2 * 3 * (4 + 16), token),
            ("int4", 2 * 3 * (2 + 8), 2 * 3 * (2 + 16)),
        ]:
            for policy, steady, cache in [
                ("gather", final + 2 * 25 * token, 0),
                ("rotate", final, 2 * 48 * (version + row)),
                ("displaced", final + 2 * 25 * row, 2 * (48 * (version + row) + 3 * 25 * row)),
            ]:
                data = report(policy, compression=compression)
                self.assertEqual(data.sync_bytes, final + 2 * 25 * token)
                self.assertEqual((policy, data.steady_bytes), (policy, steady))
                self.assertEqual((policy, data.cache_bytes), (policy, cache))
        unshard = data.boundaries[-1]
        self.assertEqual((unshard.lengths, unshard.part_lengths), ((35,), (18,)))
        self.assertEqual(unshard.overlaps, (1,))

    def test_before_the_first_call(self):
        model = piflux.parallelize(tiny_flux(), inner="eager")
        self.assertEqual(piflux.explain(model).graphs, ())
        self.assertIn("call the model once", str(piflux.explain(model)))


def test_explain_wants_what_parallelize_gave():
    with pytest.raises(TypeError, match="not parallelized"):
        piflux.explain(tiny_flux())


def test_log_and_trace(tmp_path):
    """TORCH_LOGS names each pass with its count; TORCH_TRACE has the graphs around each."""
    env = os.environ | {"TORCH_LOGS": "+piflux", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 1, 8, 4])" in done.stdout
    assert "layout" in done.stderr
    assert "2 nodes" in done.stderr
    (trace,) = tmp_path.iterdir()
    names = []
    for line in trace.read_text().splitlines():
        if line.startswith("V") and "{" in line:
            entry = json.loads(line[line.index("{") :])
            names.append(entry.get("artifact", {}).get("name"))
    assert "piflux_0_captured" in names
    assert "piflux_1_layout" in names
