"""What the spawned processes of test_context_parallel.py do: all cases in one go, because starting
processes is slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.context import RankContext
from tests.engines.fsdp_workers import data_rows, gathered
from tests.engines.threed_cases import TEMPERATURE, VOCABULARY, loss_fn
from workers.config import ContextExchange, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.engines.fsdp import sharding
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_grad_norm=0.5, epsilon=1e-4)
"""With this epsilon rounding of a gradient is not blown up where a weight has next to no
gradient."""
NUM_STEPS = 3
LENGTHS = (97, 31, 12, 9, 9, 9, 5, 3, 2, 1)
"""The rows of 9 tokens are responses to one prompt."""
SCORED = (60, 13, 11, 3, 4, 5, 0, 1, 1, 0)


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
    exchange: ContextExchange = ContextExchange.auto
    micro_batch_tokens: int = 1000
    """Of a rank."""
    num_rows: int = len(LENGTHS)
    zero3: bool = False
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
        ):
            if on:
                flags.append(word)
        sizes = f"w{self.world_size}c{self.cp}t{self.tp}p{self.pp}"
        parts = [self.engine, sizes, self.model, self.head.value, self.exchange.value]
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
    """Ragged rows, three of which begin with one prompt; other tokens in every step."""
    return [_batch(case.num_rows, seed) for seed in range(NUM_STEPS)]


def _batch(num_rows: int, seed: int) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS[:num_rows])
    scored = torch.tensor(SCORED[:num_rows])
    rows = [torch.randint(3, VOCABULARY, (size,), generator=generator) for size in lengths.tolist()]
    for row in range(4, min(6, num_rows)):
        rows[row][:4] = rows[3][:4]
    num_scored = int(scored.sum())
    return Sequences(
        token_ids=torch.cat(rows),
        lengths=lengths,
        scored_lengths=scored,
        per_token={"weights": torch.randn(num_scored, generator=generator) / num_scored},
        per_row={"targets": torch.randn(num_rows, generator=generator)},
    )


def run_worlds(rank: int, root: Path, cases: list[Case]) -> None:
    """Worlds of 4 and 2 ranks one after the other in the same processes."""
    torch.set_num_threads(1)
    for world_size in (4, 2):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{root}/store{world_size}", rank=rank, world_size=world_size
        )
        for case in cases:
            if case.world_size == world_size:
                torch.save(train(rank, root, case), root / f"{case.name}.{rank}.pt")
        dist.destroy_process_group()


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
        optimizer=OPTIMIZER,
    )
    one_group_bytes = sharding.ONE_GROUP_BYTES
    try:
        sharding.ONE_GROUP_BYTES = 0 if case.layered else one_group_bytes
        return engine_class(case.engine)(
            model=ModelConfig(path=str(root / case.model), new_head=True),
            config=config,
            head=case.head,
            context=RankContext(rank=rank, world_size=case.world_size),
        )
    finally:
        sharding.ONE_GROUP_BYTES = one_group_bytes


def rows_of_rank(engine: TrainingEngine, rank: int, batch: Sequences) -> Sequences:
    """A data rank's rows; the ranks of one row group have the same."""
    size, data = engine.layout.axis_size("dp"), engine.layout.coordinates(rank)["dp"]
    return batch.rows(data_rows(batch.num_rows, size, data))


def train(rank: int, root: Path, case: Case) -> Result:
    engine = make_engine(rank, root, case)
    mine = [rows_of_rank(engine, rank, batch) for batch in batches(case)]
    outputs = engine.forward(mine[0], entropy=True, temperature=TEMPERATURE)
    metrics = []
    for batch in mine:
        metrics.append(engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE))
    data = engine.layout.coordinates(rank)["dp"]
    return Result(data=data, outputs=outputs, whole=gathered(engine), metrics=metrics)
