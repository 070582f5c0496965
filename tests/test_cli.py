"""The command line: what it draws, what it says, how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from piflux import generate as generating
from piflux.bench import FLUX_DEV
from piflux.cli import app
from piflux.doctor import choose_policy, step_times

COMMAND = [sys.executable, "-m", "piflux"]
SMALL = ["--steps=3", "--size=64x64"]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def invoke(*arguments, **environment):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "RANK": None, "WORLD_SIZE": None, **environment}
    result = CliRunner().invoke(app, [str(x) for x in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(result):
    return " ".join(result.output.replace("│", " ").split())


def ranks_of(pid):
    """The processes that `pid` started, their children and so on."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    parents = dict(tuple(map(int, line.split())) for line in listed.stdout.splitlines())
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------- generate


def test_one_rank_draws_a_picture_that_says_what_it_is(tmp_path):
    out = tmp_path / "apple.png"
    result = invoke("generate", "rose, flat style", "--ranks=1", *SMALL, "--seed=7", f"--out={out}")
    assert result.exit_code == 0, result.output
    assert "on 1 rank(s)" in result.output
    with Image.open(out) as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "rose, flat style"
        assert (image.text["seed"], image.text["policy"]) == ("7", "rotate")
        assert image.text["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["apple.png"]


@on_cpu
def test_two_ranks_draw_several_prompts(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("camera\n\nrose, 3d style\n")
    command = [*COMMAND, "generate", f"--prompts={prompts}", "--ranks=2", "--policy=auto", "--json"]
    command += [*SMALL, f"--out={tmp_path / 'x.png'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["ranks"] == 2
    assert record["settings"]["policy"] in ("gather", "displaced", "rotate")
    assert "of a step's computing" in record["reason"]
    assert record["step_s"] > 0
    names = [Path(path).name for path in record["images"]]
    assert names == ["x-0.png", "x-1.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


@on_cpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["interrupted", "a rank is killed"])
def test_no_process_is_left(tmp_path, what):
    out = tmp_path / "never.png"
    command = [*COMMAND, "generate", "camera", "--ranks=2", "--steps=2000", f"--out={out}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        busy = set()
        while len(busy) < 2:  # both ranks compute
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
            started = ranks_of(process.pid)
            busy = {pid for pid in started if cpu_seconds(pid) > 10}
        start = time.monotonic()
        if what == "interrupted":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(max(busy), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        took = time.monotonic() - start
    finally:
        process.kill()
    while any(alive(pid) for pid in started):  # Python's resource tracker ends after its owner
        assert time.monotonic() - start < took + 5 * LOADED
        time.sleep(0.1)
    assert not out.exists()
    assert "Traceback" not in errors
    if what == "interrupted":
        assert process.returncode == 130
        assert "interrupted" in errors
        assert took < 5 * LOADED
    else:
        assert process.returncode == 1
        assert "failed" in errors and "SIGKILL" in errors


LOADED = 3  # CI's cores are shared
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    result = invoke("generate", "x", "--ranks=1", *SMALL, f"--out={tmp_path / 'x.png'}")
    assert result.exit_code == 1
    assert "x.png can't be saved: No space left on device" in words(result)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_is_quoted():
    with pytest.raises(generating.Failed, match=r"rank [01] failed: ValueError: on purpose"):
        generating.launch(_fails, (), 2)


def _fails():
    raise ValueError("on purpose")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give a prompt, or a file of them"),
        (["x", "--prompts=y"], "give a prompt, or a file of them"),
        (["--prompts=./no/file"], "no such file"),
        (["--prompts=/dev/null"], "no such file"),
        (["x", "--model=./no/such/folder"], "no such folder"),
        (["x", "--model=tests"], "no model_index.json"),
        (["x", "--size=100x64"], "multiples of 16"),
        (["x", "--size=0x64"], "multiples of 16"),
        (["x", "--size=big"], "write width x height"),
        (["x", "--ranks=0"], "--ranks"),
        (["x", "--policy=warp"], "unknown policy 'warp'"),
        (["x", "--policy=no.json"], "not a file of settings"),
        (["x", "--sync-steps=-1"], "--sync-steps"),
        (["x", "--steps=0"], "--steps"),
        (["x", "--inner=magic"], "'inductor' or 'eager'"),
        (["x", "--out=./no/folder/x.png"], "there is no folder"),
        (["x", "--out=x.jpg"], "written as .png"),
    ],
)
def test_wrong_usage(arguments, said):
    result = invoke("generate", *arguments)
    assert result.exit_code == 2
    assert said in words(result)


def test_an_empty_file_of_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    result = invoke("generate", f"--prompts={tmp_path / 'empty.txt'}")
    assert result.exit_code == 2
    assert "no prompt in it" in words(result)


def test_a_folder_that_is_no_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    result = invoke("generate", "x", f"--model={tmp_path}", "--ranks=1")
    assert result.exit_code == 1
    assert f"{tmp_path} can't be loaded" in words(result)


def test_ranks_are_those_of_torchrun():
    result = invoke("generate", "x", "--ranks=3", RANK="0", WORLD_SIZE="2")
    assert result.exit_code == 2
    assert "torchrun started 2" in words(result)


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = invoke("generate", "x", "--ranks=2")
    assert result.exit_code == 2
    assert "there are 1 GPUs here" in words(result)


# ------------------------------------------------------------------------------ explain and doctor


def test_explain_runs_no_step():
    result = invoke("explain", "--ranks=4", "--policy=displaced", "--json", "--size=64x64")
    assert result.exit_code == 0, result.output
    (graph,) = json.loads(result.stdout)
    assert graph["schedule"]["policy"] == "displaced"
    assert graph["schedule"]["world_size"] == 4
    assert graph["attentions"] == 10
    assert "attentions rewritten   10" in invoke("explain", "--size=64x64").output


def test_explain_wants_a_policy():
    result = invoke("explain", "--policy=auto")
    assert result.exit_code == 2
    assert "ask doctor" in words(result)


@on_cpu
def test_doctor():
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["torch"] == torch.__version__
    assert found["gpus"] == []
    assert found["advice"]["link_gbs"] > 0
    assert found["advice"]["policy"] in ("gather", "displaced", "rotate")


def test_the_policy_is_the_freshest_that_hides():
    for sent_s, policy in [(0.04, "gather"), (0.3, "displaced"), (0.9, "rotate")]:
        chosen, reason = choose_policy(sent_s, 1.0)
        assert chosen == policy
        assert f"{sent_s:.1%}" in reason


def test_times_of_flux_dev_on_two_gpus():
    """28 MB a layer and rank; 74.4 TFLOP a step."""
    sent_s, compute_s = step_times(FLUX_DEV, 4608, 2, 656.0, 200.0, 2)
    assert sent_s == pytest.approx(57 * 28.3e6 / 200e9, rel=0.01)
    assert compute_s == pytest.approx(74.4e12 / 2 / 656e12, rel=0.01)
    assert choose_policy(sent_s, compute_s)[0] == "displaced"
    assert choose_policy(10 * sent_s, compute_s)[0] == "rotate"


def test_without_its_packages_the_command_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; from piflux.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'piflux[demo]'")
