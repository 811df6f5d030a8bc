"""ImageReference: an image that has not been read yet."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:  # runs without images do not need it
    from PIL import Image

ORIENTATION = 0x0112
"""The EXIF tag that says how an image is turned."""
TURNED = (5, 6, 7, 8)
"""Its values for which width and height are exchanged."""

DEEP = "I;16"
"""Pillow's mode of 16 bits a pixel."""
RANGELESS = {"I": "whole numbers of 32 bits", "F": "fractions"}
"""Pillow's modes of pixels that have no largest value, and their words."""
ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
"""The last bytes of JPEG and PNG files."""
LAST_BYTES = 8
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""Errors of Pillow for files that are cut short or damaged."""


@dataclass(frozen=True)
class ImageReference:
    """ImageReference(path="/data/cat.png") or ImageReference(encoded=b"...")"""

    path: str | None = None
    """An absolute path, which every rank can read."""
    encoded: bytes | None = None
    """The contents of an image file."""

    place: str = field(default="", compare=False)
    """Where it stands in the data, for messages: the row and the column."""

    @cached_property
    def key(self) -> str:
        """Tells images apart: the path, or a digest of the bytes."""
        if self.encoded is None:
            return str(self.path)
        return hashlib.blake2b(self.encoded, digest_size=16).hexdigest()

    def size(self) -> tuple[int, int]:
        """Height and width in pixels. Reads the two ends of a JPEG file, and all of another or of one that
        does not end as it should. A ValueError names an image that can't be read."""
        if not self._ends_well():
            self.read()
        with self._opened() as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION) in TURNED:
                return width, height
            return height, width

    def read(self) -> Image.Image:
        """The image as a model is shown it (upright_rgb). A ValueError names one that can't be read."""
        with self._opened() as file:
            return upright_rgb(file)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        """The image; what can't be read in it is a ValueError in one line."""
        from PIL import Image

        source = io.BytesIO(self.encoded) if self.encoded is not None else Path(str(self.path))
        with explained(str(self)), Image.open(source) as image:
            check_range(image)
            yield image

    def _ends_well(self) -> bool:
        """Whether the last bytes are the end of a whole JPEG or PNG file."""
        try:
            with self._bytes() as file:
                file.seek(-min(LAST_BYTES, file.seek(0, io.SEEK_END)), io.SEEK_END)
                return file.read().endswith(ENDS)
        except OSError as error:
            raise ValueError(_unreadable(str(self), error)) from error

    def _bytes(self) -> BinaryIO:
        if self.encoded is not None:
            return io.BytesIO(self.encoded)
        return Path(str(self.path)).open("rb")

    def __str__(self) -> str:
        before = f"{self.place}: " if self.place else ""
        if self.encoded is None:
            return f"{before}the image {self.path!r}"
        return f"{before}an image of {len(self.encoded)} bytes"


class _WithFix(ValueError):
    """Its message says what to do."""


def check_range(image: Image.Image) -> None:
    """A ValueError for pixels that have no largest value."""
    if kind := RANGELESS.get(image.mode):
        raise _WithFix(
            f"its pixels are {kind}, whose largest value is not known; save it with 8 or 16 bits"
        )


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, upright, on white where it is transparent (as vLLM's server has it), with the upper
    8 of 16 bits."""
    from PIL import Image, ImageOps

    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith(DEEP):  # Pillow cuts values above 255 off
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    return upright.convert("RGB")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Within, an error of Pillow is a ValueError in one line, with the image's `name` and what to do."""
    from PIL import Image

    try:
        yield
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(_unreadable(name, error)) from error


def _unreadable(name: str, error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    reason, fix = " ".join(str(error).split()), "replace the file, or remove the row"
    if isinstance(error, UnidentifiedImageError):  # whose words have the file's name again
        reason = "it is no image that Pillow knows"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    elif isinstance(error, Image.DecompressionBombError):
        fix = "make it smaller, or remove the row"
    elif isinstance(error, _WithFix):
        return f"{name} can't be read as an image: {reason}"
    return f"{name} can't be read as an image: {reason}; {fix}"


@cache
def blank_image() -> ImageReference:
    """An image of one black pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="PNG")
    return ImageReference(encoded=file.getvalue())
