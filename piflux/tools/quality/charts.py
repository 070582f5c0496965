"""What `piflux quality` writes of numbers and pictures: a table, a contact sheet, two charts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piflux.tools.quality.drift import Drawn, Row, summary

CELL = 1.8
"""Inches that a picture of a contact sheet and its margins are wide."""

FONT, LETTERS = 7, 30
"""Points of a contact sheet's letters, and how many of them a cell is wide enough for."""


def markdown(rows: Sequence[Row]) -> str:
    """A line a row; the cost is a share of one rank's step: of a sync step, of others, mean."""
    lines = [
        "| ranks | variant | PSNR, dB: mean | median | worst | gained | SSIM | LPIPS "
        "| cost: sync | steady | mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, x in zip(rows, summary(rows), strict=True):
        error = "" if x["gain_db_error"] is None else f" ± {x['gain_db_error']:.2f}"
        gained = "" if x["gain_over"] == row.variant else f"{x['gain_db']:+.2f}{error}"
        sync, steady = row.cost.sync_s / row.cost.one_s, row.cost.steady_s / row.cost.one_s
        lines.append(
            f"| {row.ranks} | {row.variant} | {x['psnr']:.2f} | {x['median_psnr']:.2f} "
            f"| {x['worst_psnr']:.2f} | {gained} | {x['ssim']:.4f} | {x['lpips']:.4f} "
            f"| {sync:.3f} | {steady:.3f} | {x['cost']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def contact_sheet(
    pictures: Sequence[Sequence[Any]],
    below: Sequence[Sequence[str]],
    path: Path,
    titles: Sequence[str] = (),
) -> None:
    """Write a sheet of pictures in rows and columns.

    Args:
        pictures: by row and column, whatever matplotlib shows: PIL's, or (H, W, 3) arrays.
        below: likewise, what stands below each.
        path: a PNG.
        titles: what stands above each column.
    """
    plt = _pyplot()
    size = CELL * len(pictures[0]), 1.2 * CELL * len(pictures)
    figure, grid = plt.subplots(
        len(pictures), len(pictures[0]), figsize=size, dpi=150, layout="constrained", squeeze=False
    )
    for index, (row, texts) in enumerate(zip(pictures, below, strict=True)):
        for axes, picture, text in zip(grid[index], row, texts, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(_wrapped(text), fontsize=FONT)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(_wrapped(title), fontsize=FONT)
    figure.savefig(path)
    plt.close(figure)


def sheet_of(
    prompts: Sequence[str], one: Drawn, rows: Sequence[Row], drawn: Sequence[Drawn], path: Path
) -> None:
    """A row a prompt, a column a variant, the first one rank's; below each picture its PSNR."""
    # The space is one that no line ends at.
    titles = ["one rank", *(f"{row.variant}, {row.ranks}\N{NO-BREAK SPACE}ranks" for row in rows)]
    below = [
        [prompt, *(f"{row.psnr[index]:.1f} dB" for row in rows)]
        for index, prompt in enumerate(prompts)
    ]
    pictures = [
        [one_of.images[index].permute(1, 2, 0).numpy() for one_of in (one, *drawn)]
        for index in range(len(prompts))
    ]
    contact_sheet(pictures, below, path, titles)


def _wrapped(text: str) -> str:
    """`text` in lines that a cell is wide enough for; only words that are longer are broken."""
    return textwrap.fill(text, LETTERS)


def plot_drift(rows: Sequence[Row], path: Path) -> None:
    """The latents' relative distance over the steps, a panel for each number of ranks."""
    plt = _pyplot()
    counts, colours = sorted({row.ranks for row in rows}), _colours(rows)
    figure, panels = plt.subplots(
        1,
        len(counts),
        figsize=(1 + 5 * len(counts), 4.5),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, n in zip(panels[0], counts, strict=True):
        for row in rows:
            if row.ranks == n:
                steps = range(1, len(row.drift) + 1)
                axes.plot(steps, row.drift, color=colours[row.variant], label=row.variant)
        axes.set_yscale("symlog", linthresh=1e-3)  # exact steps are at 0
        axes.set(xlabel="step", title=f"{n} ranks")
        axes.legend(fontsize=8)
    # Of all panels at once, when every line is drawn.
    panels[0][0].set(ylabel="distance of latents / their norm", ylim=(0, None))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """LPIPS against the cost, a share of one rank's step; colours are variants, marks are ranks."""
    plt = _pyplot()
    counts, colours = sorted({row.ranks for row in rows}), _colours(rows)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for x in summary(rows):
        place = counts.index(x["ranks"])
        axes.plot(
            x["cost"],
            max(x["lpips"], 1e-6),
            linestyle="",
            marker="osD^vP*X"[place % 8],
            color=colours[x["variant"]],
            label=f"{x['variant']}, {x['ranks']} ranks",
        )
    axes.set(xlabel="a step's time over one rank's", ylabel="LPIPS to one rank", yscale="log")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)  # else costs that are alike stand far apart
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """One for each variant, the same on any number of ranks."""
    variants = dict.fromkeys(row.variant for row in rows)
    # The 20 are pairs, a strong colour and a pale one: few variants are told apart by strong ones.
    palette = _pyplot().get_cmap("tab10" if len(variants) <= 10 else "tab20").colors
    return {name: palette[i % len(palette)] for i, name in enumerate(variants)}


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
