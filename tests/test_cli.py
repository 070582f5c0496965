"""The command line: what it draws, what it says, how it ends."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import failing
import numpy as np
import psutil
import pytest
import torch
from models import quantized, small_demo, tiny_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from ranks import Pool, free_port, launched
from rich.console import Console
from safetensors.torch import save_file
from test_cost import CONFIG
from typer.testing import CliRunner

import piflux
from piflux.cost.clock import StepClock
from piflux.cost.cost import Choice, Rates
from piflux.demo import demo_file
from piflux.errors import CannotLoad, CannotSave, DoesNotFit, RankFailed
from piflux.launch import _raised, _watch, alone, launch
from piflux.pipelines import folders
from piflux.pipelines.arguments import Asked, arguments
from piflux.pipelines.folders import add_loras, as_kind
from piflux.ranks import links
from piflux.tools import cli, options
from piflux.tools import generate as work
from piflux.tools.doctor import Examined, Link, examine
from piflux.tools.generate import Made, Request, save, save_video, show
from piflux.tools.options import numbered

SMALL = ["--steps=3", "--size=64x64"]
SECONDS_TO_END = 120  # after a signal: a second on an idle machine, for ever where it is not heard
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


@pytest.mark.usefixtures("captured_once")
def test_one_rank_draws_a_picture_that_says_what_it_is(tmp_path):
    out = tmp_path / "apple.png"
    result = invoke("generate", "rose, flat style", "--ranks=1", *SMALL, "--seed=7", f"--out={out}")
    assert result.exit_code == 0, result.output
    assert "on 1 rank(s)" in result.output
    with Image.open(out) as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "rose, flat style"
        assert (image.text["seed"], image.text["policy"]) == ("7", "gather")
        assert image.text["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["apple.png"]


def drawn_by_few_blocks(request):
    """As `generate`, with three of the demo's ten blocks."""
    # Rates of a machine that tests are busy on are not to be remembered.
    measured = mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(request.out.parent)})
    with measured, mock.patch.object(folders, "demo_pipeline", small_demo):
        return work.generate(request)


