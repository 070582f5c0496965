"""The emoji data set: about 400 things, each drawn in two styles.

    python training/data.py build  # into training/.cache; draws with resvg-py
    python training/data.py names  # the vocabulary
    python training/data.py preview out.png

A picture is a sprite on a plain background. Its caption: "fox, 3d style, blue background".
"""

import base64
import hashlib
import io
import json
import random
import tarfile
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

CACHE = Path(__file__).parent / ".cache"
DATASET = CACHE / "emoji.safetensors"
NOTICE = Path(__file__).parent / "NOTICE.md"
SIZE = 224  # a sprite's side in pixels

STYLES = ("3d", "flat")
COLOURS = {
    "white": (250, 250, 250),
    "black": (22, 22, 26),
    "red": (222, 52, 56),
    "orange": (255, 149, 45),
    "yellow": (255, 222, 74),
    "green": (74, 184, 92),
    "blue": (64, 126, 237),
    "purple": (141, 82, 204),
    "pink": (255, 158, 200),
    "gray": (140, 144, 150),
}

HELD_OUT_SHARE = 0.05  # of the (concept, style) pairs
HELD_OUT_SEED = 0

# npm packages: the registry's own digest of each.
FLUENT = (
    "@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NOTO = (
    "@iconify-json/noto/-/noto-1.2.9.tgz",
    "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
UNICODE = (
    "unicode-emoji-json/-/unicode-emoji-json-0.9.0.tgz",
    "HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
)

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass
class Dataset:
    """
    Attributes:
        names: what each concept is called in captions; unique.
        styles: of each concept's sprites, in their order.
        sprites: (concepts, styles, 4, 224, 224) uint8, straight alpha. Where alpha is 0 the colour
            means nothing: premultiply before any resampling, as `compose` does.
    """

    names: list[str]
    styles: tuple[str, ...]
    sprites: Tensor


def caption(name: str, style: str, colour: str) -> str:
    return f"{name}, {style} style, {colour} background"


def held_out(names: Sequence[str]) -> set[tuple[int, int]]:
    """The (concept, style) pairs kept out of training; the other style of each stays in it."""
    rng = random.Random(HELD_OUT_SEED)
    count = round(HELD_OUT_SHARE * len(names) * len(STYLES))
    concepts = rng.sample(range(len(names)), count)
    return {(concept, rng.randrange(len(STYLES))) for concept in concepts}


def random_placement(
    batch: int, device: torch.device | str, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`compose`'s scale (batch,) and shift (batch, 2), such that no sprite is cropped."""
    scale = 0.80 + 0.14 * torch.rand(batch, generator=generator, device=device)
    side = 2 * torch.rand(batch, 2, generator=generator, device=device) - 1
    return scale, side * 0.03


def compose(
    sprites: Tensor, colours: Tensor, scale: Tensor, shift: Tensor, size: int = 256
) -> Tensor:
    """Sprites on plain backgrounds, on the sprites' device.

    Args:
        sprites: (B, 4, 224, 224) uint8, straight alpha.
        colours: (B, 3), 0 to 255.
        scale: (B,), the sprite's side as a fraction of the picture's. Sampling is bilinear: a
            sprite shrunk to less than about two thirds of its pixels would alias.
        shift: (B, 2), of the sprite's middle from the picture's, right and down, as a fraction
            of the picture's side.

    Returns:
        (B, 3, size, size) float32, -1 to 1.
    """
    device = sprites.device
    colours, scale, shift = (values.to(device, torch.float32) for values in (colours, scale, shift))

    # Premultiplied, or an edge's pixels would take on the colour behind alpha 0: a dark fringe.
    alpha = sprites[:, 3:].float() / 255
    layers = torch.cat([sprites[:, :3].float() * alpha, alpha], dim=1)

    # Where in the sprite a picture's pixels lie; edges are at -1 and 1 in both. By hand, since
    # `affine_grid` multiplies matrices, in TF32 where a trainer allows that.
    line = (torch.arange(size, device=device) * 2 + 1) / size - 1
    x, y = (line - 2 * shift.T[:, :, None]) / scale[:, None]  # (B, size) each
    shape = sprites.shape[0], size, size
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    layers = F.grid_sample(layers, grid, mode="bilinear", align_corners=False)

    colour, alpha = layers.split([3, 1], dim=1)
    picture = (colour + (1 - alpha) * colours[:, :, None, None]) / 127.5 - 1
    return picture.clamp(-1, 1)  # rounding can pass the ends


def load(path: Path = DATASET) -> Dataset:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        packed = file.get_tensor("packed").numpy()
        ends = file.get_tensor("ends").tolist()
    names, styles = json.loads(meta["names"]), tuple(json.loads(meta["styles"]))

    def decode(start: int, end: int) -> np.ndarray:
        with Image.open(io.BytesIO(packed[start:end].tobytes())) as image:
            return np.asarray(image.convert("RGBA")).transpose(2, 0, 1)

    sprites = np.empty((len(ends), 4, SIZE, SIZE), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for index, sprite in enumerate(pool.map(decode, [0, *ends[:-1]], ends)):
            sprites[index] = sprite
    sprites = sprites.reshape(len(names), len(styles), 4, SIZE, SIZE)
    return Dataset(names, styles, torch.from_numpy(sprites))


@app.command()
def build(output: Annotated[Path, typer.Argument()] = DATASET) -> None:
    """Download the artwork and write the data set, one file."""
    from vocabulary import vocabulary  # beside this file; only building needs it

    emoji = json.loads(npm_package(*UNICODE)["data-by-emoji.json"])
    artwork_3d, artwork_flat = fluent_artwork(), noto_artwork()
    concepts = {  # both styles or neither
        code_points(char): name
        for char, name in vocabulary(emoji).items()
        if code_points(char) in artwork_3d.keys() & artwork_flat.keys()
    }
    assert len(set(concepts.values())) == len(concepts), "two concepts of one name"

    def draw(points: str) -> tuple[bytes, bytes]:
        return webp(draw_3d(artwork_3d[points])), webp(draw_flat(artwork_flat[points]))

    with ThreadPoolExecutor() as pool:
        packed = [sprite for pair in pool.map(draw, concepts) for sprite in pair]
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "packed": torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8),
            "ends": torch.tensor([len(sprite) for sprite in packed]).cumsum(0),
        },
        output,
        metadata={
            "names": json.dumps(list(concepts.values())),
            "styles": json.dumps(STYLES),
            "notice": NOTICE.read_text(),
        },
    )
    print(f"{output}: {len(concepts)} concepts, {output.stat().st_size / 1e6:.1f} MB")


