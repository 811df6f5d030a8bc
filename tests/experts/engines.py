"""Engines on tiny mixtures, in one process or as one rank of several, and rows for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridflow.context import RankContext
from tests.engines.threed_cases import TEMPERATURE, make_sequences
from tests.experts.plain import OPTIMIZER
from workers.config import ModelConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences


def make_engine(path: Path, rank: int = 0, world: int = 1, **settings: Any) -> ShardedEngine:
    config = TrainConfig(precision=Precision.fp32, optimizer=OPTIMIZER, **settings)
    engine = engine_class(config.engine)(
        model=ModelConfig(path=str(path)),
        config=config,
        head=Head.lm,
        context=RankContext(rank=rank, world_size=world),
    )
    assert isinstance(engine, ShardedEngine)
    return engine


def routes_and_replay_gap(engine: ShardedEngine, batch: Sequences) -> tuple[Tensor, float]:
    """The routes of a pass, and the largest difference of a token's log-prob when they are
    replayed."""
    outputs = engine.forward(batch, temperature=TEMPERATURE, routes=True)
    assert outputs is not None and outputs.routes is not None
    again = engine.forward(replace(batch, routes=outputs.routes), temperature=TEMPERATURE)
    if again is None or again.log_probs is None or not len(again.log_probs):
        return outputs.routes, 0.0
    assert outputs.log_probs is not None
    return outputs.routes, float((again.log_probs - outputs.log_probs).abs().max())


def rows_with_a_shared_prompt() -> Sequences:
    """Rows of many lengths, of which three begin alike."""
    batch = make_sequences(10, 0)
    tokens = list(batch.token_ids.split(batch.lengths.tolist()))
    first = int(batch.prompt_lengths[0])
    group = torch.cat([tokens[0][:first], torch.tensor([5, 9, 11])])
    other = torch.cat([tokens[0][:first], torch.tensor([7])])
    lengths = torch.cat([batch.lengths, torch.tensor([len(group), len(other)])])
    scored = torch.cat([batch.scored_lengths, torch.tensor([3, 1])])
    total = int(scored.sum())
    generator = torch.Generator().manual_seed(3)
    return Sequences(
        token_ids=torch.cat([*tokens, group, other]),
        lengths=lengths,
        scored_lengths=scored,
        per_token={"weights": torch.randn(total, generator=generator) / total},
        per_row={"targets": torch.zeros(len(lengths))},
    )
