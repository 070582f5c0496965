"""How a server starts and ends: its process, its signals, and what its command refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import PATIENCE_S, get, post, until
from typer.testing import CliRunner

from piflux.serving.server import CannotServe, listen
from piflux.tools import cli

PROGRAM = """
import sys, threading
from fake_engine import FakeEngine
from piflux.serving.server import CannotServe, listen, serve

def let_go():
    if sys.stdin.readline():
        engine.held_at = None

engine = FakeEngine()
engine.held_at = 1
threading.Thread(target=let_go, daemon=True).start()
if sys.argv[2:]:
    engine.phase, engine.reason = "failed", sys.argv[2]
try:
    serve(
        engine, listen("127.0.0.1", 0), "127.0.0.1", drain_s=float(sys.argv[1]),
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
except CannotServe as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit(130)
"""


class Server:
    """A process of `serve`, with its address once it is ready.

    It draws no more than one step, until it is let go.
    """

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert self.process.stderr is not None
        self.url, self.said = "", []
        for line in self.process.stderr:
            self.said.append(line.strip())
            if line.startswith("Ready"):
                self.url = line.split()[-1]
                break

    def draw(self) -> httpx2.Response:
        asked = {"prompt": "x", "num_inference_steps": 3, "seed": 1}
        return post(f"{self.url}/v1/images/generations", json=asked)

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, list[Any], str]:
        """Exit code, log lines and what else was said."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err

    def until_taken(self, count: int = 1) -> None:
        """Until so many requests are drawn, or wait for it."""
        pattern = r"^piflux_(?:drawing|queue_length) (\S+)$"

        def taken() -> float:
            told = get(f"{self.url}/metrics").text
            return sum(map(float, re.findall(pattern, told, re.MULTILINE)))

        until(lambda: taken() == count)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def begin(*arguments: object) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.communicate()


def test_sigterm_lets_be_drawn_what_was_taken(start):
    """Also where it comes twice: to the process, and to its group."""
    server = start(600)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.draw) for _ in range(2)]
        server.until_taken(2)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        until(lambda: refuses(server.url))
        server.let_go()
        assert [answer.result().status_code for answer in answers] == [200, 200]
    code, lines, said = server.ended()
    events = [line["event"] for line in lines if line["event"] != "request"]
    assert (code, events) == (0, ["listening", "ready", "ending", "ended"])
    assert "Traceback" not in said
    requests = [line for line in lines if line.get("path") == "/v1/images/generations"]
    assert [line["status"] for line in requests] == [200, 200]


def test_what_takes_longer_than_the_drain_is_told(start):
    server = start(0.3)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.draw)
        server.until_taken()
        server.signal(signal.SIGINT)
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "ending"
    assert server.ended()[0] == 0


def test_a_second_interrupt_ends_at_once(start):
    server = start(600)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.draw)
        server.until_taken()
        server.signal(signal.SIGINT)
        until(lambda: refuses(server.url))
        server.signal(signal.SIGINT)
        code, lines, said = server.ended()
        late = answer.exception(timeout=PATIENCE_S)
    assert late is not None or answer.result().status_code == 503
    assert code == 130
    assert "Traceback" not in said
    assert not any("traceback" in line for line in lines)


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
    except OSError:
        return True
    return False


def test_a_server_whose_engine_has_failed_ends(start):
    server = start(5, "no weights")
    code, lines, _ = server.ended()
    assert (code, server.said[-1]) == (1, "nothing can be drawn: no weights")
    assert [line["reason"] for line in lines if line["event"] == "failed"] == ["no weights"]


def test_a_port_that_is_taken_is_told():
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(CannotServe, match=f"port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(CannotServe, match=r"can't listen on no.such.host.invalid"):
        listen("no.such.host.invalid", 80)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--host=0.0.0.0"], "others reach it, and there are no API keys"),
        (["--host=::"], "others reach it, and there are no API keys"),
        (["--api-keys=./no/keys"], "--api-keys no/keys can't be read as API keys: No such file"),
        (["--sizes=256x256,100x100"], "--sizes must be a multiple of 16"),
        (["--groups=two"], "write sizes of groups, as in 1,2"),
        (["--ranks=2", "--groups=3"], "of 2 ranks choose among 1, 2"),
        (["--schedule=low"], "write QUALITY=FILE"),
        (["--schedule=low=pyproject.toml"], "--schedule low=pyproject.toml: not a file of set"),
        (["--model=./no/folder"], "no such folder"),
        (["--loras=./no/folder"], "--loras no/folder: no such folder"),
    ],
)
def test_what_the_command_refuses(arguments, said):
    environment = {"COLUMNS": "200", "RANK": None, "WORLD_SIZE": None, "PIFLUX_API_KEYS": None}
    done = CliRunner().invoke(cli.app, ["serve", "--port=0", *arguments], env=environment)
    assert done.exit_code in (1, 2) and done.exception is not None
    assert said in " ".join(done.output.replace("│", " ").split()), done.output


def test_a_schedule_is_for_a_quality_that_is_not_exact(tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text('{"policy": "rotate"}')
    for quality in ("best", "lossless"):
        arguments = ["serve", "--port=0", f"--schedule={quality}={file}"]
        done = CliRunner().invoke(cli.app, arguments, env={"RANK": None, "WORLD_SIZE": None})
        assert done.exit_code == 2
        assert f"a schedule for the quality '{quality}': choose one of high" in done.output


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "piflux.serving.server")
    done = CliRunner().invoke(cli.app, ["serve"], env={"RANK": None, "WORLD_SIZE": None})
    assert done.exit_code == 1
    assert "needs the package 'uvicorn': pip install 'piflux[serve]'" in done.output