@app.command()
def names(dataset: Annotated[Path, typer.Argument()] = DATASET) -> None:
    """Print the vocabulary, one name a line; what is held out of training is marked."""
    all_names = load(dataset).names
    without = {concept: STYLES[style] for concept, style in held_out(all_names)}
    for concept, name in enumerate(all_names):
        print(f"{name}  (not trained in {without[concept]})" if concept in without else name)


@app.command()
def preview(
    output: Path,
    start: Annotated[int, typer.Option(help="The first concept.")] = 0,
    count: Annotated[int, typer.Option(help="How many concepts.")] = 40,
    columns: Annotated[int, typer.Option(help="Concepts in a row.")] = 5,
    dataset: Annotated[Path, typer.Option()] = DATASET,
) -> None:
    """Draw captioned samples of the training pictures: each concept in both styles."""
    data = load(dataset)
    chosen = range(start, min(start + count, len(data.names)))
    styles, pixels, line = len(data.styles), 160, 14
    width, height = pixels * styles, pixels + styles * line
    generator = torch.Generator().manual_seed(start)

    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for place, concept in enumerate(chosen):
        left, top = place % columns * width, place // columns * height
        backgrounds = torch.randint(len(COLOURS), (styles,), generator=generator).tolist()
        words = [list(COLOURS)[index] for index in backgrounds]
        pictures = compose(
            data.sprites[concept],
            torch.tensor([COLOURS[word] for word in words]),
            *random_placement(styles, "cpu", generator),
        )
        for index, picture in enumerate(pictures):
            shown = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            small = Image.fromarray(shown).resize((pixels, pixels), Image.Resampling.LANCZOS)
            sheet.paste(small, (left + index * pixels, top))
            text = caption(data.names[concept], data.styles[index], words[index])
            pen.text((left + 2, top + pixels + index * line), text, "black", font)
    sheet.save(output)


def npm_package(path: str, sha512: str) -> dict[str, bytes]:
    """Its files by their paths in it; downloaded once, checked each time."""
    archive = CACHE / Path(path).name
    if not archive.exists():
        CACHE.mkdir(exist_ok=True)
        with urllib.request.urlopen(f"https://registry.npmjs.org/{path}") as response:
            archive.write_bytes(response.read())
    content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != sha512:
        raise ValueError(f"{archive} is not the expected file; delete it to download it again")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {
            member.name.removeprefix("package/"): file.read()
            for member in tar
            if (file := tar.extractfile(member))
        }


def code_points(char: str) -> str:
    """ "2764" of a red heart, without the FE0F that asks for colour: sources disagree on it."""
    return "-".join(f"{ord(point):04x}" for point in char if point != "\ufe0f")


def fluent_artwork() -> dict[str, bytes]:
    """WebP files of 256 x 256 pixels by code points."""
    return {
        Path(path).stem.replace("-fe0f", ""): content
        for path, content in npm_package(*FLUENT).items()
        if path.endswith(".webp")
    }


def noto_artwork() -> dict[str, str]:
    """SVG bodies, of 128 x 128 units, by code points."""
    package = npm_package(*NOTO)
    icons, chars = json.loads(package["icons.json"]), json.loads(package["chars.json"])
    bodies = {name: icon["body"] for name, icon in icons["icons"].items()}
    return {
        points.replace("-fe0f", ""): bodies[name]
        for points, name in chars.items()
        if name in bodies
    }


def draw_3d(content: bytes) -> Image.Image:
    """(224, 224) RGBA. Pillow premultiplies while it resizes."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_flat(body: str) -> Image.Image:
    """(224, 224) RGBA."""
    import resvg_py  # only building needs it

    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {names} viewBox="0 0 128 128">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def webp(sprite: Image.Image) -> bytes:
    """Lossless: of flat drawings the smallest too, and of all small enough."""
    file = io.BytesIO()
    sprite.save(file, "WEBP", lossless=True, quality=90, method=4)
    return file.getvalue()


if __name__ == "__main__":
    app()
