"""What `piflux quality` writes of numbers and pictures: a table, a contact sheet, two charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from piflux.drift import Drawn, Row, summary


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
    side, label = 160, 34
    font = ImageFont.load_default(size=11)
    columns = [("one rank", one, None)]
    columns += [(f"{r.variant}\n{r.ranks} ranks", d, r) for r, d in zip(rows, drawn, strict=True)]  # type: ignore[misc]
    sheet = Image.new("RGB", (side * len(columns), label + (side + label) * len(prompts)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, pictures, row) in enumerate(columns):
        pen.text((column * side + 2, 2), name, "black", font)
        for index, prompt in enumerate(prompts):
            left, top = column * side, label + index * (side + label)
            array = (pictures.images[index] * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(array).resize((side - 4, side - 4)), (left + 2, top))
            text = prompt.replace(", ", "\n", 1) if row is None else f"{row.psnr[index]:.1f} dB"
            pen.text((left + 2, top + side - 2), text, "black", font)
    return sheet


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
