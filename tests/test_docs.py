"""The documentation says what is so: its Python blocks run, its commands and links exist.

Blocks are run as a reader with one CPU could run them. What stands in for what is in `reader`.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import metadata
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import griffe
import openai
import pytest
import torch
import typer
from diffusers import FluxPipeline
from fake_engine import FakeEngine
from markdown_it import MarkdownIt
from servers import served
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.run import get_args_parser
from typer.core import TyperGroup
from typer.testing import CliRunner

import piflux
from piflux import demo
from piflux.compile import compiler
from piflux.demo import TEXT_TOKENS, demo_pipeline
from piflux.serving import build_app
from piflux.tools import cli

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "piflux" / "passes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


class Block(NamedTuple):
    """A fenced block; `printed` is the text block that follows a Python block at once."""

    path: Path
    line: int
    language: str
    text: str
    printed: str | None


def blocks(language: str) -> list[Any]:
    """Of all pages, as parameters of a test; what several pages show is there once."""
    found = [b for path in PAGES for b in _blocks(path) if b.language == language]
    unique = {(block.text, block.printed): block for block in reversed(found)}
    return [
        pytest.param(block, id=f"{block.path.relative_to(ROOT)}:{block.line}")
        for block in reversed(unique.values())
    ]


def _blocks(path: Path) -> Iterator[Block]:
    tokens = MarkdownIt().parse(path.read_text())
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "fence":
            assert token.map is not None
            follows = after is not None and after.type == "fence" and after.info == "text"
            printed = after.content if follows else None
            yield Block(path, token.map[0] + 2, token.info, token.content, printed)


# ------------------------------------------------------------------------------------------ Python


class Small(FluxPipeline):
    """In place of FLUX.1-dev on a GPU: the demo's model on the CPU, two steps, small pictures."""

    def to(self, device: Any) -> Small:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        few = {"num_inference_steps": 2, "height": 64, "width": 64}
        return super().__call__(*args, **kwargs | few | {"max_sequence_length": TEXT_TOKENS})


@pytest.fixture(scope="module")
def small() -> Small:
    return Small(**demo_pipeline().components)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Of `piflux serve`, in place of the reader's own."""
    with served(build_app(FakeEngine())) as url:
        yield f"{url}/v1"


@pytest.fixture
def reader(small: Small, server: str, monkeypatch: Any, tmp_path: Path) -> dict[str, Any]:
    """The names that a block may use: on one rank, in an empty folder, without a C++ compiler."""

    def pipeline(*args: Any, **kwargs: Any) -> Small:
        pipe = Small(**small.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def without_inductor(inner: Any) -> Any:
        return lookup_backend("eager" if inner == "inductor" else inner)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", pipeline)
    monkeypatch.setattr(demo, "demo_pipeline", pipeline)
    monkeypatch.setattr(compiler, "lookup_backend", without_inductor)
    monkeypatch.chdir(tmp_path)
    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **given: real(**given | {"base_url": server}))
    pipe = pipeline()
    return {"piflux": piflux, "torch": torch, "pipe": pipe, "transformer": pipe.transformer}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block: Block, reader: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, block.path, "exec")
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code, reader)
    if block.printed is not None:
        assert printed.getvalue() == block.printed


# ---------------------------------------------------------------------------------------- commands


WRONG_USAGE: Any = typer.BadParameter.__base__
"""Raised where there is no such command or option: click's class, or Typer's own of that name."""


