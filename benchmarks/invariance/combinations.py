"""The ways in which benchmarks.invariance cuts a step: engines, layouts, micro-batches and
placements."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.invariance import case

ALGORITHMS = ("ppo", "grpo", "gspo", "safe_rlhf")
SMALL, LARGE = 48, 8192
"""Tokens of a micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """How one step is cut."""

    algorithm: str
    engine: str = "fsdp"
    layout: str = "1 rank"
    train: tuple[str, ...] = ()
    """Settings of every model's `train` that make the layout."""
    num_devices: int = 1
    micro_batch_tokens: int = LARGE
    placement: str = "local"
    """local (one process), colocated (one pool) or split (actor and reference apart from the
    rest)."""

    def settings(self) -> list[str]:
        roles = ("reference", *case.TRAINED[self.algorithm])
        chosen = (
            f"engine={self.engine}",
            f"micro_batch_tokens={self.micro_batch_tokens}",
            *self.train,
        )
        models: list[str] = []
        for role in roles:
            models += [f"{role}.train.{setting}" for setting in chosen]
        if self.placement == "local":
            return [*models, "runtime=local"]
        if self.placement == "colocated":
            return [*models, f"num_devices={self.num_devices}"]
        others = [*case.TRAINED[self.algorithm][1:], "reward"]
        return [
            *models,
            "placement=custom",
            f"pools.policy.num_devices={self.num_devices}",
            "pools.policy.roles=[actor,reference]",
            "pools.rest.num_devices=1",
            f"pools.rest.roles=[{','.join(others)}]",
        ]


def combinations(algorithm: str) -> list[Combination]:
    """In one process: engines and micro-batches. On two and four ranks: layouts and placements."""

    def make(
        engine: str, layout: str, tokens: int, *train: str, ranks: int = 1, placement: str = ""
    ) -> Combination:
        if not placement:
            placement = "local" if ranks == 1 else "colocated"
        return Combination(
            algorithm=algorithm,
            engine=engine,
            layout=layout,
            train=train,
            num_devices=ranks,
            micro_batch_tokens=tokens,
            placement=placement,
        )

    zero1, zero2, zero3 = (f"zero_stage={stage}" for stage in (1, 2, 3))
    grid = {
        "ppo": [
            make("fsdp", "1 rank", LARGE),
            make("fsdp", "1 rank", SMALL),
            make("fsdp", "1 rank, blocks", SMALL, "packing=false"),
            make("threed", "1 rank", SMALL),
            make("deepspeed", "zero1, 1 rank", LARGE, zero1),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("fsdp", "dp2", SMALL, ranks=2),
            make("fsdp", "dp2, resharded", LARGE, "reshard_after_forward=true", ranks=2),
            make("fsdp", "tp2", LARGE, "tp=2", ranks=2),
            make("fsdp", "cp2", LARGE, "cp=2", ranks=2),
            make("fsdp", "dp2 cp2 by length", SMALL, "cp=2", "cp_by_length=true", ranks=4),
            make("threed", "pp2", SMALL, "pp=2", ranks=2),
            make("threed", "pp2, blocks", SMALL, "pp=2", "packing=false", ranks=2),
            make("threed", "pp2 tp2", LARGE, "pp=2", "tp=2", ranks=4),
            make("deepspeed", "zero2, dp2", LARGE, zero2, ranks=2),
            make("deepspeed", "zero3, dp2", SMALL, zero3, ranks=2),
            make("fsdp", "dp2", LARGE, ranks=2, placement="split"),
        ],
        "grpo": [
            make("fsdp", "1 rank", SMALL),
            make("threed", "1 rank", LARGE),
            make("deepspeed", "zero2, 1 rank", SMALL, zero2),
            make("fsdp", "dp2", LARGE, ranks=2),
            make("threed", "tp2", SMALL, "tp=2", ranks=2),
            make("deepspeed", "zero3, dp2", LARGE, zero3, ranks=2),
        ],
        "gspo": [
            make("fsdp", "1 rank", LARGE),
            make("threed", "1 rank", SMALL),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("threed", "pp2", LARGE, "pp=2", ranks=2),
            make("deepspeed", "zero1, dp2", SMALL, zero1, ranks=2),
        ],
        "safe_rlhf": [
            make("fsdp", "1 rank", SMALL),
            make("threed", "1 rank", LARGE),
            make("deepspeed", "zero3, 1 rank", SMALL, zero3),
            make("fsdp", "dp2", SMALL, ranks=2),
            make("deepspeed", "zero2, dp2", LARGE, zero2, ranks=2),
        ],
    }
    return grid[algorithm]
