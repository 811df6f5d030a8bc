"""Resuming a trained role is bit-equal to not stopping, where an update takes several epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from tests.tiny import VOCAB, make_model
from workers.actor_training import ActorTrainingWorker
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.policy import PolicyWorker
from workers.role_config import ActorConfig, CriticConfig, PolicyConfig
from workers.trained_worker import TrainedWorker

NUM_MINI_BATCHES, NUM_UPDATES = 4, 2
CONTEXT = RankContext()


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one, or the one that a pool of this process has left."""
    makes_world = not dist.is_initialized()
    if makes_world:
        store = tmp_path_factory.mktemp("world") / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(num_threads)
    if makes_world:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("resume")
    return ModelConfig(path=str(make_model(directory / "model", layers=1, heads=1, kv_heads=1)))


def train_config() -> TrainConfig:
    return TrainConfig(precision=Precision.fp32, optimizer=OptimizerConfig(learning_rate=1e-3))


def make_critic(model: ModelConfig) -> TrainedWorker:
    return CriticWorker(CriticConfig(model=model, train=train_config(), num_epochs=2), CONTEXT)


def make_policy(model: ModelConfig) -> TrainedWorker:
    config = PolicyConfig(model=model, train=train_config(), passes_per_batch=2)
    return PolicyWorker(config, CONTEXT)


def make_actor(model: ModelConfig) -> TrainedWorker:
    config = ActorConfig(model=model, train=train_config(), num_epochs=2)
    return ActorTrainingWorker(config, CONTEXT)


def update(worker: TrainedWorker, number: int) -> dict[str, float]:
    drawn = np.random.default_rng(number)
    responses = [
        drawn.integers(3, VOCAB, drawn.integers(2, 9)) for _ in range(2 * NUM_MINI_BATCHES)
    ]
    lengths = torch.tensor([len(response) for response in responses])
    per_token = Ragged(torch.from_numpy(drawn.normal(size=int(lengths.sum()))).float(), lengths)
    batch = Batch.of(
        prompt_ids=Ragged.of([drawn.integers(3, VOCAB, 4) for _ in responses]),
        response_ids=Ragged.of(responses),
        returns=per_token,
        advantages=per_token,
        mini_batch=torch.arange(2 * NUM_MINI_BATCHES) % NUM_MINI_BATCHES,
    )
    if isinstance(worker, CriticWorker):
        return learned(worker.update_critic(batch))
    if isinstance(worker, ActorTrainingWorker):
        return learned(worker.update_actor(batch))
    assert isinstance(worker, PolicyWorker)
    return learned(worker.update_supervised(batch))


def learned(metrics: Metrics) -> dict[str, float]:
    """The metrics without the memory of the process."""
    return {name: value for name, value in metrics.items() if "/memory/" not in name}


def weights(worker: TrainedWorker) -> list[torch.Tensor]:
    result = []
    for parameter in worker.engine.local_parameters():
        result += [shard.tensor.detach().clone() for shard in parameter.shards]
    return result


@pytest.mark.parametrize("make", [make_critic, make_policy, make_actor])
def test_resume_is_bit_equal_to_the_undisturbed_run(
    make: Callable[[ModelConfig], TrainedWorker], model: ModelConfig, tmp_path: Path
) -> None:
    undisturbed = make(model)
    expected = [update(undisturbed, number) for number in range(NUM_UPDATES)]

    stopped = make(model)
    update(stopped, 0)
    stopped.save_checkpoint(str(tmp_path))
    resumed = make(model)
    resumed.load_checkpoint(str(tmp_path))
    assert [update(resumed, number) for number in range(1, NUM_UPDATES)] == expected[1:]
    for ours, theirs in zip(weights(resumed), weights(undisturbed), strict=True):
        assert torch.equal(ours, theirs)


def test_a_forgotten_counter_would_change_the_result(model: ModelConfig) -> None:
    """The test above tells something: without the counter the second epoch has another order."""
    right, wrong = make_critic(model), make_critic(model)
    for worker in (right, wrong):
        update(worker, 0)
    wrong.num_updates = 0
    for worker in (right, wrong):
        update(worker, 1)
    assert not all(torch.equal(a, b) for a, b in zip(weights(right), weights(wrong), strict=True))


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(
    model: ModelConfig, tmp_path: Path
) -> None:
    """F13-R7: what torch.distributed.checkpoint wrote is safetensors too, of another format."""
    critic = make_critic(model)
    save_file({"model.score.weight": torch.zeros(1, 8)}, tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"written by an earlier version .* huggingface") as error:
        critic.load_checkpoint(str(tmp_path))
    assert "\n" not in str(error.value)
