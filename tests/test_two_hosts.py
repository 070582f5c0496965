"""Two hosts: network namespaces with a link between them that fails.

It takes a Linux on which this process may make namespaces, as root may.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from models import flux_inputs, tiny_flux

import piflux
from piflux.errors import PifluxError

ADDRESSES = "192.0.2.1", "192.0.2.2"  # for documentation: nobody has them
TIMEOUT_S = 12  # more than a rank of another host may be silent
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


def main(folder):
    rank = int(os.environ["RANK"])
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
    print(json.dumps(told), flush=True)
    os._exit(0)  # a group whose other half is gone has nothing to say goodbye to


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


def start(name, rank, folder):
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": name,
        "PIFLUX_TIMEOUT_S": str(TIMEOUT_S),
        "OMP_NUM_THREADS": "1",
    }
    # With a host name of its own, since by that ranks know which processes they can look at.
    inside = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$0" "$@"']
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *inside, sys.executable, __file__, str(folder)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_link_that_fails(hosts, tmp_path):
    """For a while it costs that while; for good the host with the store goes on alone."""
    a, _ = hosts

    def link(state):
        ip("-n", a, "link", "set", a, state)

    def at(image):
        wanted = [tmp_path / f"{image} {rank}" for rank in range(2)]
        while not all(path.exists() for path in wanted):
            assert all(rank.poll() is None for rank in ranks), "a rank has ended"
            time.sleep(0.01)

    ranks = [start(name, rank, tmp_path) for rank, name in enumerate(hosts)]
    try:
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
        told = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for image in IMAGES[:3]:
        assert [rank[image][0] for rank in told] == ["right", "right"], image
    assert min(rank["down for 3 s"][1] for rank in told) > 3
    with_store, other = told
    assert with_store["down for good"][0] == with_store["alone"][0] == "right"
    lost_s = [rank["down for good"][1] for rank in told]
    assert min(lost_s) > 5 and max(lost_s) < 2 * TIMEOUT_S  # not at once, and not for ever
    # What it can't see is whether the other lives: it may as well have raised first.
    for image in IMAGES[3:]:
        assert other[image][0].partition(":")[0] in ("right", "RankLost", "RankFailed"), other


if __name__ == "__main__":
    main(*sys.argv[1:])
