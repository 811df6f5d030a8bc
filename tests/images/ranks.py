"""What the two processes of test_ranks.py do, and rows of benchmarks.scale: an engine on its rows of the
example."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridflow.context import RankContext
from tests.images.plain import TEMPERATURE, make_rows
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, Outputs
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences

WORLD = 2
ROWS = ([1, 2, 3, 4], [0, 5])
"""Those of each data rank of two; the second one's have no image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Case(engine="threed", settings={"pp": 2})"""

    engine: str = "fsdp"
    family: str = "qwen2_5_vl"
    settings: dict[str, Any] = field(default_factory=dict)


def loss_fn(outputs: Outputs, rows: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    assert outputs.log_probs is not None
    return (outputs.log_probs * rows.per_token["weights"]).sum(), {}


def make_engine(
    path: Path, context: RankContext, *, engine: str = "fsdp", **settings: Any
) -> ShardedEngine:
    made = engine_class(engine)(
        model=ModelConfig(path=str(path)),
        config=TrainConfig(engine=engine, **settings),
        head=Head.lm,
        context=context,
    )
    assert isinstance(made, ShardedEngine)
    return made


def own_rows(engine: ShardedEngine, rank: int) -> list[int]:
    """The rows of a rank: all where there is one data rank."""
    if engine.layout.axis_size("dp") == 1:
        return [*ROWS[0], *ROWS[1]]
    return ROWS[engine.layout.coordinates(rank)["dp"]]


def two_steps(path: Path, context: RankContext, case: Case) -> list[Any]:
    """Metrics of two steps on the rank's rows of the example, with the number of images whose pixels it
    made."""
    engine = make_engine(
        path / case.family,
        context,
        engine=case.engine,
        precision=Precision.fp32,
        optimizer=OptimizerConfig(learning_rate=5e-3, epsilon=1e-3),
        **case.settings,
    )
    mine = make_rows(path / case.family)[0].rows(own_rows(engine, context.rank))
    steps = []
    for _ in range(2):
        metrics = engine.train_step(mine, loss_fn, temperature=TEMPERATURE)
        inputs = engine._cutting.images
        assert inputs is not None
        steps.append({**metrics, "images": len(inputs._images._pixels)})
    return steps


def run(rank: int, root: Path, path: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD)
    context = RankContext(rank=rank, world_size=WORLD)
    results = [two_steps(path, context, case) for case in cases]
    torch.save(results, root / f"{rank}.pt")
    dist.destroy_process_group()
