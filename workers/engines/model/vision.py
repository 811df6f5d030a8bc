"""Images in the passes of a training engine: their pixels, where their tokens are, and the positions
of all tokens.

    sees = ImageInputs(model)                       # once, on each rank
    images = sees.of(rows, places, (1, tokens))     # of one micro-batch
    outputs = model(input_ids, ..., **image_arguments(images, packing))

Pixels are made here, from the references that the rows carry, so that no other process holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from workers.config import ModelConfig
from workers.engines.model.attention import BLOCKS
from workers.engines.model.packing import Packing
from workers.engines.model.tower_sizes import tower_arguments
from workers.images import ImageProcessor, family_of
from workers.images.families import image_token_id
from workers.images.processor import Extent, Pixels, rotary_positions
from workers.images.reference import blank_image
from workers.sequences import Sequences

PLACES, TAKEN = "image_places", "image_taken"
"""Keyword arguments of a model's forward, for place_images."""
DEEPER = "deepstack_features"
"""transformers' name of the features that a tower (Qwen3-VL's) gives to layers of the decoder."""
MASKED_ATTENTIONS = ("eager", "sdpa")
"""Attentions of transformers' that take a mask in which an image's tokens see each other."""


@dataclass(frozen=True, slots=True)
class SeenImages:
    """The images of one pass, in the order of their tokens."""

    pixel_values: Tensor | None
    """float32, those of all images one after the other; None where there is no image, and in pipeline
    stages without the tower."""
    grids: Tensor | None
    """int64 [images, 3]: patches along time, height and width; None where there are no pixels, and
    where all images have the same size."""
    positions: Tensor | None
    """int64 [3, rows, time]: positions of the input ids in time, height and width; None where a token
    has one position only."""
    is_image: Tensor
    """bool [rows, time]: which input ids are an image's. A token of that kind that was sampled is
    not."""
    blocks: Tensor | None
    """int64 [rows, time]: the number of the image that an input id belongs to, -1 for text; None where
    no image's tokens see each other."""
    used: Tensor | None = None
    """int64: which of the images' tokens are among the input ids, where those are a part of a row; None
    for all."""

    def padded(self, missing: int) -> SeenImages:
        """The same with further columns of text at the end."""
        positions, blocks = self.positions, self.blocks
        return replace(
            self,
            positions=None if positions is None else pad(positions, (0, missing)),
            is_image=pad(self.is_image, (0, missing)),
            blocks=None if blocks is None else pad(blocks, (0, missing), value=-1),
        )

    def shared(self, tokens: Tensor) -> SeenImages:
        """For a part of a packed row, these tokens of it: all images are seen, and the features of some of
        their tokens are used."""
        assert self.blocks is None, "image_layouts.py saw to it"
        is_image, positions = self.is_image[:, tokens], self.positions
        numbers = (torch.cumsum(self.is_image[0], 0) - 1)[tokens]
        return replace(
            self,
            positions=None if positions is None else positions[:, :, tokens],
            is_image=is_image,
            used=numbers[is_image[0]],
        )

    def without_pixels(self) -> SeenImages:
        """For a pipeline stage that gets the embedded images from the one before."""
        return replace(self, pixel_values=None, grids=None, used=None)

    def moved(self, move: Callable[[Tensor], Tensor]) -> SeenImages:
        """The same on another device, but for the sizes."""
        tensors: list[Tensor | None] = []
        for tensor in (self.pixel_values, self.positions, self.blocks, self.used):
            if tensor is not None:
                tensor = move(tensor)
            tensors.append(tensor)
        pixels, positions, blocks, used = tensors
        return SeenImages(pixels, self.grids, positions, move(self.is_image), blocks, used)


