"""The half of docs/support.md that has every class of diffusers, and the program that writes it."""

from importlib import metadata

import pytest
from classes import CLASSES
from support import PAGE, outcome, page, pipelines, second_half, transformers

SAMPLES = ["DiTTransformer2DModel", "SanaTransformer2DModel"]
"""One that is exact, one that is refused. Fragments take longer, and have tests of their own."""


def test_every_class_has_a_case_and_a_row():
    """Of the diffusers that the page was written with."""
    _, found = page()
    assert found.keys() == CLASSES.keys()
    if f"diffusers {metadata.version('diffusers')}" not in PAGE.read_text():
        pytest.skip("the page was written with another diffusers")
    assert found.keys() == transformers()
    rows = PAGE.read_text().split("## Every pipeline class")[1]
    assert [name for name in pipelines() if f"| `{name}` |" not in rows] == []


def test_no_class_is_wrong_or_fails_and_most_are_exact():
    _, found = page()
    statuses = [status for status, _ in found.values()]
    assert {*statuses} <= {"exact", "refused", "not tried"}
    assert statuses.count("exact") >= 58
    assert all(remark for status, remark in found.values() if status != "exact")


@pytest.mark.parametrize("name", SAMPLES)
def test_a_class_does_what_its_row_says(name):
    _, found = page()
    assert outcome(name) == found[name]


def test_what_is_written_is_read_back(monkeypatch, tmp_path):
    rows = {"A": ("exact", ""), "B": ("refused", "mixes a | b"), "C": ("exact", "in fragments")}
    monkeypatch.setattr("support.drawn", lambda: {"FluxPipeline": ["one row"]})
    monkeypatch.setattr("support.PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("# First\n\n" + second_half(rows))
    first, found = page()
    assert first == "# First\n\n"
    assert found == rows | {"B": ("refused", "mixes a / b")}
    assert "2 exact, 1 refused" in (tmp_path / "page.md").read_text()
    assert "drawn: 1 of the rows" in (tmp_path / "page.md").read_text()
