"""Who has a pool's memory when (finding 11 of the GPU audit): with release_during_training no
training engine of any role runs while generation has its weights and its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.tiny import make_model
from workers.actor import ActorWorker
from workers.config import ModelConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.engines.base import LossFn, Outputs
from workers.engines.fsdp.engine import FsdpEngine
from workers.generation.base import Generations
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.hf import HfEngine
from workers.reference import ReferenceWorker
from workers.role_config import ActorConfig, CriticConfig, ReferenceConfig
from workers.sequences import Sequences

EVENTS: list[str] = []
"""What the engines did, in order."""


class WatchedGeneration(HfEngine):
    """Has memory that sleep frees, as vLLM has."""

    awake = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        EVENTS.append("generation built")

    def sleep(self) -> int:
        EVENTS.append("sleep")
        self.awake = False
        self.weight_version = -1
        return 1

    def wake(self) -> None:
        EVENTS.append("wake")
        self.awake = True

    def generate(self, *arguments: Any) -> Generations:
        assert self.awake
        EVENTS.append("generate")
        return super().generate(*arguments)


class WatchedTraining(FsdpEngine):
    def _build(self, *arguments: Any, **settings: Any) -> None:
        EVENTS.append(f"{self.head.value} built")
        super()._build(*arguments, **settings)

    def forward(self, sequences: Sequences, **settings: Any) -> Outputs:
        EVENTS.append(f"{self.head.value} forward")
        return super().forward(sequences, **settings)

    def train_step(
        self, sequences: Sequences, loss_fn: LossFn, **settings: Any
    ) -> dict[str, float]:
        EVENTS.append(f"{self.head.value} step")
        return super().train_step(sequences, loss_fn, **settings)

    def offload(self) -> None:
        EVENTS.append(f"{self.head.value} offload")
        super().offload()

    def onload(self) -> None:
        EVENTS.append(f"{self.head.value} onload")
        super().onload()


HERE = f"{__name__}:"


@pytest.fixture
def events() -> list[str]:
    EVENTS.clear()
    return EVENTS


def settings(path: Path, *, release: bool) -> ActorConfig:
    return ActorConfig(
        model=ModelConfig(path=str(path)),
        train=TrainConfig(engine=f"{HERE}WatchedTraining", precision=Precision.fp32),
        generation=GenerationConfig(
            engine=f"{HERE}WatchedGeneration",
            precision=Precision.fp32,
            release_during_training=release,
            sampling=SamplingConfig(max_response_tokens=3, greedy=True),
        ),
    )


def prompts() -> Batch:
    return Batch.of(
        prompt_ids=Ragged(torch.tensor([5, 6, 7]), torch.tensor([3])), uid=torch.tensor([0])
    )


@pytest.mark.parametrize("release", [True, False])
def test_no_role_computes_beside_an_awake_generation_engine(
    tmp_path: Path, events: list[str], release: bool
) -> None:
    path = make_model(tmp_path / "model", layers=1, heads=1, kv_heads=1)
    config = settings(path, release=release)
    with LocalPool(PoolSpec(name="main", num_devices=1)) as pool:
        actor = spawn(ActorWorker, pool, config, role="actor")
        critic = spawn(
            CriticWorker, pool, CriticConfig(model=config.model, train=config.train), role="critic"
        )
        reference = spawn(
            ReferenceWorker,
            pool,
            ReferenceConfig(model=config.model, train=config.train),
            role="reference",
        )
        for _ in range(2):
            batch = prompts()
            batch |= actor.generate_sequences(batch)
            batch |= critic.compute_values(batch)
            batch |= reference.compute_ref_log_prob(batch)
            values = batch.local(["values"]).ragged("values")
            zeros = Ragged(torch.zeros_like(values.values), values.lengths)
            batch |= Batch.of(returns=zeros, advantages=zeros)
            metrics = critic.update_critic(batch) | actor.update_actor(batch)
            assert metrics["critic/memory/peak_bytes"] > metrics["critic/memory/retained_bytes"]
            assert metrics["actor/memory/generation_peak_bytes"] > 0
    if not release:
        assert not {"sleep", "wake", "value offload"} & set(events)
        return
    # The engine takes its share of the device before the trainer is there (finding 13).
    assert events[:5] == ["generation built", "sleep", "lm built", "wake", "sleep"]
    awake = False
    for event in events[5:]:
        if event in ("sleep", "wake"):
            awake = event == "wake"
        # A sync's probe is the trainer's pass that needs both.
        computes = event in ("value forward", "value step", "lm step")
        assert not (computes and awake), events
    for position, event in enumerate(events):
        if event == "wake" and position > 5:
            before = events[:position]
            start = max(index for index, name in enumerate(before) if name == "sleep")
            assert {"value offload", "lm offload"} <= set(before[start:]), events
    generations = [position for position, event in enumerate(events) if event == "generate"]
    assert len(generations) == 2
    for position in generations:
        after = events[position + 1 : position + 3]
        assert after == ["sleep", "value forward"], events
