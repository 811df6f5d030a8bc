"""Parts of parameters that lie in flat buffers, as boxes: for snapshots and shard maps.

A data rank owns ranges of flattened parameters. A range is at most a few boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from hybridflow.resharding.boxes import flat_range_boxes
from hybridflow.resharding.shards import Box, LocalParameter


def flat_views(
    shape: tuple[int, ...], begin: int, end: int, flat: Tensor
) -> Iterator[tuple[Box, Tensor]]:
    """Elements begin..end-1 of a flattened tensor of `shape`, which lie in `flat` from its
    start on, as boxes and views of `flat`."""
    for box in flat_range_boxes(shape, begin, end):
        yield box, flat[: box.numel].view(box.shape)
        flat = flat[box.numel :]


def named(prefix: str, parameters: Sequence[LocalParameter]) -> list[LocalParameter]:
    """The same shards as a snapshot names them: PREFIX.NAME."""
    return [replace(parameter, name=f"{prefix}.{parameter.name}") for parameter in parameters]
