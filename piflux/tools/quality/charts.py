"""What `piflux quality` writes of numbers and pictures: a table, a contact sheet, two charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from piflux.tools.quality.drift import Drawn, Row, summary


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
    prompts: Sequence[str], one: Drawn, rows: Sequence[Row], drawn: Sequence[Drawn]
) -> Image.Image:
    """A row a prompt, a column a variant, the first one rank's; under each picture its PSNR."""
    side, margin = 160, 2
    inner = side - 2 * margin
    font = ImageFont.load_default(size=11)
    columns = [("one rank", one, None)]
    columns += [(f"{r.variant}\n{r.ranks} ranks", d, r) for r, d in zip(rows, drawn, strict=True)]  # type: ignore[misc]
    titles = [_wrapped(name, inner, font) for name, _, _ in columns]
    captions = [_wrapped(prompt.replace(", ", "\n", 1), inner, font) for prompt in prompts]
    head = _height(titles, font) + 4 * margin
    pitch = inner + _height(captions, font) + 4 * margin
    sheet = Image.new("RGB", (side * len(columns), head + pitch * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, (_, pictures, row)) in enumerate(zip(titles, columns, strict=True)):
        left = column * side + margin
        pen.text((left, margin), title, "black", font)
        for index, caption in enumerate(captions):
            top = head + index * pitch
            array = (pictures.images[index] * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(array).resize((inner, inner)), (left, top))
            text = caption if row is None else f"{row.psnr[index]:.1f} dB"
            pen.text((left, top + inner + margin), text, "black", font)
    return sheet


def _wrapped(text: str, width: int, font: Any) -> str:
    """`text` in lines of at most so many pixels, broken after spaces and commas where there are."""
    lines = []
    for rest in text.split("\n"):
        while font.getlength(rest) > width:
            fits = max(
                n for n in range(1, len(rest)) if n == 1 or font.getlength(rest[:n]) <= width
            )
            cut = max(rest.rfind(mark, 0, fits) for mark in " ,") + 1 or fits
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
        lines.append(rest)
    return "\n".join(lines)


def _height(texts: Sequence[str], font: Any) -> int:
    """Pixels of the tallest."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return math.ceil(max(pen.multiline_textbbox((0, 0), text, font)[3] for text in texts))


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
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    """One for each variant, the same on any number of ranks."""
    palette = _pyplot().get_cmap("tab20").colors
    variants = dict.fromkeys(row.variant for row in rows)
    return {name: palette[i % len(palette)] for i, name in enumerate(variants)}


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
