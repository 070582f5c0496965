"""Pictures from clients, read with care, and pictures for them."""

from __future__ import annotations

import io
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from piflux.serving.jobs import Refused

FORMATS = ("PNG", "JPEG", "WEBP")
"""Of uploads. Pillow has decoders for many more, which strangers should not reach."""

Format = Literal["png", "jpeg", "webp"]

DESCRIPTION = 0x010E
"""EXIF's tag for what a picture is."""

FAST = {"compress_level": 1, "compress_type": zlib.Z_RLE}
"""How PNGs are packed: a megapixel in 46 ms of a CPU core, not Pillow's own 185, into as small a
file. Filtered rows repeat single bytes at most: longer matches are looked for in vain."""


def read_upload(data: bytes, field: str, pixels: int) -> Image.Image:
    """A client's picture, upright.

    Args:
        data: of a PNG, JPEG or WebP.
        field: the request's, for what is said of it.
        pixels: how many it may have at most; its header is asked before anything is decoded.

    Raises:
        Refused: it is no such picture, is broken, moves or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # limited here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > pixels:
                raise Refused(
                    400,
                    "too_many_pixels",
                    f"{field}: {image.width} x {image.height} pixels are more than the "
                    f"{pixels:,} that a request's pictures may have together: scale them down",
                    field=field,
                )
            if getattr(image, "n_frames", 1) != 1:
                raise Refused(
                    400, "invalid_image", f"{field}: it moves; send one picture", field=field
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise Refused(
            400, "too_many_pixels", f"{field}: more than the {pixels:,} pixels", field=field
        ) from None
    except UnidentifiedImageError:
        raise Refused(
            400, "invalid_image", f"{field}: it is no PNG, JPEG or WebP", field=field
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError) as error:
        # What Pillow's decoders raise on data that is cut off or made up.
        raise Refused(
            400, "invalid_image", f"{field}: it can't be decoded: {error}", field=field
        ) from error


def painted_anew(mask: Image.Image) -> Image.Image:
    """White where the picture is painted anew.

    OpenAI's masks are transparent there. One without an alpha channel is white there already.
    """
    if "A" in mask.getbands() or "transparency" in mask.info:
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def encode(image: Image.Image, form: Format, compression: int, told: Mapping[str, object]) -> bytes:
    """The file of a picture, with what it was made with.

    Args:
        image: in RGB.
        form: PNGs are exact.
        compression: OpenAI's `output_compression`, 0 to 100: 100 is the best picture, in WebP an
            exact one.
        told: written as text into PNGs, as JSON into EXIF's description of others.
    """
    file = io.BytesIO()
    if form == "png":
        info = PngInfo()
        for name, value in told.items():
            info.add_itxt(name, str(value))
        image.save(file, "PNG", pnginfo=info, **FAST)
        return file.getvalue()
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(told, default=str)
    if form == "jpeg":
        subsampling = 0 if compression > 95 else 2
        quality = max(compression, 1)
        image.save(file, "JPEG", quality=quality, subsampling=subsampling, exif=exif)
    elif compression == 100:  # the quickest way, whose files are still smaller than PNGs
        image.save(file, "WEBP", lossless=True, quality=0, method=0, exif=exif)
    else:
        image.save(file, "WEBP", quality=compression, exif=exif)
    return file.getvalue()


def small(images: Sequence[Image.Image]) -> list[bytes]:
    """The files of previews: WebP, since they are small, coarse and soon replaced."""
    return [encode(image, "webp", 80, {}) for image in images]