class ImageInputs:
    """Makes what a model reads besides the ids."""

    def __init__(self, model: ModelConfig) -> None:
        self._images = ImageProcessor(model)
        self._makes_pixels = True

    def without_pixels(self) -> ImageInputs:
        """For a pipeline stage that gets the embedded images from the one before: the heads of files say
        where their tokens are."""
        result = copy.copy(self)
        result._makes_pixels = False
        return result

    def of(self, part: Sequences, places: Tensor, shape: tuple[int, int]) -> SeenImages:
        """The images of a pass over input ids of `shape`, whose element i is the token places[i] of
        `part`, or padding where that is -1. A ValueError names a row whose image tokens are not
        those of its images."""
        family = self._images.family
        extents, begins, positions, of_image = self._rows(part)
        present = torch.nonzero(places >= 0).squeeze(1)
        place_of = torch.full((len(part.token_ids),), -1, dtype=torch.int64)
        place_of[places[present]] = present
        # An image of a prompt that several rows share is computed once.
        computed = [
            (int(place_of[begin]), image) for begin, image in zip(begins, extents, strict=True)
        ]
        ordered = sorted(
            (place, number) for number, (place, _) in enumerate(computed) if place >= 0
        )
        chosen = [extents[number] for _, number in ordered]
        blocks_of = torch.full((len(places),), -1, dtype=torch.int64)
        blocks_of[present] = of_image[places[present]]
        values = grids = rows = blocks = None
        if chosen and family.sees_itself:
            blocks = blocks_of.view(shape)
        if pixels := [image.values for image in chosen if isinstance(image, Pixels)]:
            values = torch.cat(pixels)
            if family.is_rotary:
                grids = torch.tensor([image.grid for image in chosen])
        if family.is_rotary:
            rows = torch.zeros(3, len(places), dtype=torch.int64)
            rows[:, present] = positions[:, places[present]]
            rows = rows.view(3, *shape)
        is_image = (blocks_of >= 0).view(shape)
        return SeenImages(values, grids, rows, is_image, blocks)

    def with_blank(self, seen: SeenImages) -> SeenImages:
        """The same with a blank image in the last columns of the first row, num_blank_tokens of them,
        which must be padding."""
        family, blank = self._images.family, self._images.pixels(blank_image())
        count = blank.num_tokens
        is_image = seen.is_image.clone()
        is_image[0, -count:] = True
        grids = positions = blocks = None
        if blank.grid is not None:
            assert seen.positions is not None
            ids = torch.full((count,), self._images.token_id)
            inside = rotary_positions(ids, self._images.token_id, [blank.grid], self._images.merge)
            positions = seen.positions.clone()
            positions[:, 0, -count:] = inside
            grids = torch.tensor([blank.grid])
        if family.sees_itself:
            blocks = torch.where(is_image, 0, -1)
        return SeenImages(blank.values, grids, positions, is_image, blocks)

    @property
    def num_blank_tokens(self) -> int:
        """Tokens of a blank image."""
        return self._images.pixels(blank_image()).num_tokens

    def _rows(self, part: Sequences) -> tuple[list[Extent], list[int], Tensor, Tensor]:
        """The images of all rows, as Pixels where they are made, where the tokens of each begin in
        part.token_ids, the positions [3, tokens] of all tokens (none where they have one only), and
        int64 [tokens]: the number of the image that a token belongs to, -1 for text."""
        extents: list[Extent] = []
        begins: list[int] = []
        positions = [torch.zeros(3, 0, dtype=torch.int64)]
        of_image = torch.full((len(part.token_ids),), -1, dtype=torch.int64)
        first = 0
        images = part.images or [()] * part.num_rows
        lengths, prompt_lengths = part.lengths.tolist(), part.prompt_lengths.tolist()
        for row, ids in enumerate(part.token_ids.cpu().split(lengths)):
            make = self._images.pixels if self._makes_pixels else self._images.extent
            images_of_row = [make(reference) for reference in images[row]]
            places = torch.nonzero(ids == self._images.token_id).squeeze(1)
            expected = sum(image.num_tokens for image in images_of_row)
            # Those behind the first scored token may have been sampled, and so may all of a row that is
            # being generated. Text alone may spell them.
            num_prompt = int((places < prompt_lengths[row]).sum())
            if prompt_lengths[row] == lengths[row] or not images_of_row:
                num_prompt = 0
            if len(places) < expected or num_prompt > expected:
                raise ValueError(
                    f"a row has {len(places)} image tokens and {len(images_of_row)} images of {expected} "
                    "tokens; prompts and images must come from the same processor"
                )
            done = 0  # tokens behind those of the images were sampled
            for number, image in enumerate(images_of_row, len(extents)):
                begins.append(first + int(places[done]))
                of_image[first + places[done : done + image.num_tokens]] = number
                done += image.num_tokens
            if self._images.family.is_rotary:
                grids = [image.grid for image in images_of_row if image.grid is not None]
                positions.append(
                    rotary_positions(ids, self._images.token_id, grids, self._images.merge)
                )
            extents += images_of_row
            first += len(ids)
        return extents, begins, torch.cat(positions, 1), of_image


def image_arguments(images: SeenImages, packing: Packing | None) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    The first of four rows of positions counts tokens: it tells transformers where the sequences of a
    packed row begin.
    """
    arguments: dict[str, Any] = {PLACES: images.is_image}
    positions = images.positions
    if positions is not None and packing is not None:
        positions = torch.cat([packing.arguments["position_ids"][None], positions])
    optional = {
        "position_ids": positions,
        "pixel_values": images.pixel_values,
        "image_grid_thw": images.grids,
        BLOCKS: images.blocks,
        TAKEN: images.used,
    }
    for name, value in optional.items():
        if value is not None:
            arguments[name] = value
    return arguments


def place_images(model: PreTrainedModel) -> None:
    """Put images where SeenImages.is_image says; nothing for a model that sees none.

    transformers looks for the tokens itself, and would take for an image one that the policy sampled.
    """
    family = family_of(model.config)
    if family is None:
        return
    base: Any = model.base_model
    token = image_token_id(model.config, family)
    find, see, forward = base.get_placeholder_mask, base.get_image_features, base.forward
    current: list[tuple[Tensor, Tensor | None]] = []

    def placed(input_ids: Tensor, *arguments: Any, **options: Any) -> Any:
        ids = input_ids
        if current:
            is_image, _ = current[-1]
            ids = torch.where(is_image, token, torch.where(ids == token, token - 1, ids))
        return find(ids, *arguments, **options)

    def seen(*arguments: Any, **options: Any) -> Any:
        if family.is_rotary:
            pixels, grids = arguments
            (tower,) = (base.get_submodule(name) for name in family.tower)
            options |= tower_arguments(tower, grids, pixels)
        features = see(*arguments, **options)
        used = current[-1][1] if current else None
        if used is not None:
            features.pooler_output = [torch.cat(tuple(features.pooler_output))[used]]
            if DEEPER in features:
                features[DEEPER] = [[torch.cat(tuple(each))[used]] for each in features[DEEPER]]
        return features

    def run(*arguments: Any, **options: Any) -> Any:
        places, used = options.pop(PLACES, None), options.pop(TAKEN, None)
        if places is None:
            return forward(*arguments, **options)
        attention = base.config.get_text_config()._attn_implementation
        if BLOCKS in options and attention in MASKED_ATTENTIONS:
            options["token_type_ids"] = (options.pop(BLOCKS) >= 0).long()
        current.append((places, used))
        try:
            return forward(*arguments, **options)
        finally:
            current.pop()

    base.get_placeholder_mask, base.get_image_features, base.forward = placed, seen, run
