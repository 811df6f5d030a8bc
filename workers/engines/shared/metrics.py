"""Metrics of a mini-batch from those of its micro-batches and data ranks.

A name that ends in _max (_min) is combined by the maximum (minimum); every other metric is a sum
whose weights hold the global normalisation, and is added, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def combine_metrics(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of two parts of a mini-batch as those of both. A part that never called the loss has
    none ({}), and changes nothing.
    """
    combined = {**left}
    for name, value in right.items():
        if name not in left:
            combined[name] = value
        elif name.endswith("_max"):
            combined[name] = torch.maximum(left[name], value)
        elif name.endswith("_min"):
            combined[name] = torch.minimum(left[name], value)
        else:
            combined[name] = left[name] + value
    return combined


def add_micro_batch(
    metrics: Mapping[str, Tensor], loss: Tensor, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`metrics` and those of one more micro-batch: its loss and what the loss function measured."""
    own = {name: value.detach().double() for name, value in {"loss": loss, **parts}.items()}
    return combine_metrics(metrics, own)


def metrics_of_group(metrics: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, float]:
    """Metrics of all ranks of `group` (None: all), combined in rank order on every rank by one
    small collective; for ranks that have the same names."""
    names = sorted(metrics)
    own = torch.stack([metrics[name] for name in names])
    every = own.new_empty(dist.get_world_size(group) * len(names))
    dist.all_gather_single(every, own, group=group)
    total: dict[str, Tensor] = {}
    for numbers in every.cpu().view(-1, len(names)):
        total = combine_metrics(total, dict(zip(names, numbers, strict=True)))
    return {name: float(total[name]) for name in metrics}


def metrics_of_some(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The same over all ranks where only some have metrics, and others do not know their names."""
    everywhere: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, {name: float(value) for name, value in metrics.items()})
    total: dict[str, Tensor] = {}
    for numbers in everywhere:
        part = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        total = combine_metrics(total, part)
    return {name: float(value) for name, value in total.items()}
