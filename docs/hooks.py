"""Puts graphs and models of the tests into pages, so that what a page shows is what a test pins.

In a page, a block

    ```snapshot
    tests/test_x.py::TestX::test_y
    ```

becomes the text that this test expects; with a second such line, the difference from the first to
the second. A block `source` becomes the source of what it names.
"""

import ast
import difflib
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

import piflux

BLOCK = re.compile(r"^( *)```(snapshot|source)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    config.copyright = f"piflux {piflux.__version__}"  # at the foot of each page
    return config


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    root = Path(config.config_file_path).parent

    def replace(match: re.Match[str]) -> str:
        indent, kind, names = match[1], match[2], match[3].split()
        if kind == "source":
            language, (text,) = "python", [_source(root, name) for name in names]
        elif len(names) == 1:
            language, text = "text", _snapshot(root, names[0])
        else:
            language, text = "diff", _difference(*(_snapshot(root, name) for name in names))
        lines = [f"```{language}", *text.splitlines(), "```"]
        return "\n".join(indent + line for line in lines)

    return BLOCK.sub(replace, markdown)


def _difference(before: str, after: str) -> str:
    """Both in full: what left, what came and what stayed, each line with its mark."""
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return "\n".join(line for line in lines if not line.startswith("?"))


def _snapshot(root: Path, name: str) -> str:
    """What the one `assertExpectedInline` of a test expects."""
    strings = [
        call.args[1].value
        for call in ast.walk(_node(root, name)[0])
        if isinstance(call, ast.Call)
        and getattr(call.func, "attr", None) == "assertExpectedInline"
        and isinstance(call.args[1], ast.Constant)
    ]
    if len(strings) != 1:
        raise PluginError(f"{name} has {len(strings)} calls of assertExpectedInline, not one")
    return strings[0]


def _source(root: Path, name: str) -> str:
    node, text = _node(root, name)
    return textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "")


def _node(root: Path, name: str) -> tuple[ast.AST, str]:
    """What `path::class::function` names, and its file's text."""
    path, *names = name.split("::")
    if not (root / path).is_file():
        raise PluginError(f"{name}: no such file")
    text = (root / path).read_text()
    node: ast.AST = ast.parse(text)
    for wanted in names:
        inside = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == wanted]
        if not inside:
            raise PluginError(f"{name}: there is no {wanted}")
        node = inside[0]
    return node, text
