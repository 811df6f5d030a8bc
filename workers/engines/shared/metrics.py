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

from workers.engines.shared.gather import gather_objects


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
    added = {name: value.detach().double() for name, value in {"loss": loss, **parts}.items()}
    return combine_metrics(metrics, added)


def counted_once(
    loss: Tensor, parts: Mapping[str, Tensor], counts: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and metrics of a micro-batch that several ranks computed alike, for the one that
    `counts`; sums of 0 for the others."""
    if counts:
        return loss, dict(parts)
    shares = {}
    for name, value in parts.items():
        is_sum = not name.endswith(("_max", "_min"))
        shares[name] = torch.zeros_like(value) if is_sum else value
    return torch.zeros_like(loss), shares


def metrics_of_group(metrics: Mapping[str, Tensor], group: ProcessGroup | None) -> dict[str, float]:
    """Metrics of all ranks of `group` (None: all), combined in rank order on every rank by one
    small collective; for ranks that have the same names."""
    names = sorted(metrics)
    local = torch.stack([metrics[name] for name in names])
    every = local
    if dist.get_world_size(group) > 1:
        every = local.new_empty(dist.get_world_size(group) * len(names))
        dist.all_gather_single(every, local, group=group)
    total: dict[str, Tensor] = {}
    for numbers in every.cpu().view(-1, len(names)):
        total = combine_metrics(total, dict(zip(names, numbers, strict=True)))
    return {name: float(total[name]) for name in metrics}


def metrics_of_some(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The same over all ranks where only some have metrics, and others do not know their names."""
    total: dict[str, Tensor] = {}
    # One copy to the host.
    values_here = torch.stack(list(metrics.values())).cpu().tolist() if metrics else []
    for numbers in gather_objects(dict(zip(metrics, values_here, strict=True))):
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        total = combine_metrics(total, dict(zip(numbers, values, strict=True)))
    return {name: float(value) for name, value in total.items()}
