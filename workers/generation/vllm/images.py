"""Prompts with images, as vLLM's engine takes them from its own processors: the prompt's tokens as they
are, where each image's stand, and the pixels that training reads too.

Its processors are passed by: they would take the tokens of an image for so many images, and resize by
another library. What they cache is therefore never asked; an image is known by its path or by a digest
of its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature

from workers.config import ModelConfig
from workers.generation import other_engines
from workers.generation.rows import NewRow
from workers.images import ImageProcessor

if TYPE_CHECKING:
    from vllm.inputs.engine import MultiModalInput

IMAGE = "image"
"""vLLM's name of what is given."""


def check_library(model_type: str) -> None:
    """ValueError where vLLM's modules of models with images can't be imported."""
    if find_spec("torchvision") is None:
        raise ValueError(
            f"generation.engine is 'vllm', whose {model_type} needs torchvision, which is not installed; "
            f"run make environment, or set generation.engine to {other_engines('vllm')}"
        )


def engine_options(sees_images: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine for a model that sees images; none for another."""
    if not sees_images:
        return {}
    return {
        "limit_mm_per_prompt": {"video": 0},
        "mm_processor_cache_gb": 0,
        "mm_device_do_normalize": False,  # the pixels are normalized already
    }


class VllmImages:
    """images = VllmImages(model)
    llm_engine.add_request(key, images.input(row, salt), ...)
    """

    def __init__(self, model: ModelConfig) -> None:
        self._images = ImageProcessor(model)

    def input(self, row: NewRow, salt: str) -> MultiModalInput:
        """The row for vLLM. A ValueError where its prompt has not the tokens of its images."""
        from vllm.inputs.engine import mm_input
        from vllm.multimodal.inputs import (
            MultiModalFieldConfig,
            MultiModalKwargsItems,
            PlaceholderRange,
        )

        pixels = [self._images.pixels(reference) for reference in row.images]
        counts = [image.num_tokens for image in pixels]
        begins = image_begins(row.prompt, self._images.token_id, counts)
        grids = torch.tensor([image.grid for image in pixels])
        features = BatchFeature(
            {
                "pixel_values": torch.cat([image.values for image in pixels]),
                "image_grid_thw": grids,
            }
        )
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes(IMAGE, grids.prod(-1)),
            "image_grid_thw": MultiModalFieldConfig.batched(IMAGE, keep_on_cpu=True),
        }
        places = []
        for begin, count in zip(begins, counts, strict=True):
            places.append(PlaceholderRange(offset=begin, length=count))
        return mm_input(
            row.prompt.tolist(),
            MultiModalKwargsItems.from_hf_inputs(features, fields),
            {IMAGE: [reference.key for reference in row.images]},
            {IMAGE: places},
            cache_salt=salt,
        )


def image_begins(prompt: NDArray[np.int64], token: int, counts: Sequence[int]) -> list[int]:
    """Where the tokens of each image begin in a prompt int64 [tokens]; `counts`: how many each image
    has."""
    (places,) = np.nonzero(prompt == token)
    if len(places) < sum(counts):  # the others were sampled, and are text
        raise ValueError(
            f"a prompt has {len(places)} image tokens and {len(counts)} images of {sum(counts)} tokens; "
            "prompts and images must come from the same processor"
        )
    begins, done = [], 0
    for count in counts:
        begin = int(places[done])
        if int(places[done + count - 1]) != begin + count - 1:
            raise ValueError(
                f"the {count} tokens of an image do not follow each other in its prompt; use the "
                "model's own chat template"
            )
        begins.append(begin)
        done += count
    return begins
