"""Who has a pool's memory when (finding 11 of the GPU audit): with release_during_training no
training engine of any role runs while generation has its weights and its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.tiny import make_model
from tests.workers.watched_engines import EVENTS, HERE, Event, holdings, names
from workers.actor import ActorWorker
from workers.config import ModelConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.reference import ReferenceWorker
from workers.role_config import ActorConfig, CriticConfig, ReferenceConfig


@pytest.fixture
def events() -> list[Event]:
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
    tmp_path: Path, events: list[Event], release: bool
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
    whats = names(events)
    if not release:
        assert not {"sleep", "wake", "offload"} & whats
        return
    # The engine takes its share of the device before the trainer is there (finding 13).
    begin = [event.what for event in events[:5]]
    assert begin == ["generation built", "sleep", "built", "wake", "sleep"]
    for held in holdings(events[5:], ["actor", "critic"]):
        assert held.generation is (held.event.what == "generate"), held
    for position, event in enumerate(events):
        if event.what == "wake" and position > 5:
            before = events[:position]
            start = max(index for index, seen in enumerate(before) if seen.what == "sleep")
            moved = {seen.role for seen in before[start:] if seen.what == "offload"}
            assert {"actor", "critic"} <= moved, events
    generations = [index for index, event in enumerate(events) if event.what == "generate"]
    assert len(generations) == 2
    for position in generations:
        after = events[position + 1 : position + 3]
        assert after == [Event("actor", "sleep"), Event("critic", "forward")], events
