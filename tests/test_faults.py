"""What a fault of one rank makes of the image, and of the next one; `faults.py` runs many more."""

import math
import os
import socket
import time

import pytest
import torch
from faults import COMPILING, KINDS, LOST, MEASURING, Fault, faults, try_out
from ranks import Pool

from piflux.errors import RankFailed
from piflux.integrations.alike import _scales
from piflux.ranks import environment
from piflux.ranks.agreement import Norm
from piflux.ranks.board import Board, Silent, bounded
from piflux.ranks.groups import resolve_group

SOME = [
    Fault("killed", "rotate", 2, 0, 0, None),
    Fault("killed", "gather", 3, 1, 2, 1),
    Fault("ended", "displaced", 2, 1, 4, 2),
    Fault("stopped", "rotate", 2, 1, 3, None),
    Fault("stopped", "gather", 3, 0, 2, 1),
    Fault("raises", "gather", 3, 2, 3, 1),
    Fault("interrupted", "rotate", 2, 0, 2, None),
    Fault("out of memory", "displaced", 2, 1, 1, 0),
    Fault("noise", "rotate", 2, 1, 3, None),
    Fault("prompt", "displaced", 3, 1, 4, None),
    Fault("prompt", "gather", 2, 1, 1, None),  # before any condition has come twice
    Fault("prompt", "rotate", 3, 2, 1, None),
    Fault("clock", "gather", 2, 0, 2, None),
    Fault("weights", "rotate", 2, 1, 0, None),
    Fault("skips", "rotate", 2, 0, 2, None),
    Fault("leaves", "rotate", 2, 1, 4, None),
    Fault("leaves", "gather", 2, 0, 0, None),
    Fault("same nan", "rotate", 2, 0, 0, None),
    Fault("killed", "auto", 3, 2, MEASURING, 1),
    Fault("stopped", "auto", 3, 1, MEASURING, None),
    Fault("raises", "auto", 2, 0, MEASURING, 2),
    Fault("interrupted", "auto", 2, 1, COMPILING, None),
]


@pytest.mark.parametrize("fault", SOME, ids=str)
def test_a_fault_is_told_or_outlived(fault):
    """Nothing silent, nothing stuck; an image outlives a rank, and the next one is right."""
    judged = try_out(fault)
    assert not judged.bad, "\n".join(judged.told)
    told = "\n".join(judged.told)
    if fault.kind in ("raises", "interrupted", "out of memory"):
        at = {MEASURING: "the measurement", COMPILING: "the model's capture"}.get(
            fault.step, "step"
        )
        assert f"RankFailed: rank {fault.rank} stopped in {at}" in told
    if fault.kind == "stopped":
        assert f"rank {fault.rank}, image 2: Excluded" in told
    if fault.kind in ("noise", "prompt", "clock", "weights", "skips", "leaves"):
        assert "RanksDisagree" in told
        assert not judged.right


def test_the_same_seed_gives_the_same_faults():
    many = [fault for fault, _ in zip(faults(1), range(3 * len(KINDS)), strict=False)]
    assert many == [fault for fault, _ in zip(faults(1), range(3 * len(KINDS)), strict=False)]
    assert {fault.kind for fault in many} == set(KINDS)
    assert any(fault.kind in LOST and fault.inside is not None for fault in many)


# --- joining ------------------------------------------------------------------------------------


def joining(rank, group, port):
    """A store that accepts connections and says nothing."""
    os.environ.update(
        RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PIFLUX_TIMEOUT_S="1"
    )
    began = time.monotonic()
    with pytest.raises(RankFailed) as raised:
        resolve_group(None)
    return str(raised.value), time.monotonic() - began


def test_joining_has_a_deadline():
    with socket.socket() as silent, Pool(1, joined=False) as pool:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        ((said, seconds),) = pool.run(1, joining, str(port), timeout=30)
    assert "rank 1 could not join the others: no answer within 1 s" in said
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)" in said
    assert "PIFLUX_TIMEOUT_S" in said
    assert seconds < 10


RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", "2"),
        ("RANK", "-1"),
        ("RANK", "first"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "70000"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, name, value):
    for key, right in RANK.items():
        monkeypatch.setenv(key, right)
    environment.check()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} ") as raised:
        environment.check()
    assert value in str(raised.value)


@pytest.mark.parametrize("asked", ["0", "-5", "inf", "nan", "soon"])
def test_a_timeout_is_seconds(monkeypatch, asked):
    monkeypatch.setenv("PIFLUX_TIMEOUT_S", asked)
    with pytest.raises(ValueError, match=f"PIFLUX_TIMEOUT_S must be .* got '{asked}'"):
        environment.timeout_asked()


# --- the board ----------------------------------------------------------------------------------


def test_who_asks_does_not_wait_for_ever():
    board = Board(store=None)
    answer = board.ask(lambda _: time.sleep(0.5))
    with pytest.raises(Silent, match=r"no answer within 0\.1 s"):
        answer.get(0.1)
    answer.get(5)
    with pytest.raises(ZeroDivisionError):
        board.ask(lambda _: 1 / 0).get(5)
    assert board.ask(lambda _: "next").get(5) == "next"
    board.close(5)
    with pytest.raises(Silent):
        bounded(lambda: time.sleep(1), 0.05)


# --- weights ------------------------------------------------------------------------------------


def test_how_much_adapters_count_is_compared():
    layer = torch.nn.Linear(2, 2)
    layer.scaling = {"style": 0.5}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    assert _scales(model) == {"scale of adapter style in 1": "0.5"}


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_the_same_norm_is_agreement(value):
    assert not Norm(value).differs(Norm(value))
    assert Norm(value).differs(Norm(1.001))
    assert Norm(1.0).differs(Norm(math.nan)) and Norm(1.0).differs(Norm(math.inf))
