"""Rows of the rehearsal: plain ones, with images, and episodes, in which an environment wrote some of
the tokens and some rows are several segments."""

from __future__ import annotations

import io

import torch
from torch import Tensor

from benchmarks.rehearsal.models import IMAGE, IMAGE_BEGIN, IMAGE_END, MERGED, PATCH
from workers.engines.base import Head
from workers.images import ImageReference
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.sequences import Sequences

LENGTHS, SCORED = (20, 30, 40, 50, 60), (10, 10, 20, 20, 30)
FIRST_SPECIAL = 500
IMAGE_SIZE = (4 * PATCH * MERGED, 3 * PATCH * MERGED)
"""Height and width of an image: 12 tokens."""


def sequences(head: Head, kind: str) -> Sequences:
    """kind: dense, experts, images or episodes."""
    lengths, scored = torch.tensor(LENGTHS), torch.tensor(SCORED)
    ids = torch.randint(2, FIRST_SPECIAL, (int(lengths.sum()),))
    images = mask = segments = None
    if kind == "images":
        images = with_images(ids, lengths)
    if kind == "episodes":
        mask, segments = turns(lengths, scored), torch.tensor([0, 0, 1, 2, 3])
    return Sequences(
        token_ids=ids,
        lengths=lengths,
        scored_lengths=scored,
        scored=mask,
        batch_row=segments,
        images=images,
        per_token=columns(head, scored),
    )


def columns(head: Head, scored: Tensor) -> dict[str, Tensor]:
    tokens = int(scored.sum())
    counts = Counts(num_tokens=tokens, num_rows=len(scored))
    result = weight_columns(scored, counts, Aggregation.token_mean)
    if head is Head.lm:
        result |= {"advantages": torch.randn(tokens), "rollout_log_probs": -torch.rand(tokens)}
    else:
        result |= {"returns": torch.randn(tokens), "old_values": torch.randn(tokens)}
    return result


def with_images(ids: Tensor, lengths: Tensor) -> list[tuple[ImageReference, ...]]:
    """An image in each of the last two rows, whose tokens are written into `ids`."""
    from PIL import Image

    height, width = IMAGE_SIZE
    tokens = height * width // (PATCH * MERGED) ** 2
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    image = ImageReference(encoded=buffer.getvalue())
    result: list[tuple[ImageReference, ...]] = [()] * len(lengths)
    ends = torch.cumsum(lengths, 0)
    for row in (len(lengths) - 2, len(lengths) - 1):
        begin = int(ends[row] - lengths[row]) + 1
        ids[begin] = IMAGE_BEGIN
        ids[begin + 1 : begin + 1 + tokens] = IMAGE
        ids[begin + 1 + tokens] = IMAGE_END
        result[row] = (image,)
    return result


def turns(lengths: Tensor, scored: Tensor) -> Tensor:
    """Which tokens are scored: two turns in each row, four tokens of an environment between them."""
    mask = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    for end, count in zip(torch.cumsum(lengths, 0).tolist(), scored.tolist(), strict=True):
        half = count // 2
        mask[end - half : end] = True
        mask[end - half - 4 - (count - half) : end - half - 4] = True
    return mask