def parse_piflux(words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    with group.make_context("piflux", list(words)) as ctx:
        name, command, rest = group.resolve_command(ctx, words)
        assert command is not None
        command.make_context(name, rest, parent=ctx)


def parse_torchrun(words: list[str]) -> None:
    given = get_args_parser().parse_args(words)
    if given.module:
        assert given.training_script == "piflux"
        parse_piflux(given.training_script_args)
    elif given.training_script == "examples/run_flux.py":
        spec = importlib.util.spec_from_file_location("run_flux", ROOT / given.training_script)
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        app = typer.Typer(add_completion=False)
        app.command()(script.main)
        typer.main.get_command(app).make_context("run_flux", given.training_script_args)


def parse_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def parse_pip(words: list[str]) -> None:
    """`pip install '.[extra]'`: the extras are there."""
    verb, *wanted = words
    assert verb == "install"
    known = metadata("piflux").get_all("Provides-Extra")
    for extras in re.findall(r"\[(.*?)\]", " ".join(wanted)):
        assert set(extras.split(",")) <= set(known or ())


def parse_python(words: list[str]) -> None:
    """`python file` and `python -m pytest file`: the file is there."""
    file = words[2] if words[:2] == ["-m", "pytest"] else words[0]
    assert (ROOT / file).is_file()


PROGRAMS = {
    "piflux": parse_piflux,
    "torchrun": parse_torchrun,
    "make": parse_make,
    "pip": parse_pip,
    "python": parse_python,
}


def is_explained(block: Block) -> bool:
    """Whether it shows what `piflux explain` prints, of the model that is here."""
    first, *shown = block.text.splitlines()
    return first.startswith("$ piflux explain") and "--model" not in first and bool(shown)


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_exist(block: Block) -> None:
    whole = block.text.replace("\\\n", " ")  # a command may go on in the next line
    lines = [line for line in whole.splitlines() if line.startswith("$ ")]
    assert lines
    for line in lines:
        program, *words = shlex.split(line[2:], comments=True)
        PROGRAMS[program.removeprefix(".venv/bin/")](words)


@pytest.mark.parametrize("block", [b for b in blocks("console") if is_explained(b.values[0])])
def test_explain_prints_what_is_shown(block: Block) -> None:
    command, shown = block.text.split("\n", 1)
    result = CliRunner().invoke(cli.app, shlex.split(command)[2:])
    assert result.output == shown


@pytest.mark.parametrize(
    "command, error",
    [
        ("piflux draw", WRONG_USAGE),
        ("piflux bench --rank 2", WRONG_USAGE),
        ("piflux bench --ranks 1", WRONG_USAGE),
        ("torchrun --np=2 script.py", SystemExit),
        ("torchrun examples/run_flux.py --weights=none", WRONG_USAGE),
        ("torchrun -m piflux draw", WRONG_USAGE),
        ("make everything", AssertionError),
        ("pip install '.[everything]'", AssertionError),
        ("python tests/test_everything.py", AssertionError),
    ],
)
def test_what_does_not_exist_is_noticed(command: str, error: type[BaseException]) -> None:
    program, *words = shlex.split(command)
    with pytest.raises(error):
        PROGRAMS[program](words)


# --------------------------------------------------------------------------------- Python interface


def test_signatures_show_values() -> None:
    """As mkdocstrings reads them: of `parallelize`, and of a dataclass, by its attributes."""
    extensions = griffe.load_extensions(ROOT / "docs" / "constants.py")
    package = griffe.load("piflux", search_paths=[ROOT], extensions=extensions)
    parameters = package["api.parallelize"].parameters
    assert str(parameters["policy"].annotation).startswith("Literal['gather', 'rotate'")
    assert "Literal['gather', 'recompute'" in str(parameters["sync"].annotation)
    assert str(parameters["memory"].annotation) == "float | Literal['auto'] | None"
    assert str(parameters["shard_weights"].annotation) == "bool | Literal['auto']"
    assert str(parameters["target"].annotation) == "Target"  # a type variable stays
    assert str(package["serving.app.build_app"].parameters["drain_s"].default) == "30.0"
    assert str(package["tools.bench.ways.Way.models"].value).startswith("('flux.1', ")


# ------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("path", [p for p in PAGES if "docs" not in p.parts], ids=lambda p: p.name)
def test_links_lead_to_files(path: Path) -> None:
    """Of what stands outside of docs/, where mkdocs looks after them."""
    inline = [t for token in MarkdownIt().parse(path.read_text()) for t in token.children or ()]
    for link in (str(t.attrs[key]) for t in inline for key in ("href", "src") if key in t.attrs):
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), link
            assert not heading or heading in slugs(page), link


def slugs(page: Path) -> set[str]:
    """By which links lead to a page's headings."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
