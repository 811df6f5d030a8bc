"""gather_objects: a Python value of every rank, on every rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_objects(local: T) -> list[T]:
    """[ranks of the default group]: what each rank gave, pickled on its way; collective."""
    gathered = [local] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return gathered
