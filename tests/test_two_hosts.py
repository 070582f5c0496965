"""Two hosts: network namespaces with a link between them that fails.

It takes a Linux on which this process may make namespaces, as root may.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from captures import captured_once
from models import flux_inputs, tiny_flux
from ranks import Pool

import piflux
from piflux.errors import PifluxError

ADDRESSES = "192.0.2.1", "192.0.2.2"  # for documentation: nobody has them
TIMEOUT_S = 12  # more than a rank of another host may be silent
LIMIT_S = 200  # what takes longer hangs
IMAGES = "as ever", "flaps", "down for 3 s", "down for good", "alone"
STEPS = 5
AT_STEP = 2


# --- in a host's process --------------------------------------------------------------------------


@torch.no_grad()
def draw(model, seed, at_step=None):
    """Latents of an image; `at_step` is called where that step begins."""
    inputs = flux_inputs(seed=seed)
    x = inputs.pop("hidden_states")
    for i in range(STEPS):
        if i == AT_STEP and at_step is not None:
            at_step()
        step = dict(inputs, hidden_states=x, timestep=torch.tensor([1 - i / STEPS]))
        x = x - model(**step, return_dict=False)[0] / STEPS
    return x


def go_to(host):
    """From here on this process is on a host: in its network, and of its name."""
    new_name, of_network = 0x04000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as network:
        if libc.setns(network.fileno(), of_network) or libc.unshare(new_name):
            raise OSError(ctypes.get_errno(), "this process can't go to another host")
    # By that ranks know which processes they can look at.
    name = host.encode()
    if libc.sethostname(name, len(name)):
        raise OSError(ctypes.get_errno(), "this process can't have a host name of its own")


@captured_once()
def drawn(rank, group, hosts, folder):
    """What became of each image, and how long it took."""
    go_to(hosts[rank])
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",  # nobody else's, in a network of its own
        "GLOO_SOCKET_IFNAME": hosts[rank],
        "PIFLUX_TIMEOUT_S": str(TIMEOUT_S),
    }
    plain = [draw(tiny_flux(), seed) for seed in range(len(IMAGES))]
    model = piflux.parallelize(tiny_flux(), policy="gather", inner="eager")
    told = {}

    def tell_and_wait():
        """Until the test has acted."""
        Path(folder, f"{image} {rank}").touch()
        while not Path(folder, image).exists():
            time.sleep(0.01)

    for seed, image in enumerate(IMAGES):
        began = time.monotonic()
        try:
            with piflux.generation(model):
                got = draw(model, seed, tell_and_wait)
            what = "right" if (got - plain[seed]).abs().max() < 1e-4 else "wrong"
        except PifluxError as error:
            what = f"{type(error).__name__}: {error}"
        told[image] = what, time.monotonic() - began
    return told


# --- the test ------------------------------------------------------------------------------------


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two namespaces; their ends of the link have the same names."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs Linux's ip, of the package iproute2")
    names = [f"piflux{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this process may not make network namespaces: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/30", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        yield names


def test_a_link_that_fails(hosts, tmp_path):
    """For a while it costs that while; for good the host with the store goes on alone."""
    a, _ = hosts

    def link(state):
        ip("-n", a, "link", "set", a, state)

    def at(image):
        wanted = [tmp_path / f"{image} {rank}" for rank in range(2)]
        while not all(path.exists() for path in wanted):
            assert not running.done(), f"a rank has ended: {running.result()}"
            time.sleep(0.01)

    with Pool(2, joined=False) as pool, ThreadPoolExecutor(1) as thread:
        running = thread.submit(pool.run, 2, drawn, hosts, str(tmp_path), timeout=LIMIT_S)
        (tmp_path / "as ever").touch()
        (tmp_path / "alone").touch()
        at("flaps")
        link("down")
        (tmp_path / "flaps").touch()
        for state in ("up", "down") * 4 + ("up",):
            time.sleep(0.2)
            link(state)
        at("down for 3 s")
        link("down")
        (tmp_path / "down for 3 s").touch()
        time.sleep(3)
        link("up")
        at("down for good")
        link("down")
        (tmp_path / "down for good").touch()
        told = running.result()
    for image in IMAGES[:3]:
        assert [rank[image][0] for rank in told] == ["right", "right"], image
    assert min(rank["down for 3 s"][1] for rank in told) > 3
    with_store, other = told
    assert with_store["down for good"][0] == with_store["alone"][0] == "right"
    assert min(rank["down for good"][1] for rank in told) > 5  # it may yet come back
    # What it can't see is whether the other lives: it may as well have raised first.
    for image in IMAGES[3:]:
        assert other[image][0].partition(":")[0] in ("right", "RankLost", "RankFailed"), other
