"""training/muon.py against torch.optim.Muon."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "training"))

from muon import Muon


def test_steps_are_those_of_torchs_muon() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (24, 8), (8, 24), (8, 8)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01}
    a = Muon(ours, **settings)
    b = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        # Both iterate in bfloat16, in another order of additions.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
