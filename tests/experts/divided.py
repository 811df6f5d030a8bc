"""What the processes of test_expert_parallel.py do: all cases of all world sizes in one go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.resharding.shards import Box
from tests.engines.fsdp_workers import data_rows, gathered
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences
from tests.experts.engines import make_engine, routes_and_replay_gap, rows_with_a_shared_prompt
from tests.ranks import worlds
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences

COEFFICIENT = 0.3
WORLDS = (4, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a file name."""

    engine: str = "fsdp"
    family: str = "qwen3_moe"
    world: int = 4
    ep: int = 2
    settings: tuple[tuple[str, Any], ...] = ()
    resumes_on: int = 0
    """The third step runs from a snapshot again, on this ep."""

    @property
    def name(self) -> str:
        flags = [f"{name}{value}" for name, value in self.settings]
        return "-".join([self.engine, self.family, f"w{self.world}", f"ep{self.ep}", *flags])


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    rows: Tensor
    """Those of the first batch."""
    routes: Tensor
    """Of the rank's rows, before the first step."""
    replay_gap: float
    """The largest difference of a token's log-prob between a pass and its replay."""
    boxes: dict[str, list[Box]]
    """This rank's boxes."""
    parameters: dict[str, Tensor]
    """After the last step, from the boxes of all ranks."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Of steps with the auxiliary loss."""
    resumed: dict[str, float] = field(default_factory=dict)
    """Of the third step from a snapshot, on another layout."""
    resumed_parameters: dict[str, Tensor] = field(default_factory=dict)
    step_s: float = 0.0


def batches() -> list[Sequences]:
    """Many rows; fewer rows than ranks, so that some have none; one row of one token and another."""
    return [rows_with_a_shared_prompt(), make_sequences(3, 1), make_sequences(8, 2).rows([6, 7])]


def run(rank: int, root: Path, out: Path, cases: list[Case], backend: str = "gloo") -> None:
    """Worlds of 4 and 2 ranks one after the other in the same processes; models are in `root`."""
    sizes = [size for size in WORLDS if any(case.world == size for case in cases)]
    for world in worlds(rank, out, sizes, backend):
        for case in cases:
            if case.world == world:
                torch.save(train(rank, root, out, case), out / f"{case.name}.{rank}.pt")


def case_engine(root: Path, case: Case, rank: int) -> ShardedEngine:
    return make_engine(
        root / case.family,
        rank,
        case.world,
        engine=case.engine,
        ep=case.ep,
        micro_batch_tokens=40,
        router_aux_loss_coefficient=COEFFICIENT,
        **dict(case.settings),
    )


def rows_of(engine: ShardedEngine, batch: Sequences, rank: int) -> Tensor:
    layout = engine.layout
    return data_rows(batch.num_rows, layout.axis_size("dp"), layout.coordinates(rank)["dp"])


def step(engine: ShardedEngine, batch: Sequences, rank: int) -> dict[str, float]:
    mine = batch.rows(rows_of(engine, batch, rank))
    return engine.train_step(mine, loss_fn, entropy=True, temperature=TEMPERATURE)


def train(rank: int, root: Path, out: Path, case: Case) -> Result:
    engine = case_engine(root, case, rank)
    first, second, third = batches()
    rows = rows_of(engine, first, rank)
    mine = first.rows(rows)
    routes, replay_gap = routes_and_replay_gap(engine, mine)
    metrics = [step(engine, first, rank)]
    started = time.perf_counter()
    metrics.append(step(engine, second, rank))
    step_s = time.perf_counter() - started
    engine.save(out / f"{case.name}.snapshot")
    metrics.append(step(engine, third, rank))
    boxes = {}
    for parameter in engine.local_parameters():
        boxes[parameter.name] = [shard.box for shard in parameter.shards]
    result = Result(
        rows=rows,
        routes=routes,
        replay_gap=replay_gap,
        boxes=boxes,
        parameters=gathered(engine),
        metrics=metrics,
        step_s=step_s,
    )
    engine.save_pretrained(out / f"{case.name}.hf")
    if case.resumes_on:
        dist.barrier()
        other = case_engine(root, replace(case, ep=case.resumes_on), rank)
        other.load(out / f"{case.name}.snapshot")
        result.resumed = step(other, third, rank)
        result.resumed_parameters = gathered(other)
    return result
