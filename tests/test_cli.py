"""The command line: what it draws, what it says, how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from piflux import cli
from piflux.bench import FLUX_DEV
from piflux.doctor import choose_policy, step_times
from piflux.errors import CannotSave, RankFailed
from piflux.generate import numbered
from piflux.launch import launch

COMMAND = [sys.executable, "-m", "piflux"]
SMALL = ["--steps=3", "--size=64x64"]
SECONDS_TO_END = 5  # after a signal
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def invoke(*arguments, **environment):
    env = {"COLUMNS": "200", "NO_COLOR": "1", "RANK": None, "WORLD_SIZE": None, **environment}
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(result):
    return " ".join(result.output.replace("│", " ").split())


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
    assert all(picture["total_s"] > picture["step_s"] > 0 for picture in record["pictures"])
    names = [Path(picture["path"]).name for picture in record["pictures"]]
    assert names == ["x-1.png", "x-2.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_numbers():
    assert numbered(Path("a/b.png"), 1) == (Path("a/b.png"),)
    assert numbered(Path("a/b.png"), 10)[::9] == (Path("a/b-01.png"), Path("a/b-10.png"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    result = invoke("generate", "x", "--ranks=1", *SMALL, f"--out={tmp_path / 'x.png'}")
    assert result.exit_code == 1
    assert "x.png can't be saved: No space left on device" in words(result)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_is_quoted():
    said = r"^rank [01] failed: ValueError: on purpose \(test_cli.py:\d+, in _fails\); under torch"
    with pytest.raises(RankFailed, match=said):
        launch(_fails, 2)


def _fails():
    raise ValueError("on purpose")


def test_a_rank_that_says_what_to_do_is_quoted_alone():
    with pytest.raises(RankFailed, match=r"^the folder is full: empty it$"):
        launch(_says, 2)


def _says():
    raise CannotSave("the folder is full: empty it")


def test_one_rank_is_interrupted(monkeypatch, tmp_path):
    """By SIGTERM, which raises where Python is."""
    monkeypatch.setattr(cli, "make_pictures", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    result = invoke("generate", "a cat", "--ranks=1", f"--out={tmp_path / 'p.png'}")
    assert result.exit_code == 130
    assert "interrupted" in result.output
    assert signal.getsignal(signal.SIGTERM) == before


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


# --------------------------------------------------------- several ranks, in processes of their own

DRAWS_NOTHING = Path(__file__).parent / "command.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Python in a session of its own, as from a terminal, its output in `folder`/log."""
    log = (folder / "log").open("w")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def start_gathering(folder: Path) -> subprocess.Popen:
    """Two ranks in one collective after the other, for as long as they may."""
    options = ("generate", "x", "--ranks=2", f"--out={folder / 'p.png'}")
    return start(folder, str(DRAWS_NOTHING), "gather", *options)


def wait_for(found: Callable[[], bool], process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


def gathered(folder: Path) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("gathered-*"))) == 2


def family_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in family_of(process) if "spawn_main" in " ".join(child.cmdline())]


def lives(process: psutil.Process) -> bool:
    """A zombie does not: some hosts leave orphans unburied."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ended(process: subprocess.Popen, family: list[psutil.Process], folder: Path) -> str:
    """Wait until all are gone, in time; the command's output."""
    start = time.monotonic()
    process.wait(60)
    while any(map(lives, family)) and time.monotonic() - start < SECONDS_TO_END:
        time.sleep(0.05)
    took = time.monotonic() - start
    left = [child for child in family if lives(child)]
    for child in left:
        child.kill()
    log = (folder / "log").read_text()
    assert not left, log
    assert took < SECONDS_TO_END, log
    assert "Traceback" not in log
    return log


def test_sigterm_while_ranks_gather(tmp_path: Path) -> None:
    process = start_gathering(tmp_path)
    wait_for(gathered(tmp_path), process, tmp_path)
    family = family_of(process)
    assert len(ranks_of(process)) == 2
    process.terminate()
    log = ended(process, family, tmp_path)
    assert process.returncode == 130, log
    assert log.count("interrupted") == 1


def test_ctrl_c_while_ranks_start(tmp_path: Path) -> None:
    """A terminal sends it to the ranks as well, which are importing."""
    process = start_gathering(tmp_path)
    wait_for(lambda: len(ranks_of(process)) > 0, process, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    family = family_of(process)
    log = ended(process, family, tmp_path)
    assert process.returncode == 130, log
    assert log.count("interrupted") == 1


def test_a_rank_that_dies(tmp_path: Path) -> None:
    process = start_gathering(tmp_path)
    wait_for(gathered(tmp_path), process, tmp_path)
    family = family_of(process)
    ranks_of(process)[1].kill()
    log = ended(process, family, tmp_path)
    assert process.returncode == 1, log
    assert "was killed by SIGKILL; the others were ended" in log


def test_ranks_that_torchrun_started(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    options = ("generate", "x", "--ranks=2", f"--out={tmp_path / 'p.png'}", "--json")
    process = start(tmp_path, *torchrun, str(DRAWS_NOTHING), "meet", *options)
    process.wait(120)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    made = json.loads(line)
    assert made["ranks"] == 2
    assert made["pictures"][0]["step_s"] == 1  # threads, as torchrun has them
    assert gathered(tmp_path)()
