"""What the spawned processes of test_threed.py do: one function runs all cases of all world
sizes, because starting processes is slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.context import RankContext
from tests.engines.split_families import split_differences
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences
from tests.ranks import worlds
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.engines.model.log_probs import head_log_probs
from workers.engines.shared.export import write_safetensors
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, epsilon=1e-4, weight_decay=0.1, clip_grad_norm=0.5)
"""A large epsilon: with 1e-8, AdamW makes a whole step of a gradient that is rounding noise,
and no two summation orders agree."""
MICRO_BATCH_TOKENS = 36
NUM_BATCHES = 3
Job = tuple[str, Any]
"""Name of a function of JOBS, and its argument."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One layout on one model; name is unique and a folder name."""

    p: int = 1
    t: int = 1
    d: int = 1
    virtual: int = 1
    order: str = "dp pp cp tp"
    model: str = "llama"
    head: Head = Head.lm
    checkpointing: bool = False
    num_rows: int = 8
    precision: Precision = Precision.fp32
    offload: bool = False
    packing: bool = True
    engine: str = "threed"

    @property
    def name(self) -> str:
        extras = [
            self.order.replace(" ", ""),
            self.model,
            self.head.value,
            self.precision.value,
            f"rows{self.num_rows}",
        ]
        flags = [
            word
            for word, on in (
                ("ac", self.checkpointing),
                ("blocks", not self.packing),
                (self.engine, self.engine != "threed"),
            )
            if on
        ]
        return "-".join([f"p{self.p}t{self.t}d{self.d}v{self.virtual}", *extras, *flags])

    @property
    def world_size(self) -> int:
        return self.p * self.t * self.d


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    data: int
    """Its data coordinate."""
    outputs: dict[str, Tensor] | None
    """Before the first step, of its own rows; None off the last stage."""
    metrics: list[dict[str, float]] = field(default_factory=list)


def run_worlds(
    rank: int, root: Path, jobs: list[tuple[int, list[Job]]], backend: str = "gloo"
) -> None:
    """Worlds of several sizes, each with its jobs (the name of a function below and its argument),
    which all ranks run in order."""
    by_size = dict(jobs)
    for world_size in worlds(rank, root, list(by_size), backend):
        for name, argument in by_size[world_size]:
            JOBS[name](rank, root, argument)


def make_engine(case: Case, root: Path, rank: int) -> TrainingEngine:
    config = TrainConfig(
        engine=case.engine,
        tp=case.t,
        pp=case.p,
        rank_order=case.order.split(),
        precision=case.precision,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        packing=case.packing,
        activation_checkpointing=case.checkpointing,
        pipeline_schedule="interleaved_1f1b" if case.virtual > 1 else "1f1b",
        virtual_stages=case.virtual,
        offload_optimizer=case.offload,
        optimizer=OPTIMIZER,
    )
    model = root / (case.model if case.head is Head.lm else f"{case.model}-{case.head.value}")
    context = RankContext(rank=rank, world_size=case.world_size)
    return engine_class(case.engine)(
        model=ModelConfig(path=str(model), attention="sdpa"),
        config=config,
        head=case.head,
        context=context,
    )


def own_rows(case: Case, batch: Sequences, data: int) -> Sequences:
    """Every d-th row: uneven, and nothing for the last data ranks of a small batch."""
    return batch.rows(torch.arange(batch.num_rows)[data :: case.d])


def batches(case: Case) -> list[Sequences]:
    return [make_sequences(case.num_rows, seed) for seed in range(NUM_BATCHES)]


def train(rank: int, root: Path, case: Case) -> None:
    """Outputs before training, three steps, the weights as a Hugging Face directory and as the
    shard map shows them."""
    engine = make_engine(case, root, rank)
    data = engine.layout.coordinates(rank)["dp"]
    rows = [own_rows(case, batch, data) for batch in batches(case)]
    outputs = engine.forward(rows[0], entropy=True, temperature=TEMPERATURE)
    found = None
    if outputs is not None:
        named = {
            "log_probs": outputs.log_probs,
            "entropy": outputs.entropy,
            "values": outputs.values,
            "scores": outputs.scores,
        }
        found = {name: value for name, value in named.items() if value is not None}
    result = Result(data=data, outputs=found)
    for batch in rows:
        result.metrics.append(
            engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
        )
    folder = root / case.name
    engine.save_pretrained(folder)
    shards = folder / "shards"
    if rank == 0:
        shards.mkdir()
    parameters = engine.local_parameters()
    write_safetensors(parameters, shards, max_file_bytes=20_000, dtype=parameters[0].dtype)
    torch.save(result, folder / f"result{rank}.pt")


def save_and_resume(rank: int, root: Path, cases: list[Case]) -> None:
    """Two steps on the first layout, then the third step there and, from the checkpoint, on
    every layout of `cases` and on engine fsdp."""
    first = cases[0]
    engine = make_engine(first, root, rank)
    for batch in batches(first)[:2]:
        engine.train_step(
            own_rows(first, batch, engine.layout.coordinates(rank)["dp"]),
            loss_fn,
            entropy=True,
            temperature=TEMPERATURE,
        )
    engine.save(root / "checkpoint")
    _third_step(engine, first, rank, root / "resumed-never")
    for number, case in enumerate(cases):
        engine = make_engine(case, root, rank)
        engine.load(root / "checkpoint")
        _third_step(engine, case, rank, root / f"resumed-{number}")
    other = Case(t=2, d=first.world_size // 2, model=first.model)
    config = TrainConfig(
        engine="fsdp",
        tp=2,
        precision=other.precision,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        optimizer=OPTIMIZER,
    )
    context = RankContext(rank=rank, world_size=other.world_size)
    model = ModelConfig(path=str(root / other.model), attention="sdpa")
    sharded = engine_class("fsdp")(model=model, config=config, head=other.head, context=context)
    sharded.load(root / "checkpoint")
    _third_step(sharded, other, rank, root / "resumed-fsdp")


def _third_step(engine: TrainingEngine, case: Case, rank: int, folder: Path) -> None:
    rows = own_rows(case, batches(case)[2], engine.layout.coordinates(rank)["dp"])
    metrics = engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)
    engine.save_pretrained(folder)
    if rank == 0:
        torch.save(metrics, folder / "metrics.pt")


def vocabulary(rank: int, root: Path, precision: Precision) -> None:
    """log-probs, entropies and the gradient of this rank's logits, of the table that
    vocabulary_table makes."""
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    logits, targets = vocabulary_table()
    own = logits.to(dtype).chunk(dist.get_world_size(), dim=-1)[rank].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    log_probs, entropy = head_log_probs(
        own,
        None,
        None,
        targets,
        temperature=0.7,
        entropy=True,
        group=group,
        first_token=rank * own.shape[-1],
    )
    assert entropy is not None
    (log_probs.sin().sum() + entropy.square().sum()).backward()
    torch.save(
        (log_probs.detach(), entropy.detach(), own.grad),
        root / f"vocabulary-{precision.value}-{rank}.pt",
    )


def vocabulary_table() -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocab] far from 0, so that a missing maximum would overflow, and targets."""
    generator = torch.Generator().manual_seed(3)
    return 40.0 * torch.randn(17, 64, generator=generator) + 200.0, torch.randint(
        0, 64, (17,), generator=generator
    )


JOBS: dict[str, Callable[[int, Path, Any], None]] = {
    "train": train,
    "save_and_resume": save_and_resume,
    "vocabulary": vocabulary,
    "split": split_differences,
}
