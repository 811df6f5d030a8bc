"""ImageReference: an image that has not been read yet."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # runs without images do not need it
    from PIL import Image

ORIENTATION = 0x0112
"""The EXIF tag that says how an image is turned."""
TURNED = (5, 6, 7, 8)
"""Its values for which width and height are exchanged."""


@dataclass(frozen=True)
class ImageReference:
    """ImageReference(path="/data/cat.png") or ImageReference(encoded=b"...")"""

    path: str | None = None
    """An absolute path, which every rank can read."""
    encoded: bytes | None = None
    """The contents of an image file."""

    @cached_property
    def key(self) -> str:
        """Tells images apart: the path, or a digest of the bytes."""
        if self.encoded is None:
            return str(self.path)
        return hashlib.blake2b(self.encoded, digest_size=16).hexdigest()

    def size(self) -> tuple[int, int]:
        """Height and width in pixels; reads the head of the file only."""
        with self._opened() as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION) in TURNED:
                return width, height
            return height, width

    def read(self) -> Image.Image:
        """The image in RGB, upright. A ValueError names one that can't be read."""
        from PIL import ImageOps

        with self._opened() as image:
            try:
                return ImageOps.exif_transpose(image).convert("RGB")
            except OSError as error:
                raise ValueError(f"{self} can't be read as an image: {error}") from error

    def _opened(self) -> Image.Image:
        from PIL import Image

        source = io.BytesIO(self.encoded) if self.encoded is not None else Path(str(self.path))
        try:
            return Image.open(source)
        except OSError as error:
            raise ValueError(f"{self} can't be read as an image: {error}") from error

    def __str__(self) -> str:
        if self.encoded is None:
            return f"the image {self.path!r}"
        return f"an image of {len(self.encoded)} bytes"
