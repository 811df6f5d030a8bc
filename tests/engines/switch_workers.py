"""What the spawned processes of the tests of an engine's switches do: the same three steps with and
without a switch (torch.compile, recomputation, offload, replicas, overlap), in worlds of several sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hybridflow.context import RankContext
from tests.engines.fsdp_workers import gathered, groups_per_layer
from tests.engines.threed_cases import TEMPERATURE, VOCABULARY, loss_fn
from tests.ranks import worlds
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.engines.model import compiling
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.engines.threed import optimizer
from workers.engines.threed.engine import ThreeDEngine
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, epsilon=1e-4, weight_decay=0.1, clip_grad_norm=0.5)
"""A large epsilon, so that rounding of a gradient of next to nothing makes no whole step."""
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run: Case(train={"compile": True}, world_size=2)."""

    name: str
    """A file name."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of TrainConfig."""
    world_size: int = 1
    model: str = "llama"
    head: Head = Head.lm
    layered: bool = False
    """Engine fsdp: a group per layer, as a large model has."""
    buckets: int = 25_000_000
    """Engine threed: elements of a group that is reduced by itself."""
    backend: str = "eager"
    """Of torch.compile: graphs are made, and run as they are."""


@dataclass(kw_only=True, slots=True)
class Result:
    """Numbers of rank 0."""

    log_probs: Tensor
    """Before the first step, of its own rows."""
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    """After the last step."""
    graphs: int = 0
    """Graphs that were compiled."""
    breaks: dict[str, int] = field(default_factory=dict)
    """Reasons why a graph ended, and how often."""
    groups: int = 0
    """Engine threed: groups that are reduced by themselves."""
    early: int = 0
    """Those whose reduction began before the backward passes of the last step ended."""


def run_worlds(rank: int, root: Path, cases: Iterable[Case]) -> None:
    """Worlds of the cases' sizes one after the other in the same processes."""
    listed = list(cases)
    sizes = sorted({case.world_size for case in listed}, reverse=True)
    for world_size in worlds(rank, root, sizes):
        for case in listed:
            if case.world_size == world_size:
                result = train(rank, root, case)
                if rank == 0:
                    torch.save(result, root / f"{case.name}.pt")


def make_engine(rank: int, root: Path, case: Case) -> TrainingEngine:
    options = {"micro_batch_tokens": 48, "optimizer": OPTIMIZER, **case.train}
    options["precision"] = Precision(options.get("precision", "fp32"))
    if "lora" in options:
        options["lora"] = LoraConfig(**options["lora"])
    config = TrainConfig(**options)
    model = ModelConfig(path=str(root / case.model), new_head=True)
    context = RankContext(rank=rank, world_size=case.world_size)
    with groups_per_layer(case.layered):
        return engine_class(config.engine)(
            model=model, config=config, head=case.head, context=context
        )


def batches() -> list[Sequences]:
    return [grouped_rows(seed) for seed in range(NUM_STEPS)]


def grouped_rows(seed: int) -> Sequences:
    """Four prompts of 3 to 8 tokens with three responses of 1 to 9 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    rows, scored = [], []
    for prompt_tokens in (8, 5, 3, 6):
        prompt = torch.randint(3, VOCABULARY, (prompt_tokens,), generator=generator)
        for _ in range(3):
            length = int(torch.randint(1, 10, (1,), generator=generator))
            response = torch.randint(3, VOCABULARY, (length,), generator=generator)
            rows.append(torch.cat([prompt, response]))
            scored.append(length)
    weights = torch.randn(sum(scored), generator=generator) / sum(scored)
    return Sequences(
        token_ids=torch.cat(rows),
        lengths=torch.tensor([len(row) for row in rows]),
        scored_lengths=torch.tensor(scored),
        per_token={"weights": weights},
        per_row={"targets": torch.randn(len(rows), generator=generator)},
    )


def own_rows(engine: TrainingEngine, batch: Sequences, rank: int) -> Sequences:
    """A data rank's rows: uneven numbers of prompts, and of the last of three or four none."""
    size, data = engine.layout.axis_size("dp"), engine.layout.coordinates(rank)["dp"]
    bounds = {1: [0, 12], 2: [0, 9, 12], 4: [0, 3, 6, 12, 12]}[size]
    return batch.rows(torch.arange(bounds[data], bounds[data + 1]))


def train(rank: int, root: Path, case: Case) -> Result:
    torch._dynamo.reset()
    counters.clear()
    compiling.BACKEND, optimizer.BUCKET_ELEMENTS = case.backend, case.buckets
    engine = make_engine(rank, root, case)
    assert isinstance(engine, ShardedEngine)
    rows = [own_rows(engine, batch, rank) for batch in batches()]
    outputs = engine.forward(rows[0], temperature=TEMPERATURE)
    metrics = []
    for batch in rows:
        metrics.append(engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE))
    log_probs = torch.empty(0)
    if outputs is not None and outputs.log_probs is not None:
        log_probs = outputs.log_probs
    groups, early = 0, 0
    if isinstance(engine, ThreeDEngine):
        groups, early = len(engine._share.groups), engine._optimizer.num_early
    return Result(
        groups=groups,
        early=early,
        log_probs=log_probs,
        metrics=metrics,
        weights=gathered(engine),
        graphs=counters["stats"]["unique_graphs"],
        breaks=dict(counters["graph_break"]),
    )
