"""What `pip install` brings: the wheels, and what runs where little else is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.builders.wheel import WheelBuilder

import piflux

ROOT = Path(__file__).parent.parent
SPLITS = """
import torch
import torch.nn.functional as F
from torch import nn

import piflux
from piflux import *


class Block(nn.Module):
    def forward(self, x):
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


block, x = Block(), torch.randn(1, 5, 8)
model = parallelize(block, group=virtual_ranks(2), inner="eager")
torch.testing.assert_close(model(x), block(x))
compiled = torch.compile(block, backend="piflux", options={"inner": "eager"})
torch.testing.assert_close(compiled(x), block(x))
print(piflux.__file__)
print(explain(model))
"""

MISSES = """
import torch
from piflux.errors import PifluxError
from piflux.__main__ import main
from piflux.demo import demo_pipeline
from piflux.tools.quality.lpips import LPIPS

for load in (demo_pipeline, LPIPS):
    try:
        load()
    except PifluxError as error:
        print(error)
main()
"""


def build(project: Path, to: Path) -> Path:
    """The wheel of `project`, made without the network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(to)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel of Python alone, unpacked: all that installing it is."""
    folder = wheel.parent / "installed"
    ZipFile(wheel).extractall(folder)
    return folder


def metadata_of(wheel: Path) -> Message:
    with ZipFile(wheel) as files:
        (path,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(path).decode())


def needed_by(*distributions: str) -> set[str]:
    """These and all that they need, by the names of distributions, without extras."""
    found: set[str] = set()
    wanted = list(distributions)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not on this platform
        found.add(name)
        without_extras = (r for r in requirements if "extra ==" not in r)
        wanted += [re.match(r"[\w.-]+", r)[0] for r in without_extras]  # type: ignore[index]
    return found


def environment(folder: Path, *distributions: str) -> Path:
    """A folder with these distributions and what they need alone, linked to where they are."""
    folder.mkdir()
    for name in needed_by(*distributions):
        files = (file.parts[0] for file in metadata.files(name) or ())
        for top in {part for part in files if part not in ("..", "__pycache__")}:
            (folder / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """`program`, where nothing but what is in the folders of `path` can be imported."""
    command = [sys.executable, "-S", "-c", program]  # no site-packages
    variables = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.environ["PATH"]}
    # In a folder without the checkout, whose own files would else come first.
    return subprocess.run(
        command, cwd=path[0].parent, capture_output=True, text=True, env=variables
    )


def test_the_wheel_is_small_and_holds_code_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < 1e6
    with ZipFile(wheel) as files:
        outside = [n for n in files.namelist() if not n.startswith(("piflux/", "piflux-"))]
        suffixes = {Path(n).suffix for n in files.namelist() if n.startswith("piflux/")}
    assert not outside
    assert suffixes == {".py", ".md", ".typed", ".html", ".css", ".js"}  # the server's page


@pytest.mark.parametrize(
    "project, expression, works",
    [
        (ROOT, "Apache-2.0", ["Apache License"]),
        (
            ROOT / "packages" / "piflux-demo",
            "Apache-2.0 AND BSD-2-Clause AND BSD-3-Clause AND MIT AND Unicode-TOU",
            ["Apache License", "MIT License", "Soumith Chintala", "Richard Zhang", "Unicode, Inc."],
        ),
    ],
    ids=["piflux", "piflux-demo"],
)
def test_licences_are_told_and_shipped(project: Path, expression: str, works: list[str]) -> None:
    """Of the code, and of each work in the package of weights, which is slow to build."""
    about = WheelBuilder(str(project)).metadata.core
    assert about.license_expression == expression
    shipped = "".join((project / name).read_text() for name in about.license_files)
    for work in works:
        assert work in shipped


def test_weights_are_in_their_package() -> None:
    builder = WheelBuilder(str(ROOT / "packages" / "piflux-demo"))
    shipped = {file.distribution_path for file in builder.recurse_included_files()}
    assert {"piflux_demo/lpips.safetensors", "piflux_demo/model/model_index.json"} <= shipped
    assert sum(name.endswith(".safetensors") for name in shipped) == 7


def test_an_index_shows_nothing_that_is_not_there(wheel: Path) -> None:
    """README without pictures and pages that lie beside it in the repository alone."""
    text = metadata_of(wheel).get_payload()
    readme = (ROOT / "README.md").read_text()
    assert isinstance(text, str)
    assert "](docs/" in readme and "](https://" in readme
    assert re.findall(r"\]\((?!https://)", text) == []
    for line in ("# piflux", "Apache-2.0", "](https://"):
        assert line in text
    assert "one CPU rank, above" in readme and "one CPU rank, above" not in text  # of a picture
    assert text.count("```") == readme.count("```")


def test_versions_agree(wheel: Path) -> None:
    """Of the code, its package, and the package of weights that it asks for."""
    about = metadata_of(wheel)
    assert about["Version"] == piflux.__version__
    asked_for = {r for r in about.get_all("Requires-Dist") or () if r.startswith("piflux-demo")}
    version = WheelBuilder(str(ROOT / "packages" / "piflux-demo")).metadata.version
    assert {requirement.partition(";")[0] for requirement in asked_for} == {
        f"piflux-demo=={version}"
    }


def test_torch_is_all_it_takes_to_split_a_module(installed: Path, tmp_path: Path) -> None:
    done = run(SPLITS, installed, environment(tmp_path / "packages", "torch"))
    assert done.returncode == 0, done.stderr
    home, *report = done.stdout.splitlines()
    assert Path(home).is_relative_to(installed)
    assert report[0].startswith("graph 0: rotate on 2 ranks")


def test_what_is_missing_is_told_with_its_extra(installed: Path, tmp_path: Path) -> None:
    done = run(MISSES, installed, environment(tmp_path / "packages", "torch", "safetensors"))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "the demo needs the package 'transformers': pip install 'piflux[demo]'",
        "the demo needs the package 'piflux_demo': pip install 'piflux[demo]'",
    ]
    assert done.stderr.strip().endswith(
        "piflux's command line needs the package 'typer': pip install 'piflux[cli]'"
    )


def test_all_that_is_public_is_named() -> None:
    """In `__all__`, for type checkers, and in what modules are loaded from at the first use."""
    assert piflux.__all__ == sorted(name for names in piflux._HOMES.values() for name in names)
    for name in piflux.__all__:
        assert getattr(piflux, name).__module__.startswith("piflux.")
