"""`training/data.py`: captions, what is held out, and how sprites are put on backgrounds."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parent.parent / "training" / "data.py"
spec = importlib.util.spec_from_file_location("training_data", DATA)
assert spec is not None and spec.loader is not None
data = importlib.util.module_from_spec(spec)
sys.modules["training_data"] = data  # where its dataclass looks for its module
spec.loader.exec_module(data)

NAMES = [f"thing {index}" for index in range(400)]
WHITE, BLUE = (250, 250, 250), (64, 126, 237)


def square(colour: tuple[int, int, int], hidden: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """(4, 224, 224) uint8: an opaque square amid pixels of alpha 0 whose colour is `hidden`."""
    sprite = torch.zeros(4, 224, 224, dtype=torch.uint8)
    sprite[:3] = torch.tensor(hidden, dtype=torch.uint8)[:, None, None]
    sprite[:3, 56:168, 56:168] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    sprite[3, 56:168, 56:168] = 255
    return sprite


def composed(
    sprite: Tensor,
    background: tuple[int, int, int],
    scale: float = 0.8,
    shift: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """(3, 256, 256), 0 to 255."""
    pictures = data.compose(
        sprite[None],
        torch.tensor([background]),
        torch.tensor([scale]),
        torch.tensor([shift]),
    )
    assert pictures.shape == (1, 3, 256, 256)
    assert pictures.dtype == torch.float32
    assert pictures.abs().max() <= 1
    return (pictures[0] + 1) * 127.5


def test_caption() -> None:
    assert data.caption("red apple", "3d", "blue") == "red apple, 3d style, blue background"


def test_colours_are_ten_and_far_apart() -> None:
    colours = torch.tensor([*data.COLOURS.values()], dtype=torch.float32)
    assert len(colours) == 10
    assert torch.pdist(colours).min() > 60


def test_held_out_is_a_twentieth_and_never_both_styles() -> None:
    held = data.held_out(NAMES)
    assert held == data.held_out(NAMES)
    assert len(held) == 0.05 * len(NAMES) * len(data.STYLES)
    assert len({concept for concept, _ in held}) == len(held)
    assert {style for _, style in held} == {0, 1}


def test_background_is_exact_where_the_sprite_is_not() -> None:
    picture = composed(square((255, 0, 0), hidden=(0, 255, 0)), BLUE)
    corner = picture[:, :70, :70].flatten(1)
    torch.testing.assert_close(corner, torch.tensor(BLUE)[:, None].float().expand_as(corner))
    torch.testing.assert_close(picture[:, 128, 128], torch.tensor([255.0, 0.0, 0.0]))


@pytest.mark.parametrize("scale", [0.75, 0.83, 0.95])
def test_edges_take_nothing_from_the_colour_behind_alpha_0(scale: float) -> None:
    """A white square on white cannot be seen, whatever its transparent pixels hide."""
    picture = composed(square(WHITE), WHITE, scale, (0.013, -0.007))
    torch.testing.assert_close(picture, torch.full_like(picture, 250.0))


def test_scale_and_shift_are_fractions_of_the_side() -> None:
    picture = composed(square((0, 0, 0)), WHITE, scale=0.75, shift=(0.125, -0.0625))
    rows, columns = (picture[0] < 125).nonzero().unbind(1)
    # The square takes half of the sprite: 0.75 * 256 / 2 = 96 pixels around 128 + the shift.
    assert (columns.min(), columns.max()) == (128 + 32 - 48, 128 + 32 + 47)
    assert (rows.min(), rows.max()) == (128 - 16 - 48, 128 - 16 + 47)


def test_random_placement_crops_nothing() -> None:
    scale, shift = data.random_placement(1000, "cpu", torch.Generator().manual_seed(0))
    assert scale.min() >= 0.75 and scale.max() <= 0.95
    assert (shift.abs() + scale[:, None] / 2).max() <= 0.5 + 1e-6


def test_load_gives_what_was_packed(tmp_path: Path) -> None:
    sprites = [square((200, 10 * index, 30)) for index in range(4)]
    files = []
    for sprite in sprites:
        file = io.BytesIO()
        pixels = sprite.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(file, "WEBP", lossless=True, exact=True)
        files.append(file.getvalue())
    save_file(
        {
            "packed": torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8),
            "ends": torch.tensor([len(file) for file in files]).cumsum(0),
        },
        tmp_path / "some.safetensors",
        metadata={"names": json.dumps(["fox", "bee"]), "styles": json.dumps(data.STYLES)},
    )
    loaded = data.load(tmp_path / "some.safetensors")
    assert loaded.names == ["fox", "bee"]
    assert loaded.styles == ("3d", "flat")
    assert loaded.sprites.dtype == torch.uint8
    assert torch.equal(loaded.sprites, torch.stack(sprites).reshape(2, 2, 4, 224, 224))
