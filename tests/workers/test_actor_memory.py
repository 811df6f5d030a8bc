"""What a weight sync leaves behind in an actor: nothing of its own."""

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
from workers.actor import ActorWorker
from workers.config import ModelConfig, Precision, TrainConfig
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.role_config import ActorConfig


class ObservedActor(ActorWorker):
    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        ACTORS.append(self)


ACTORS: list[ActorWorker] = []


def staging_bytes(actor: ActorWorker) -> int:
    assert actor.sync.destination is not None
    return sum(
        shard.tensor.untyped_storage().nbytes()
        for parameter in actor.sync.destination.destinations()
        for shard in parameter.shards
    )


def test_memory_for_a_sync_is_given_back_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path / "model", layers=1, heads=1, kv_heads=1)
    config = ActorConfig(
        model=ModelConfig(path=str(path)),
        train=TrainConfig(precision=Precision.fp32),
        generation=GenerationConfig(
            engine="hf",
            precision=Precision.fp32,
            sampling=SamplingConfig(max_response_tokens=4, greedy=True),
        ),
    )
    with LocalPool(PoolSpec(name="main", num_devices=1)) as pool:
        handle = spawn(ObservedActor, pool, config, role="actor")
        assert staging_bytes(ACTORS[-1]) == 0
        prompts = Batch.of(
            prompt_ids=Ragged(torch.tensor([5, 6, 7]), torch.tensor([3])), uid=torch.tensor([0])
        )
        staged: list[int] = []
        monkeypatch.setattr(
            "workers.actor.give_back", lambda device: staged.append(staging_bytes(ACTORS[-1]))
        )
        answers = handle.generate_sequences(prompts).local(["response_ids"])
        assert staged[-1:] == [0], "the system gets it back once it is free"
        assert staging_bytes(ACTORS[-1]) == 0
        assert ACTORS[-1].sync.last is not None
        assert ACTORS[-1].sync.last.probe_gap == pytest.approx(0, abs=1e-5)
    assert len(answers.ragged("response_ids").values) > 0
