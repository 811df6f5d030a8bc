"""What the two processes of test_ranks.py do: all cases in one go."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engines.fsdp_workers import data_rows, gathered
from tests.engines.threed_cases import TEMPERATURE, loss_fn
from tests.experts.engines import make_engine, routes_and_replay_gap, rows_with_a_shared_prompt
from tests.ranks import worlds

WORLD = 2
COEFFICIENT = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a file name."""

    engine: str = "fsdp"
    family: str = "qwen3_moe"
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        flags = [f"{name}{value}" for name, value in self.settings]
        return "-".join([self.engine, self.family, *flags])


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    metrics: dict[str, float]
    """Of a step with the auxiliary loss."""
    replayed: dict[str, float]
    """Of a step with routes that were recorded before."""
    routes: Tensor
    """Of the rank's rows, before the first step."""
    rows: Tensor
    replay_gap: float
    """The largest difference of a token's log-prob between a pass and its replay."""
    step_s: float
    """Seconds of the step that replays."""
    parameters: dict[str, Tensor]
    """After the first step, from the boxes of all ranks."""


def run(rank: int, root: Path, cases: list[Case]) -> None:
    for _ in worlds(rank, root, (WORLD,)):
        for case in cases:
            torch.save(train(rank, root, case), root / f"{case.name}.{rank}.pt")


def train(rank: int, root: Path, case: Case) -> Result:
    engine = make_engine(
        root / case.family,
        rank,
        WORLD,
        engine=case.engine,
        micro_batch_tokens=40,
        router_aux_loss_coefficient=COEFFICIENT,
        **dict(case.settings),
    )
    batch = rows_with_a_shared_prompt()
    layout = engine.layout
    rows = data_rows(batch.num_rows, layout.axis_size("dp"), layout.coordinates(rank)["dp"])
    mine = batch.rows(rows)
    routes, replay_gap = routes_and_replay_gap(engine, mine)
    known = replace(mine, routes=routes)
    metrics = engine.train_step(mine, loss_fn, entropy=True, temperature=TEMPERATURE)
    parameters = gathered(engine)
    started = time.perf_counter()
    replayed = engine.train_step(known, loss_fn, entropy=True, temperature=TEMPERATURE)
    return Result(
        metrics=metrics,
        replayed=replayed,
        routes=routes,
        rows=rows,
        replay_gap=replay_gap,
        step_s=time.perf_counter() - started,
        parameters=parameters,
    )