@on_cpu
def test_two_ranks_draw_several_prompts(ranks, monkeypatch, tmp_path):
    """How ranks are launched is below."""

    def launch(job, count, request, outlives):
        assert job is work.generate and outlives
        first, second = ranks.launch(count, drawn_by_few_blocks, request)
        assert second is None
        return first

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("camera\n\nrose, 3d style\n")
    monkeypatch.setattr(cli, "launch", launch)
    options = ["--ranks=2", "--policy=auto", "--json", *SMALL, f"--out={tmp_path / 'x.png'}"]
    done = invoke("generate", f"--prompts={prompts}", *options)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["ranks"] == 2
    assert record["settings"]["policy"] in ("gather", "displaced", "rotate")
    assert f"policy 'auto' took '{record['settings']['policy']}' for 2 ranks" in record["reason"]
    assert "keys and values travel" in record["reason"]
    assert all(picture["total_s"] > picture["step_s"] > 0 for picture in record["pictures"])
    names = [Path(picture["path"]).name for picture in record["pictures"]]
    assert names == ["x-1.png", "x-2.png"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def drawn_until_killed(rank, group, port, request, dies):
    """As `generate`, on ranks of which one dies in the midst of its second picture."""
    started, gather = count(), links.Link.gather

    def counted(*args):
        if rank == dies and next(started) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(*args)

    with mock.patch.object(links.Link, "gather", counted):
        return launched(rank, group, 2, port, drawn_by_few_blocks, (request,))


@on_cpu
def test_pictures_outlive_a_rank(tmp_path):
    """Of two prompts on two ranks; what is left draws on, and has both saved."""
    out = tmp_path / "x.png"
    settings = {"policy": "gather", "inner": "eager"}
    request = Request("demo", ("camera", "rose"), out, settings, steps=2, size=(64, 64))
    with Pool(2, joined=False) as pool:
        made, died = pool.run(2, drawn_until_killed, free_port(), request, 1, timeout=120)
    assert died.died
    assert isinstance(made, Made), made
    assert made.ranks == 1
    assert [picture.prompt for picture in made.pictures] == ["camera", "rose"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["x-1.png", "x-2.png"]


@on_cpu
@pytest.mark.usefixtures("few_blocks")
def test_weights_go_to_8_bits_where_they_do_not_fit(tmp_path, monkeypatch):
    """If it is asked for, and no earlier."""
    pipe, _ = folders.load("demo", torch.device("cpu"))
    weights = sum(x.nbytes for x in pipe.transformer.parameters())
    turned = []

    def turn(model, kind, device, home):
        turned.append((kind, home))
        quantized(model)

    monkeypatch.setattr(folders, "quantize", turn)

    def drawn(limit, quantize):
        settings = {"policy": "rotate", "inner": "eager", "memory": limit / 2**30}
        settings |= {"shard_weights": "auto"}
        out = tmp_path / "x.png"
        request = Request("demo", ("x",), out, settings, steps=2, size=(64, 64), quantize=quantize)
        made = work.generate(request)
        with Image.open(out) as image:
            return made, image.text["quantize"]

    made, told = drawn(2 * weights, "auto")
    assert (made.quantize, told, turned) == ("none", "none", [])
    assert made.reason.startswith("memory: one rank alone fits, ")
    assert made.settings["shard_weights"] is False
    with pytest.raises(DoesNotFit, match=r"one rank alone takes .* in 8 bits"):
        drawn(0.9 * weights, "none")
    made, told = drawn(0.9 * weights, "auto")
    assert (made.quantize, told, turned) == ("int8", "int8", [("int8", None)])
    assert made.reason.startswith("quantize: took int8, since one rank alone takes ")


@pytest.mark.parametrize("option", ["--quantize=int8", "--lora=."])
def test_a_package_is_missed_before_a_model_is_read(option, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    result = invoke("generate", "x", option)
    assert result.exit_code == 1
    assert option.partition("=")[0] in result.output and "pip install 'piflux[" in result.output


@on_cpu
@pytest.mark.parametrize("asked", ["--offload", "--quantize=fp8", "--memory=auto"])
def test_what_takes_a_gpu(asked, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: True)
    result = invoke("generate", "x", asked)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert f"{asked.replace('=', ' ')}: there is no GPU here" in result.output


def test_the_bar_ends_at_the_steps_that_there_are(capsys):
    """From a picture it goes fewer than are asked for."""
    with work._progress(2, 4, shown=True) as advance:
        for _ in range(6):
            advance(SimpleNamespace(num_timesteps=3))
    assert "6/6" in capsys.readouterr().err


def test_steps_are_heard_of_as_a_pipeline_tells_them():
    steps = []
    clock = StepClock(False, steps.append)
    new = work._heard_by(clock, diffusers.FluxPipeline)["callback_on_step_end"]
    assert new("pipe", 0, 1.0, {"latents": 2}) == {"latents": 2}
    old = work._heard_by(clock, diffusers.PixArtSigmaPipeline)["callback"]
    old(0, 1.0, None)
    assert steps == ["pipe", None] and len(clock.step_ms()) == 1


def test_a_picture_is_shown(capsys):
    """As wide as the console has room, and as high as its sides have it."""
    for height, least, most in ((64, 30, 50), (32, 15, 25)):
        show(Image.new("RGB", (64, height), "red"), Console(width=90))
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines) > 70
        assert least < len(lines) < most


def test_a_terminal_without_a_size_shows_none(monkeypatch, capsys):
    """As some containers start theirs."""
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(isatty=lambda: True, fileno=lambda: 1))
    monkeypatch.setattr(os, "get_terminal_size", lambda fd=1: os.terminal_size((0, 0)))
    show(Image.new("RGB", (64, 64)), Console(width=90))
    assert "doesn't say how large it is" in capsys.readouterr().out


def test_numbers():
    assert numbered(Path("a/b.png"), 1) == (Path("a/b.png"),)
    assert numbered(Path("a/b.png"), 10)[::9] == (Path("a/b-01.png"), Path("a/b-10.png"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CannotSave, match=r"x.png can't be saved: No space left on device"):
        save(Image.new("RGB", (8, 8)), tmp_path / "x.png", {"prompt": "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_is_quoted():
    """Other processes of the program are left alone."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(3600,))
    other.start()
    said = r"^rank [01] failed: ValueError: on purpose \(failing.py:\d+, in fails\); under torch"
    with pytest.raises(RankFailed, match=said):
        launch(failing.fails, 2)
    assert other.is_alive()
    other.kill()
    other.join()


def test_a_rank_whose_model_refuses_its_inputs_is_quoted():
    """By what Dynamo explains, and the line of the model."""

    def model(x):
        return x.view(41, -1)

    with pytest.raises(Exception, match="making fake tensor call") as error:
        torch.compile(model, backend="eager")(torch.ones(8))
    said = _raised(1, error.value)
    assert "shape '[41, -1]' is invalid for input of size 8" in said
    assert "(test_cli.py:" in said and ", in model)" in said and "\n" not in said


def test_a_rank_that_says_what_to_do_is_quoted_alone():
    with pytest.raises(RankFailed, match=r"^the folder is full: empty it$"):
        launch(failing.says, 1)


def test_what_one_rank_meets_is_told_alike(monkeypatch, tmp_path):
    """In the command, too; under torchrun with its whole traceback."""
    monkeypatch.setattr(work, "generate", lambda _: failing.fails())
    result = invoke("generate", "a cat", "--ranks=1", f"--out={tmp_path / 'p.png'}")
    assert result.exit_code == 1
    assert "Error: rank 0 failed: ValueError: on purpose (failing.py:" in words(result)
    with pytest.raises(CannotSave, match="empty it"):
        alone(failing.says)
    monkeypatch.setattr("piflux.launch.is_joined", lambda: True)
    with pytest.raises(ValueError, match="on purpose"):
        alone(failing.fails)


def test_ranks_outlive_the_first():
    """Which is why none of them holds the store."""
    assert launch(failing.loses_the_first, 2, outlives=True) == ["rank 1 of 1"]
    with pytest.raises(RankFailed, match=r"^rank 0 was killed by SIGKILL"):
        launch(failing.loses_the_first, 2)


def test_one_rank_is_interrupted(monkeypatch, tmp_path):
    """By SIGTERM, which raises where Python is."""
    monkeypatch.setattr(work, "generate", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    result = invoke("generate", "a cat", "--ranks=1", f"--out={tmp_path / 'p.png'}")
    assert result.exit_code == 130
    assert "interrupted" in result.output
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give either a prompt, or a file of them"),
        (["x", f"--prompts={__file__}"], "give either a prompt, or a file of them"),
        (["--prompts=./no/file"], "--prompts no/file: can't be read: No such file"),
        (["--prompts=/dev/null"], "no prompt in it"),
        ([" "], "the prompt is empty"),
        (["x", f"--seed={2**64}"], "--seed"),
        (["x", f"--seed={2**64 - 2}", "--count=3"], "the last of 3 seeds is beyond 64 bits"),
        (["x", "--guidance=nan"], "nan is not a finite number"),
        (["x", "--sync-steps=0,3", "--steps=3"], "an image has 3 steps, 0 to 2"),
        (["x", "--sync-steps=29"], "an image has 28 steps, 0 to 27"),
        (["x", "--lora=./none:0.5"], "no such file or folder: ./none"),
        (["x", f"--lora={__file__}:nan"], "the scale is not a finite number"),
        (["x", f"--mask={__file__}"], "--mask says where --image is painted anew"),
        (["x", f"--image={__file__}"], f"--image {__file__} can't be read as a picture"),
        (["x", "--image=small.png"], "--image small.png: is 20x9, and the smallest picture is"),
        (["x", "--image=cut.png"], "--image cut.png can't be read as a picture"),
        (["x", "--order=0", "--compression=int8"], "--order=0 remembers one"),
        (["x", "--compute=29"], "--compute 29: an image has 28 steps"),
        (["x", "--compute=xx.", "--steps=4"], "--compute xx.: an image has 4 steps"),
        (["x", "--compute=1"], "--compute=1: at least 2 steps"),
        (["x", "--quantize=auto"], "say with --memory into what"),
        (["x", "--memory=much"], "--memory much: write 'auto', or a number of GiB"),
        (["x", "--memory=-1"], "--memory -1: write 'auto', or a number of GiB"),
        (["x", "--size=320000x320000"], "GiB at least, and"),
        (["x", "--model=./no/such/folder"], "no such folder"),
        (["x", "--model=tests"], "no model_index.json"),
        (["x", "--size=100x64"], "--size must be a multiple of 16 from 16 on, got 100"),
        (["x", "--size=64x0"], "multiple of 16 from 16 on, got 0"),
        (["x", "--size=big"], "write width x height"),
        (["x", "--ranks=0"], "--ranks"),
        (["x", "--policy=warp"], "'displaced', 'auto', or a .json file of settings"),
        (["x", "--policy=no.json"], "--policy no.json: not a file of settings: No such file"),
        (["x", "--sync-steps=-1"], "--sync-steps must be an integer >= 0, or several"),
        (["x", "--sync-steps=0,two"], "got (0, 'two')"),
        (["x", "--steps=0"], "--steps"),
        (["x", "--inner=magic"], "--inner"),
        (["x", "--out=./no/folder/x.png"], "there is no folder"),
        (["x", "--out=/proc/x.png"], "/proc can't be written to"),
        (
            ["x", "--ranks=40", "--size=64x64"],
            "its prompt have 40 tokens, too few for so many ranks",
        ),
        (["x", "--lora="], "--lora '': write PATH, or PATH:scale"),
        (["x", "--model="], "--model '': no such folder"),
        (["x", "--quantize=int9"], "'--quantize': 'int9' is not one of"),
        (["x", "--compute=yes"], "--compute='yes': choose 'all'"),
        (["x", "--policy=few.json"], "--policy few.json: compute=xx.x: an image has 28 steps"),
        (["x", "--sync-steps=,"], "or several of them, got ','"),
        (["x", "--out=x.jpg"], "written as .png, videos as .mp4"),
        (["x", "--out=folder.png"], "--out folder.png: is a folder"),
    ],
)
def test_wrong_usage(arguments, said, tmp_path, monkeypatch):
    """Told in one line, and by one rank."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "few.json").write_text('{"policy": "rotate", "compute": "xx.x", "sync_steps": 40}')
    Image.new("RGB", (20, 9)).save("small.png")
    Image.new("RGB", (64, 64)).save("cut.png")
    os.truncate("cut.png", 60)
    result = invoke("generate", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ")


def test_wrong_usage_is_told_by_one_rank():
    told = [invoke("generate", " ", RANK=rank, WORLD_SIZE="2") for rank in ("0", "1")]
    assert [result.exit_code for result in told] == [2, 2]
    assert "the prompt is empty" in told[0].output and told[1].output == ""


WITHOUT_TORCH = """
import sys
from piflux.tools.cli import app

for arguments in [
    ["--help"],
    ["--version"],
    *([command, "--help"] for command in ("generate", "explain", "doctor", "bench", "quality")),
    ["generate", " "],
    ["generate", "x", "--seed=-1"],
    ["generate", "x", "--model=none"],
    ["generate", "x", "--size=100x100"],
    ["explain", "--policy=warp"],
    ["explain", "--ranks=999"],
    ["bench", "--row=none"],
    ["quality", "--variant=none"],
]:
    try:
        app(arguments)
    except SystemExit as end:
        assert end.code == (0 if arguments[-1] in ("--help", "--version") else 2), arguments
    assert "torch" not in sys.modules, arguments
"""


def test_arguments_are_checked_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"piflux {piflux.__version__}" in done.stdout
    assert len(done.stderr.splitlines()) == 8


@pytest.mark.parametrize("configs", [False, True])
def test_a_hub_id_is_fetched_or_told(monkeypatch, configs):
    def fails(*args, **kwargs):
        raise OSError("no route to the Hub\nand more")

    def fetches(*args, **kwargs):
        return str(demo_file("model"))

    where = (
        "huggingface_hub.snapshot_download" if configs else "diffusers.DiffusionPipeline.download"
    )
    command = ["explain"] if configs else ["generate", "x", "--ranks=1"]
    monkeypatch.setattr("huggingface_hub.model_info", fails)
    result = invoke(*command, "--model=some/model")
    assert result.exit_code == 2
    assert "as a Hub id it can't be fetched: no route to the Hub. Fetch it where" in result.output
    monkeypatch.setattr("huggingface_hub.model_info", fetches)
    monkeypatch.setattr(where, fetches)
    assert options.folder_of("some/model", configs=configs) == demo_file("model")


# -------------------------------------------------------------------------- any pipeline's options


def asked(**others):
    return Request("a folder", ("x",), None, {}, **others).asked()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.new("RGB", (100, 70), "red").save(path)
    return path


def test_options_become_arguments_of_the_pipeline(photo):
    """Of pipelines that take pictures themselves, and of such whose sisters do."""
    kind, given = arguments(diffusers.FluxPipeline, asked(steps=4, size=(64, 32), guidance=2.0))
    assert kind is diffusers.FluxPipeline
    assert given == {"num_inference_steps": 4, "width": 64, "height": 32, "guidance_scale": 2.0}
    kind, given = arguments(diffusers.FluxPipeline, asked(image=photo))
    assert kind is diffusers.FluxImg2ImgPipeline
    assert (given["image"].size, given["width"], given["height"]) == ((100, 70), 96, 64)
    kind, given = arguments(diffusers.FluxPipeline, asked(image=photo, mask=photo))
    assert kind is diffusers.FluxInpaintPipeline
    assert {"image", "mask_image"} <= given.keys()
    # Of those that no mapping of diffusers has, by their names and parts.
    for name in ("Flux2Klein", "Chroma"):
        own = getattr(diffusers, f"{name}Pipeline")
        kind, given = arguments(own, asked(image=photo, mask=photo))
        assert kind is getattr(diffusers, f"{name}InpaintPipeline") and "mask_image" in given
    # What is drawn is as large as the pipeline makes it of the reference.
    kind, given = arguments(diffusers.FluxKontextPipeline, asked(image=photo))
    assert kind is diffusers.FluxKontextPipeline and "width" not in given
    kind, given = arguments(diffusers.FluxControlPipeline, asked(image=photo))
    assert kind is diffusers.FluxControlPipeline and "control_image" in given


def test_several_pictures_are_for_pipelines_that_make_one_of_them():
    """Others take a list of pictures for a batch."""
    pictures = tuple(Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    for kind in (
        diffusers.Flux2Pipeline,
        diffusers.Flux2KleinPipeline,
        diffusers.QwenImageEditPlusPipeline,
    ):
        assert arguments(kind, Asked(images=pictures))[1]["image"] == list(pictures)
        assert arguments(kind, Asked(images=pictures[:1]))[1]["image"] is pictures[0]
    for kind in (diffusers.FluxPipeline, diffusers.FluxKontextPipeline):
        with pytest.raises(CannotLoad, match="takes one picture, not 2"):
            arguments(kind, Asked(images=pictures))


def test_a_sister_has_the_same_parts_in_their_dtype():
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    sister = as_kind(pipe, diffusers.FluxImg2ImgPipeline)
    assert type(sister) is diffusers.FluxImg2ImgPipeline
    assert sister.transformer is pipe.transformer and pipe.transformer.dtype == torch.bfloat16
    assert as_kind(pipe, type(pipe)) is pipe


def test_guidance_is_the_one_that_has_an_effect():
    _, given = arguments(diffusers.FluxPipeline, asked(negative="blue"))
    assert given == {"num_inference_steps": 28, "true_cfg_scale": 3.5}
    _, given = arguments(diffusers.QwenImagePipeline, asked(guidance=5.0, negative="blue"))
    assert given == {"num_inference_steps": 50, "true_cfg_scale": 5.0}
    _, given = arguments(diffusers.WanPipeline, asked(guidance=5.0, frames=9, negative="blue"))
    assert given == {"num_inference_steps": 50, "num_frames": 9, "guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("FluxPipeline", {"frames": 9}, "FluxPipeline takes no 'num_frames': leave --frames out"),
        ("PixArtSigmaPipeline", {"image": None}, "takes no image, and diffusers has no pipeline"),
        ("FluxKontextPipeline", {"image": "missing.png"}, "can't be read as a picture"),
    ],
)
def test_what_a_pipeline_does_not_take_is_told(photo, kind, options, said):
    if "image" in options:
        options = {"image": Path(options["image"] or photo)}
    with pytest.raises(CannotLoad, match=said):
        arguments(getattr(diffusers, kind), asked(**options))


def test_videos_and_pictures_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr(work.importlib.util, "find_spec", lambda name: None)
    assert work._destination(diffusers.FluxPipeline, None) == Path("piflux.png")
    with pytest.raises(CannotSave, match=r"FluxPipeline makes pictures; name a file .* in .png"):
        work._destination(diffusers.FluxPipeline, Path("a.mp4"))
    with pytest.raises(CannotSave, match=r"WanPipeline makes videos; name a file .* in .mp4"):
        work._destination(diffusers.WanPipeline, Path("a.png"))
    with pytest.raises(CannotSave, match="takes the package imageio-ffmpeg"):
        work._destination(diffusers.WanPipeline, None)


@pytest.mark.parametrize("kind", ["array", "pictures"])
def test_a_video_is_saved(tmp_path, kind):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="comes with the extra 'demo'")
    frames = np.zeros((5, 48, 32, 3), dtype=np.float32)
    frames[..., 0] = np.linspace(0, 1, 5)[:, None, None]
    if kind == "pictures":
        frames = [Image.fromarray((255 * frame).astype(np.uint8)) for frame in frames]
    save_video(frames, tmp_path / "v.mp4", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    about, *read = ffmpeg.read_frames(str(tmp_path / "v.mp4"))
    assert (about["size"], about["fps"], len(read)) == ((32, 48), 8.0, 5)
    red = [np.frombuffer(frame, np.uint8).reshape(48, 32, 3)[..., 0].mean() for frame in read]
    assert red == pytest.approx([0, 64, 128, 191, 255], abs=12)


def test_half_a_video_is_not_saved(tmp_path, capfd):
    """As on a full disk, where ffmpeg leaves what it has written, and nobody says so."""
    pytest.importorskip("imageio_ffmpeg", reason="comes with the extra 'demo'")
    frames = np.random.default_rng(0).random((12, 128, 128, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
        with pytest.raises(CannotSave, match=r"v.mp4 can't be saved: .*is the disk full\?$"):
            save_video(frames, tmp_path / "v.mp4", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_loras_are_added_with_their_scales(tmp_path, recwarn):
    pipe = tiny_pipeline()
    for name in ("one", "two"):
        made = tiny_pipeline()
        made.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        layers = get_peft_model_state_dict(made.transformer)
        made.save_lora_weights(tmp_path / name, transformer_lora_layers=layers)
    (file,) = (tmp_path / "one").iterdir()
    add_loras(pipe, options.loras([f"{file}:0.5", str(tmp_path / "two")]))
    assert set(pipe.get_active_adapters()) == {"lora_0", "lora_1"}
    assert not [x for x in recwarn if "peft_config" in str(x.message)]
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["lora_0"] == 0.5 * layer.scaling["lora_1"]


@pytest.mark.parametrize(
    "layer, said",
    [
        (None, "can't be loaded into FluxPipeline: "),
        ("unet.up", "its weights are of parts that this pipeline doesn't have"),
        ("transformer.nowhere", "NoMatchingPeftModuleError: Target modules {'nowhere'}"),
    ],
)
def test_loras_of_other_models_are_refused(layer, said, tmp_path, caplog):
    file = tmp_path / "bad.safetensors"
    if layer is None:
        file.write_text("no weights")
    else:
        save_file({f"{layer}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, file)
    with pytest.raises(CannotLoad, match=r"the LoRA .*bad\.safetensors") as raised:
        add_loras(tiny_pipeline(), ((str(file), 1.0),))
    assert said in str(raised.value)
    assert "unsuccessful" not in caplog.text  # told once


@pytest.mark.usefixtures("few_blocks")
def test_several_pictures_at_once(tmp_path):
    """The second is the one that its seed gives alone."""
    small = ["rose, flat style", "--ranks=1", "--steps=2", "--size=64x64", "--json"]
    both = invoke("generate", *small, "--count=2", "--batch=2", f"--out={tmp_path / 'a.png'}")
    assert both.exit_code == 0, both.output
    record = json.loads(both.stdout)
    assert [(x["seed"], x["batch"]) for x in record["pictures"]] == [(0, 2), (1, 2)]
    alone = invoke("generate", *small, "--seed=1", f"--out={tmp_path / 'b.png'}")
    assert alone.exit_code == 0, alone.output
    second, one = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("a-2.png", "b.png")
    )
    assert abs(second - one).max() <= 1


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
    at = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    result = invoke("generate", "x", "--ranks=3", RANK="0", WORLD_SIZE="2", **at)
    assert result.exit_code == 2
    assert "torchrun started 2" in words(result)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "1"}, "MASTER_ADDR is not set, but RANK and WORLD_SIZE are"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number from 1 on, got 'two'"),
    ],
)
def test_an_environment_that_is_no_ranks(environment, said):
    result = invoke("generate", "x", RANK="0", MASTER_ADDR=None, **environment)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert said in result.output


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = invoke("generate", "x", "--ranks=2")
    assert result.exit_code == 2
    assert "there are 1 GPUs here" in words(result)


# ------------------------------------------------------------------------------ explain and doctor


@pytest.fixture
def small(monkeypatch):
    """Three blocks in place of the demo's ten."""
    monkeypatch.setattr(options, "flux_config", lambda model: CONFIG)


@pytest.mark.usefixtures("small")
def test_explain_as_data():
    rates = ("--link=2", "--linear-tflops=1", "--attention-tflops=0.5")
    result = invoke("explain", "--ranks=4", "--size=64x64", "--policy=displaced", "--json", *rates)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    report = record["report"]
    assert (report["schedule"]["policy"], report["schedule"]["world_size"]) == ("displaced", 4)
    assert report["attentions"] == 3
    kinds = [f"--policy {policy}" for policy in ("gather", "rotate --order 0", "rotate")]
    least, less, most = (record["memory_bytes"][kind] for kind in kinds)
    assert report["weight_bytes"] < least < less < most
    assert report["sync_bytes"] == report["steady_bytes"] > 0
    shards = [b for b in report["boundaries"] if b["verb"] == "shard"]
    assert [16] in [b["lengths"] for b in shards] and [4] in [b["part_lengths"] for b in shards]
    assert record["rates"] == {
        "linear_tflops": 1.0,
        "attention_tflops": 0.5,
        "link_gbs": 2.0,
        "latency_s": 0.0,
    }
    waited = record["predicted"]["sync_s"] - record["predicted"]["steady_s"]
    assert 0 < waited <= report["sync_bytes"] / 2e9
    assert record["choice"]["policy"] in ("gather", "displaced", "rotate")


def test_explain_as_text():
    result = invoke("explain", "--size=64x64", "--memory=0.078")
    assert result.exit_code == 0, result.output
    assert "--policy gather 0.07723 GiB, fits in 0.078" in words(result)
    assert "--policy displaced 0.08057 GiB, does not fit in 0.078" in words(result)
    assert "rotate on 2 ranks, sync at 0, 2, predicted between" in result.output
    assert "attentions rewritten   10" in result.output
    assert "shard %hidden_states dim 1: 16 -> 8 tokens" in words(result)
    assert "predicted: " not in result.output  # no link, no time


@pytest.mark.usefixtures("small")
def test_explain_of_a_schedule_in_a_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"policy": "displaced", "sync_steps": [0, 2], "order": 0}))
    result = invoke("explain", "--size=64x64", f"--policy={path}")
    assert "displaced on 2 ranks, sync at 0, 2\n" in result.output


def test_explain_of_too_few_tokens():
    result = invoke("explain", "--ranks=280")
    assert result.exit_code == 2
    assert "its prompt have 280 tokens, too few for so many ranks" in words(result)


def test_explain_of_more_ranks_than_a_prompt_has_tokens():
    """As it is drawn."""
    result = invoke("explain", "--ranks=25", "--size=64x64")
    assert "shard %encoder_hidden_states dim 1: 24 -> 1 (1 twice) tokens" in words(result)


def test_what_the_compiler_refuses(monkeypatch):
    """In its own words, without a traceback or what Dynamo adds."""
    monkeypatch.setattr(options, "check_tokens", lambda *_: None)
    result = invoke("explain", "--ranks=400")
    assert result.exit_code == 1
    assert "Error: " in result.output and "node: %" in result.output
    assert "Traceback" not in result.output and "TORCHDYNAMO" not in result.output


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("link", "policy"), [("1000", "gather"), ("1e-6", "rotate")])
def test_explain_of_the_policy_that_auto_takes(link, policy):
    rates = ("--linear-tflops=1e-3", "--attention-tflops=1e-3", f"--link={link}")
    result = invoke("explain", "--policy=auto", "--size=64x64", "--sync=recompute", *rates)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{policy} on 2 ranks, ")
    assert f"--policy auto: {policy}; keys and values travel" in result.output
    assert (", recomputed" in result.output) == (policy == "rotate")


def test_explain_of_auto_wants_a_link():
    result = invoke("explain", "--policy=auto")
    assert result.exit_code == 2
    assert "with --link the GB/s" in result.output


def test_only_flux_is_known_without_a_call(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    result = invoke("explain", f"--model={tmp_path}")
    assert result.exit_code == 2
    assert "config.json is not the config of a transformer" in words(result)
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    result = invoke("explain", f"--model={tmp_path}")
    assert result.exit_code == 2
    assert "its transformer is a SD3Transformer2DModel, and only FLUX.1's" in words(result)


FOUND = Examined(
    (Link((0, 1), None, 1.5),),
    Rates(0.1, 0.2, 1.25),
    Choice("displaced", "because", 0.01, 0.03),
)


@on_cpu
def test_doctor(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "launch", lambda *arguments: asked.append(arguments) or FOUND)
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["links"] == [{"ranks": [0, 1], "peer_access": None, "gbs": 1.5}]
    assert record["versions"]["torch"] == torch.__version__
    assert record["choice"]["policy"] == "displaced"
    assert record["devices"] == [] and record["cores"] >= 1 and record["memory_gib"] > 0.1
    assert asked[0][:2] == (examine, 2) and asked[0][-1] is None
    result = invoke("doctor")
    assert asked[1][-1] is cli._tell_link
    assert "all-gather of all 1.25 GB/s a rank" in words(result)
    assert "on 2 ranks, --policy auto is displaced: because." in words(result)
    assert "nothing to share" in invoke("doctor", "--ranks=1").output


def test_a_link_is_printed_at_once(capsys):
    with mock.patch("sys.stdout.flush") as flushed:
        cli._tell_link(Link((0, 1), True, 1.5))
    assert flushed.called
    assert capsys.readouterr().out.split() == ["link", "0-1", "1.5", "GB/s,", "peer", "access"]


@on_cpu
def test_doctor_measures_no_more_ranks_than_cores():
    result = invoke("doctor", f"--ranks={options.cores() + 98}")
    assert result.exit_code == 2
    assert f"there are {options.cores()} CPU cores here" in result.output


def test_ranks_examine_alike(ranks):
    """Links, kernels and choice, measured by two real ranks: one answer for both."""
    (one, told), (other, untold) = ranks.alone(2, examine_small)
    assert one == other
    assert told == list(one.links) and untold == []  # told as they come, by one rank
    (link,) = one.links
    assert link.ranks == (0, 1) and link.peer_access is None and 0 < link.gbs < 1000
    assert one.choice.reason.startswith("keys and values travel")


def examine_small(rank, group):
    size = {"width": 64, "height": 64, "text_tokens": 6, "dtype": torch.float32}
    told = []
    with mock.patch.dict(os.environ, RANK=str(rank)):
        return examine(CONFIG, size, told.append), told


def test_without_its_packages_the_command_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; from piflux.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'piflux[cli]'")


# --------------------------------------------------------- several ranks, in processes of their own

DRAWS_NOTHING = Path(__file__).parent / "command.py"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Python in a session of its own, as from a terminal, its output in `folder`/log."""
    log = (folder / "log").open("w")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    del environment["OMP_NUM_THREADS"]  # which torchrun sets, or the command
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
    until = time.monotonic() + SECONDS_TO_END
    process.wait(SECONDS_TO_END)
    while any(map(lives, family)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [child for child in family if lives(child)]
    for child in left:
        child.kill()
    log = (folder / "log").read_text()
    assert not left, log
    assert "Traceback" not in log and "leaked" not in log
    return log


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_interrupted_while_ranks_gather(tmp_path: Path, how: str) -> None:
    process = start_gathering(tmp_path)
    wait_for(gathered(tmp_path), process, tmp_path)
    family = family_of(process)
    assert len(ranks_of(process)) == 2
    if how == "SIGTERM":
        process.terminate()
    else:  # a terminal sends it to the ranks as well
        os.killpg(process.pid, signal.SIGINT)
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


WHILE_IMPORTING = """
import importlib.abc, signal, sys
signal.signal(signal.SIGINT, {handler})  # a shell's background job, as tests may be, ignores it

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            signal.raise_signal({signal!r})

sys.meta_path.insert(0, Finder())
sys.argv = ["piflux", "explain", *{arguments!r}]
from piflux.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["torch", "torch._C", "torch.distributed", "typer"])
def test_ctrl_c_while_the_command_is_imported(module):
    """Which takes seconds; in some of these places an exception would be swallowed."""
    code = WHILE_IMPORTING.format(
        module=module,
        signal=int(signal.SIGINT),
        handler="signal.default_int_handler",
        arguments=[],
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_that_ignores_interrupts_is_imported():
    """As a shell's background jobs do."""
    code = WHILE_IMPORTING.format(
        module="typer",
        signal=int(signal.SIGINT),
        handler="signal.SIG_IGN",
        arguments=["--help"],
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout


def test_a_benchmark_is_interrupted_while_ranks_start(tmp_path: Path) -> None:
    """A row's rank, which the command started, ends with it."""
    options = ("--row=eager", "--steps=9999", "--height=64", "--width=64", f"--out={tmp_path}")
    process = start(tmp_path, "-m", "piflux", "bench", *options)
    wait_for(lambda: len(ranks_of(process)) > 0, process, tmp_path)
    family = family_of(process)
    process.terminate()
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


def test_the_rank_that_died_is_told_of_and_not_one_that_raised_for_it() -> None:
    """Both are found at once, in the order of ranks."""
    pipes = [os.pipe() for _ in range(2)]

    def ended(failure: str, *, by_itself: bool) -> SimpleNamespace:
        rank = SimpleNamespace(runs=True, failure=failure, ended_by_itself=by_itself, result=None)
        reading, writing = pipes.pop()
        os.close(writing)  # as a process does that ends
        rank.process = SimpleNamespace(sentinel=reading)
        rank.look = lambda: setattr(rank, "runs", False) is None
        return rank

    both = [ended("connection reset", by_itself=True), ended("was killed", by_itself=False)]
    with pytest.raises(RankFailed, match="was killed"):
        _watch(both, SimpleNamespace(came=False), outlives=False)
    for rank in both:
        os.close(rank.process.sentinel)


def test_ranks_that_torchrun_started(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    options = ("generate", "x", "--ranks=2", f"--out={tmp_path / 'p.png'}", "--json")
    process = start(tmp_path, *torchrun, str(DRAWS_NOTHING), "meet", *options)
    process.wait(SECONDS_TO_END)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    made = json.loads(line)
    assert made["ranks"] == 2
    assert made["pictures"][0]["step_s"] == 1  # threads, as torchrun has them
    assert gathered(tmp_path)()
