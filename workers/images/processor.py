"""ImageProcessor: the tokens and the pixels of an image, by the model's own processor files."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from workers.config import ModelConfig
from workers.images.families import ImageFamily, family_of, image_token_id, published_config
from workers.images.reference import ImageReference

LOGGER = logging.getLogger(__name__)

KEPT_BYTES = 256 * 2**20
"""Pixels that a process keeps, because the samples of a prompt and the passes of a step read the
same images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The room that an image takes in a prompt."""

    grid: tuple[int, int, int] | None
    """Patches along time, height and width; None where all images have the same size."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels(Extent):
    """An image as the vision tower reads it."""

    values: Tensor
    """float32 [patches, numbers of a patch], or [1, colors, height, width] where all images have the
    same size."""


class ImageProcessor:
    """images = ImageProcessor(model)
    text = images.expand(text, references)   # placeholders become as many tokens as images have
    pixels = images.pixels(reference)
    """

    def __init__(self, model: ModelConfig) -> None:
        """`model` is of a known family (sees_images). Its image processor is read with the first
        image, so that text needs none."""
        config = published_config(model)
        family = family_of(config)
        assert family is not None, "sees_images() saw to it"
        self.family: ImageFamily = family
        self.token_id = image_token_id(config, family)
        self._model = model
        sizes = config.to_dict()
        self._merge, self._token_count = 1, 0
        if family.is_rotary:
            self._merge = int(sizes["vision_config"]["spatial_merge_size"])
        else:
            self._token_count = int(sizes[family.token_count])
        self._pixels: OrderedDict[str, Pixels] = OrderedDict()
        self._num_bytes = 0
        self._extents: dict[str, Extent] = {}

    @cached_property
    def _processor(self) -> Any:
        model = self._model
        try:
            processor = AutoImageProcessor.from_pretrained(
                model.path,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                backend="pil",
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"model.path is {model.path!r}, a model with images and without an image processor "
                f"({reason}); add its preprocessor_config.json"
            ) from error
        if processor.to_dict().get("do_pan_and_scan"):
            raise ValueError(
                f"model.path is {model.path!r}, whose preprocessor_config.json has do_pan_and_scan, which "
                "makes several images of one; set it to false"
            )
        if self.family.is_rotary and not isinstance(processor, Qwen2VLImageProcessorPil):
            raise ValueError(
                f"model.path is {model.path!r}, whose preprocessor_config.json names "
                f"{type(processor).__name__}; use a model whose file names Qwen2VLImageProcessor"
            )
        return processor

    @property
    def merge(self) -> int:
        """Patches along each side of what is one token."""
        return self._merge

    def rules(self) -> dict[str, int]:
        """All that an image's tokens depend on besides its size, by the names of the files' entries."""
        if self._token_count:
            return {"image token": self.token_id, self.family.token_count: self._token_count}
        processor = self._processor
        return {
            "image token": self.token_id,
            "patch_size": processor.patch_size,
            "merge_size": processor.merge_size,
            "shortest_edge": processor.size["shortest_edge"],
            "longest_edge": processor.size["longest_edge"],
        }

    def extent(self, reference: ImageReference) -> Extent:
        """The room of an image in a prompt; reads its size only."""
        if self._token_count:
            reference.size()  # a damaged one ends the run here
            return Extent(grid=None, num_tokens=self._token_count)
        if reference.key not in self._extents:
            height, width = reference.size()
            try:
                grid = self._grid(height, width)
            except ValueError as error:  # too long and thin
                raise ValueError(
                    f"{reference} is {width} x {height} pixels, which the model's image processor does not "
                    f"take: {error}; cut it, or remove the row"
                ) from error
            self._extents[reference.key] = self._extent(grid)
        return self._extents[reference.key]

    def _grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patches of an image with these sides, as the processor resizes it."""
        processor = self._processor
        side, size = processor.patch_size, processor.size
        rows, columns = smart_resize(
            height,
            width,
            side * processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return 1, rows // side, columns // side

    def _extent(self, grid: tuple[int, int, int]) -> Extent:
        time, height, width = grid
        return Extent(grid=grid, num_tokens=time * height * width // self._merge**2)

    def expand(self, text: str, references: Sequence[ImageReference]) -> str:
        """The text with each image's tokens in the place of its placeholder. A ValueError where there
        are more or fewer placeholders than images, or a text spells the tokens."""
        pieces = text.split(self.family.placeholder)
        if len(pieces) - 1 != len(references):
            raise ValueError(
                f"{len(references)} images, and the chat template wrote {len(pieces) - 1} "
                f"placeholders {self.family.placeholder!r}; use the model's own template, and leave "
                "the placeholder out of texts"
            )
        if any(self.family.token_text in piece for piece in pieces):
            raise ValueError(
                f"a text has {self.family.token_text!r}, which are the tokens of an image; leave it out "
                "of texts"
            )
        result = pieces[0]
        for reference, piece in zip(references, pieces[1:], strict=True):
            result += self.family.expanded(self.extent(reference).num_tokens) + piece
        return result

    def pixels(self, reference: ImageReference) -> Pixels:
        """The image for the vision tower, kept for the next time."""
        pixels = self._pixels.get(reference.key)
        if pixels is not None:
            self._pixels.move_to_end(reference.key)
            return pixels
        pixels = self._processed(reference)
        self._pixels[reference.key] = pixels
        self._num_bytes += pixels.values.nbytes
        while self._num_bytes > KEPT_BYTES and len(self._pixels) > 1:
            _, oldest = self._pixels.popitem(last=False)
            self._num_bytes -= oldest.values.nbytes
        return pixels

    def _processed(self, reference: ImageReference) -> Pixels:
        features = self._processor(images=[reference.read()], return_tensors="pt")
        values = features["pixel_values"].float()
        if self._token_count:
            return Pixels(grid=None, num_tokens=self._token_count, values=values)
        time, height, width = features["image_grid_thw"][0].tolist()
        num_tokens = time * height * width // self._merge**2
        return Pixels(grid=(time, height, width), num_tokens=num_tokens, values=values)

    def save(self, directory: str) -> None:
        """Writes the processor's files, as transformers and vLLM read them."""
        try:
            self._processor.save_pretrained(directory)
        except ValueError as error:
            LOGGER.warning("%s", error)


def rotary_positions(
    token_ids: Tensor, token_id: int, grids: Sequence[tuple[int, int, int]], merge: int
) -> Tensor:
    """int64 [3, tokens]: the positions (time, height, width) of one row's tokens.

    Text counts on in all three; the tokens of an image stand at its place in time, and at their own in
    height and width; the text behind it goes on after the largest of these.
    """
    positions = torch.empty(3, len(token_ids), dtype=torch.int64)
    is_image = (token_ids == token_id).tolist()
    place = following = 0
    for time, height, width in grids:
        begin = is_image.index(True, place)
        positions[:, place:begin] = torch.arange(begin - place) + following
        following += begin - place
        sides = (time, height // merge, width // merge)
        place = begin + sides[0] * sides[1] * sides[2]
        grid = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"))
        positions[:, begin:place] = grid.flatten(1) + following
        following += max(sides[1:])
    positions[:, place:] = torch.arange(len(token_ids) - place) + following
    return positions
