"""What the spawned processes of test_context_parallel.py do: all cases in one go, because starting
processes is slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.context import RankContext
from tests.engines.context_losses import LENGTHS, NUMBERS, loss_of, make_batch
from tests.engines.fsdp_workers import data_rows, gathered, groups_per_layer
from tests.engines.threed_cases import TEMPERATURE
from tests.ranks import worlds
from workers.config import (
    ContextExchange,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_grad_norm=0.5, epsilon=1e-4)
"""With this epsilon rounding of a gradient is not blown up where a weight has next to no
gradient."""
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a file name."""

    world_size: int = 2
    cp: int = 2
    tp: int = 1
    pp: int = 1
    engine: str = "fsdp"
    model: str = "llama"
    head: Head = Head.lm
    loss: str = NUMBERS
    exchange: ContextExchange = ContextExchange.auto
    micro_batch_tokens: int = 1000
    """Of a rank."""
    num_rows: int = len(LENGTHS)
    zero3: bool = False
    lora: bool = False
    layered: bool = False
    """A group per layer, as a large model has."""
    checkpointing: bool = False
    by_length: bool = False

    @property
    def name(self) -> str:
        flags = []
        for word, on in (
            ("zero3", self.zero3),
            ("layered", self.layered),
            ("ac", self.checkpointing),
            ("by-length", self.by_length),
            ("lora", self.lora),
        ):
            if on:
                flags.append(word)
        sizes = f"w{self.world_size}c{self.cp}t{self.tp}p{self.pp}"
        parts = [self.engine, sizes, self.model, self.head.value, self.loss, self.exchange.value]
        return "-".join([*parts, f"m{self.micro_batch_tokens}r{self.num_rows}", *flags])


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    data: int
    outputs: Outputs | None
    """Before the first step, of its own rows."""
    whole: dict[str, Tensor]
    """Parameters after the last step."""
    metrics: list[dict[str, float]] = field(default_factory=list)


def batches(case: Case) -> list[Sequences]:
    """Other tokens in every step."""
    return [make_batch(case.num_rows, seed, case.loss) for seed in range(NUM_STEPS)]


def run_worlds(rank: int, root: Path, cases: list[Case]) -> None:
    """Worlds of 4, 3 and 2 ranks one after the other in the same processes."""
    for world_size in worlds(rank, root, (4, 3, 2)):
        for case in cases:
            if case.world_size == world_size:
                torch.save(train(rank, root, case), root / f"{case.name}.{rank}.pt")


def make_engine(rank: int, root: Path, case: Case) -> TrainingEngine:
    config = TrainConfig(
        engine=case.engine,
        cp=case.cp,
        tp=case.tp,
        pp=case.pp,
        cp_exchange=case.exchange,
        cp_by_length=case.by_length,
        precision=Precision.fp32,
        micro_batch_tokens=case.micro_batch_tokens,
        activation_checkpointing=case.checkpointing,
        reshard_after_forward=case.zero3,
        zero_stage=3 if case.zero3 else 2,
        lora=LoraConfig(rank=4 if case.lora else 0),
        optimizer=OPTIMIZER,
    )
    with groups_per_layer(case.layered):
        return engine_class(case.engine)(
            model=ModelConfig(path=str(root / case.model), new_head=True),
            config=config,
            head=case.head,
            context=RankContext(rank=rank, world_size=case.world_size),
        )


def rows_of_rank(engine: TrainingEngine, rank: int, batch: Sequences) -> Sequences:
    """A data rank's rows; the ranks of one row group have the same."""
    size, data = engine.layout.axis_size("dp"), engine.layout.coordinates(rank)["dp"]
    return batch.rows(data_rows(batch.num_rows, size, data))


def train(rank: int, root: Path, case: Case) -> Result:
    engine = make_engine(rank, root, case)
    mine = [rows_of_rank(engine, rank, batch) for batch in batches(case)]
    outputs = engine.forward(mine[0], entropy=True, temperature=TEMPERATURE)
    metrics = [take_step(engine, case, batch) for batch in mine]
    data = engine.layout.coordinates(rank)["dp"]
    return Result(data=data, outputs=outputs, whole=gathered(engine), metrics=metrics)


def take_step(engine: TrainingEngine, case: Case, rows: Sequences) -> dict[str, float]:
    return engine.train_step(rows, loss_of(case.loss), entropy=True, temperature=TEMPERATURE)


def resume_elsewhere(rank: int, root: Path, cases: list[tuple[Case, Case]]) -> None:
    """Two steps in one layout, and the third one there and in another from the checkpoint."""
    for _ in worlds(rank, root, (cases[0][0].world_size,)):
        for number, (first, second) in enumerate(cases):
            engine = make_engine(rank, root, first)
            rows = [rows_of_rank(engine, rank, batch) for batch in batches(first)]
            for batch in rows[:2]:
                take_step(engine, first, batch)
            engine.save(root / f"{number}.checkpoint")
            dist.barrier()
            results = [_third_step(engine, rank, first)]
            engine = make_engine(rank, root, second)
            engine.load(root / f"{number}.checkpoint")
            results.append(_third_step(engine, rank, second))
            torch.save(results, root / f"{number}.{rank}.pt")


def _third_step(engine: TrainingEngine, rank: int, case: Case) -> Result:
    metrics = take_step(engine, case, rows_of_rank(engine, rank, batches(case)[2]))
    data = engine.layout.coordinates(rank)["dp"]
    return Result(data=data, outputs=None, whole=gathered(engine), metrics=[metrics])
