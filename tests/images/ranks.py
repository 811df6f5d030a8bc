"""What the two processes of test_ranks.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybridflow.context import RankContext
from tests.images.plain import TEMPERATURE, make_rows
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines.base import Head, Outputs
from workers.engines.fsdp.engine import FsdpEngine
from workers.sequences import Sequences

WORLD = 2
ROWS = ([1, 2, 3, 4], [0, 5])
"""Those of each rank; the second one's have no image."""


def loss_fn(outputs: Outputs, rows: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    assert outputs.log_probs is not None
    return (outputs.log_probs * rows.per_token["weights"]).sum(), {}


def two_steps(path: Path, context: RankContext, rows: list[int], **settings: Any) -> list[Any]:
    """Metrics of two steps on these rows of the example."""
    optimizer = OptimizerConfig(learning_rate=5e-3, epsilon=1e-3)
    config = TrainConfig(precision=Precision.fp32, optimizer=optimizer, **settings)
    engine = FsdpEngine(
        model=ModelConfig(path=str(path)), config=config, head=Head.lm, context=context
    )
    mine = make_rows(path)[0].rows(rows)
    return [engine.train_step(mine, loss_fn, temperature=TEMPERATURE) for _ in range(2)]


def run(rank: int, root: Path, path: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD)
    context = RankContext(rank=rank, world_size=WORLD)
    results = [two_steps(path, context, ROWS[rank], **settings) for settings in cases]
    torch.save(results, root / f"{rank}.pt")
    dist.destroy_process_group()
