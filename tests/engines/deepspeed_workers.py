"""What the spawned processes of test_deepspeed.py do: a world of two, then process 0 again as a
world of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridflow.context import RankContext
from hybridflow.resharding.shards import Box
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences
from tests.engines.threed_workers import OPTIMIZER
from tests.ranks import worlds
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.engines.deepspeed.engine import DeepspeedEngine
from workers.engines.shared.export import write_safetensors
from workers.sequences import Sequences

MICRO_BATCH_TOKENS = 36
NUM_BATCHES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a folder name."""

    stage: int
    world_size: int = 2
    model: str = "llama"
    head: Head = Head.lm
    precision: Precision = Precision.fp32
    checkpointing: bool = False
    offload: bool = False
    num_rows: int = 8
    packing: bool = True

    @property
    def name(self) -> str:
        flags = [
            word
            for word, on in (
                ("ac", self.checkpointing),
                ("off", self.offload),
                ("blocks", not self.packing),
            )
            if on
        ]
        return "-".join(
            [
                f"zero{self.stage}w{self.world_size}r{self.num_rows}",
                self.model,
                self.head.value,
                self.precision.value,
                *flags,
            ]
        )


RESUMED = Case(stage=2, model="qwen2")
"""Saves after two steps."""


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    outputs: dict[str, Tensor]
    """Before the first step, of its own rows."""
    shards: list[tuple[str, tuple[int, ...], list[Box]]]
    """The shard map's entries of this rank."""
    metrics: list[dict[str, float]] = field(default_factory=list)


def run(rank: int, root: Path, cases: list[Case]) -> None:
    """One process."""
    for world_size in worlds(rank, root, (2, 1)):
        for case in cases:
            if case.world_size == world_size:
                train(rank, root, case)
        if world_size == 2:
            forward_only(rank, root)
            save(rank, root)
        resume(rank, root, world_size)


def make_engine(case: Case, root: Path, rank: int, *, trains: bool = True) -> TrainingEngine:
    config = TrainConfig(
        engine="deepspeed",
        zero_stage=case.stage,
        precision=case.precision,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        packing=case.packing,
        activation_checkpointing=case.checkpointing,
        offload_optimizer=case.offload,
        optimizer=OPTIMIZER,
    )
    model = root / (case.model if case.head is Head.lm else f"{case.model}-{case.head.value}")
    context = RankContext(rank=rank, world_size=case.world_size)
    return DeepspeedEngine(
        model=ModelConfig(path=str(model), attention="sdpa"),
        config=config,
        head=case.head,
        context=context,
        trains=trains,
    )


def batches(case: Case) -> list[Sequences]:
    return [make_sequences(case.num_rows, seed) for seed in range(NUM_BATCHES)]


def own_rows(case: Case, batch: Sequences, rank: int) -> Sequences:
    """Uneven: rank 0 has the first five of seven rows."""
    rows = torch.arange(batch.num_rows)
    return (
        batch
        if case.world_size == 1
        else batch.rows(rows[rows % 7 < 5] if rank == 0 else rows[rows % 7 >= 5])
    )


def train(rank: int, root: Path, case: Case) -> None:
    """Outputs before training, three steps, the weights as a Hugging Face directory and as the
    shard map shows them."""
    engine = make_engine(case, root, rank)
    rows = [own_rows(case, batch, rank) for batch in batches(case)]
    outputs = named(engine.forward(rows[0], entropy=True, temperature=TEMPERATURE))
    shards = [
        (local.name, local.shape, [shard.box for shard in local.shards])
        for local in engine.local_parameters()
    ]
    result = Result(outputs=outputs, shards=shards)
    for number, batch in enumerate(rows):
        if number == 1:
            nothing_moves_when_a_step_fails(engine, batch)
        result.metrics.append(
            engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
        )
    folder = root / case.name
    engine.save_pretrained(folder)
    shards = folder / "shards"
    if rank == 0:
        shards.mkdir()
    parameters = engine.local_parameters()
    write_safetensors(parameters, shards, dtype=parameters[0].dtype)
    torch.save(result, folder / f"result{rank}.pt")


def named(outputs: Outputs | None) -> dict[str, Tensor]:
    assert outputs is not None
    columns = {
        "log_probs": outputs.log_probs,
        "entropy": outputs.entropy,
        "values": outputs.values,
        "scores": outputs.scores,
    }
    return {name: value for name, value in columns.items() if value is not None}


def nothing_moves_when_a_step_fails(engine: TrainingEngine, batch: Sequences) -> None:
    """Neither an infinite loss nor one that raises leaves anything behind: the steps after it
    are compared with a run without them."""

    def infinite(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_fn(outputs, sequences)
        return loss * torch.inf, metrics

    with pytest.raises(
        RuntimeError,
        match=r"grad_norm is nan: the gradient is not finite in (model\.|parameters of other)",
    ):
        engine.train_step(batch, infinite, entropy=True, temperature=TEMPERATURE)

    calls = 0

    def raises(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("advantages")
        return loss_fn(outputs, sequences)

    with pytest.raises(KeyError):
        engine.train_step(batch, raises, entropy=True, temperature=TEMPERATURE)


def forward_only(rank: int, root: Path) -> None:
    """A reference model: as good as one that trains, without an optimizer."""
    for stage in (2, 3):
        case = Case(stage=stage)
        rows = own_rows(case, batches(case)[0], rank)
        outputs = named(
            make_engine(case, root, rank, trains=False).forward(
                rows, entropy=True, temperature=TEMPERATURE
            )
        )
        torch.save(outputs, root / f"forward-{stage}-{rank}.pt")


def save(rank: int, root: Path) -> None:
    """A checkpoint of two ranks after two steps, and the third step."""
    engine = make_engine(RESUMED, root, rank)
    for batch in batches(RESUMED)[:2]:
        engine.train_step(
            own_rows(RESUMED, batch, rank), loss_fn, entropy=True, temperature=TEMPERATURE
        )
    engine.save(root / "checkpoint")
    third_step(engine, RESUMED, rank, root / "resumed-never")


def resume(rank: int, root: Path, world_size: int) -> None:
    """The third step: on the same ranks, under another stage, in bfloat16, on one rank, and on
    engine fsdp."""
    for stage in (2, 3):
        case = Case(stage=stage, world_size=world_size, model=RESUMED.model)
        engine = make_engine(case, root, rank)
        engine.load(root / "checkpoint")
        third_step(engine, case, rank, root / f"resumed-{stage}-{world_size}")
    if world_size == 2:
        case = Case(stage=1, model=RESUMED.model, precision=Precision.bf16)
        engine = make_engine(case, root, rank)
        engine.load(root / "checkpoint")
        third_step(engine, case, rank, root / "resumed-bf16")
    if world_size == 1:
        config = TrainConfig(
            engine="fsdp",
            precision=Precision.fp32,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            optimizer=OPTIMIZER,
        )
        model = ModelConfig(path=str(root / RESUMED.model), attention="sdpa")
        engine = engine_class("fsdp")(
            model=model, config=config, head=Head.lm, context=RankContext()
        )
        engine.load(root / "checkpoint")
        third_step(
            engine, Case(stage=2, world_size=1, model=RESUMED.model), rank, root / "resumed-fsdp"
        )


def third_step(engine: TrainingEngine, case: Case, rank: int, folder: Path) -> None:
    metrics = engine.train_step(
        own_rows(case, batches(case)[2], rank), loss_fn, entropy=True, temperature=TEMPERATURE
    )
    engine.save_pretrained(folder)
    if rank == 0:
        torch.save(metrics, folder / "metrics.pt")
