"""Which layouts engine deepspeed has: all ranks are data ranks. Needs no DeepSpeed, so that settings can be
checked without it."""

from __future__ import annotations

from hybridflow.layout import Layout
from workers.config import TrainConfig


def make_layout(config: TrainConfig, world_size: int) -> Layout:
    """dp over the pool; ValueError for what ZeRO does not do here."""
    for axis, size in (("pp", config.pp), ("tp", config.tp)):
        if size != 1:
            raise ValueError(
                f"train.{axis} is {size}, but engine deepspeed is data parallel only; set {axis}=1 or "
                "engine=threed"
            )
    if config.zero_stage not in (1, 2, 3):
        raise ValueError(
            f"train.zero_stage is {config.zero_stage}; use 1 (optimizer), 2 (and gradients) or 3 (and "
            "weights)"
        )
    return Layout.of(order=tuple(config.rank_order), dp=world_size)
