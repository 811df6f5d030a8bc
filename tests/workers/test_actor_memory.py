"""What a weight sync leaves behind in an actor: nothing of its own, and no weights of two versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from hybridflow.resharding import Executor
from tests.tiny import make_model
from workers.actor import ActorWorker
from workers.config import ModelConfig, Precision, TrainConfig
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.generation.hf import HfEngine
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


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Any]:
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
        yield spawn(ObservedActor, pool, config, role="actor")


def responses(actor: Any) -> list[int]:
    prompts = Batch.of(
        prompt_ids=Ragged(torch.tensor([5, 6, 7]), torch.tensor([3])), uid=torch.tensor([0])
    )
    answers = actor.generate_sequences(prompts).local(["response_ids"])
    tokens: list[int] = answers.ragged("response_ids").values.tolist()
    return tokens


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes weights as one of whose memory nothing is known."""
    monkeypatch.delattr(HfEngine, "weight_destination")


def test_memory_for_a_sync_is_given_back_after_it(
    staging: None, actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert staging_bytes(ACTORS[-1]) == 0
    staged: list[int] = []
    monkeypatch.setattr(
        "workers.actor.give_back", lambda device: staged.append(staging_bytes(ACTORS[-1]))
    )
    assert responses(actor)
    assert staged[-1:] == [0], "the system gets it back once it is free"
    assert staging_bytes(ACTORS[-1]) == 0
    assert ACTORS[-1].sync.last is not None
    assert ACTORS[-1].sync.last.probe_gap == pytest.approx(0, abs=1e-5)


def test_engine_hf_has_the_model_once(actor: Any) -> None:
    destination, engine = ACTORS[-1].sync.destination, ACTORS[-1].sampler.engine
    assert destination is not None and isinstance(engine, HfEngine)
    written = [parameter.shards[0].tensor for parameter in destination.destinations()]
    for tensor in written:
        tensor.fill_(float("nan"))
    assert np.isnan(engine.score([5, 6, 7])).all(), "what a sync writes is what the engine reads"
    own = sum(parameter.nbytes for parameter in engine._model.parameters())
    assert sum(tensor.nbytes for tensor in written) == own
    assert responses(actor)
    assert not any(tensor.isnan().any() for tensor in written)
    assert destination.release() == 0


def test_a_sync_that_ended_half_way_is_made_again(
    actor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = responses(actor)
    sync, engine = ACTORS[-1].sync, ACTORS[-1].sampler.engine
    version = engine.weight_version
    assert version == ACTORS[-1].weight_version, "the next generation would not sync"

    def fail(executor: Executor) -> None:
        assert sync.destination is not None
        sync.destination.destinations()[0].shards[0].tensor.zero_()
        raise RuntimeError("a peer is gone")

    with monkeypatch.context() as broken:
        broken.setattr(Executor, "run", fail)
        with pytest.raises(RuntimeError, match="a peer is gone"):
            sync.run(version)
    assert engine.weight_version == -1
    assert responses(actor) == undisturbed
    assert engine.weight_version == version
