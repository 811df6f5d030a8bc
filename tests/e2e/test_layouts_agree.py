"""One program, many layouts: PPO on 1, 2 and 4 ranks gives the same samples, rewards and
weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from controllers.ppo import PPO, PPOConfig
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.errors import WorkerDied
from hybridflow.group import spawn
from hybridflow.pool import PoolSpec
from hybridflow.ray_pool import RayPool
from hybridflow.results import Metrics
from hybridflow.waiting import CALLS
from tests.matrix import matrix
from tests.tiny import VOCAB, make_model
from workers.actor import ActorWorker
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.generation.config import GenerationConfig, SamplingConfig
from workers.reference import ReferenceWorker
from workers.reward import FunctionRewardWorker
from workers.role_config import ActorConfig, CriticConfig, ReferenceConfig, ScorerConfig
from workers.roles import Actor
from workers.split_actor import GenerationWorker, SplitActor, SplitTrainingWorker

pytestmark = pytest.mark.usefixtures("ray_cluster")

WEIGHT_TOLERANCE = 2e-5
"""Largest difference of a weight after two steps of learning rate 1e-3: fp32 rounding through
AdamW's division. EPSILON keeps that from making much of gradients that are rounding noise
themselves."""
EPSILON = 1e-6


@dataclass(frozen=True)
class Case:
    num_devices: int
    engine: str = "fsdp"
    pp: int = 1
    tp: int = 1
    generation_tp: int = 1
    critic_tp: int = 1
    cp: int = 1
    lora: int = 0
    """Rank of the actor's and the critic's adapter; 0: all weights are trained."""
    release: bool = False
    generation_devices: int = 0
    """Devices of a separate pool for generation; 0: the actor generates where it trains."""

    def __str__(self) -> str:
        name = f"{self.num_devices} ranks {self.engine} {self.pp}-{self.tp} tg{self.generation_tp}"
        if self.cp > 1:
            name += f" cp{self.cp}"
        if self.lora:
            name += f" lora{self.lora}"
        if self.release:
            name += ", memory released during training"
        if self.generation_devices:
            name += f", generation on {self.generation_devices} more"
        return name


CASES = [
    Case(2, "deepspeed", generation_tp=2),  # ZeRO 3, actor and critic
    Case(2, generation_tp=2, release=True),
    Case(2, "threed", tp=2, generation_tp=2, critic_tp=2),
    Case(2, generation_devices=1),  # kills a rank of its pool at the end
]
SLOW = [
    Case(4, "threed", pp=2, tp=2, generation_tp=2, critic_tp=2),
    Case(4, "threed", pp=2, tp=2, generation_tp=1),
    Case(4, "threed", pp=2, tp=2, generation_tp=4),
    Case(2, generation_tp=2, cp=2),
    Case(4, "fsdp", generation_tp=2),  # generation groups 0, 2 and 1, 3
]


@dataclass
class Result:
    samples: list[list[int]]
    rewards: list[float]
    weights: dict[str, torch.Tensor]
    metrics: Metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


Pools = Callable[[int], RayPool]


@pytest.fixture(scope="module")
def pools(ray_cluster: None) -> Iterator[Pools]:
    """pools(2): a pool of two devices without roles. The next case of as many devices gets the
    same processes, which have imported everything."""
    stack, pool = ExitStack(), None

    def empty_pool(num_devices: int) -> RayPool:
        nonlocal pool
        if pool is not None and pool.size == num_devices and not pool.broken:
            pool.clear()
            return pool
        stack.close()
        spec = PoolSpec(name=f"pool{num_devices}", num_devices=num_devices, threads_per_device=1)
        pool = RayPool(spec)
        stack.enter_context(pool)
        return pool

    with stack:
        yield empty_pool


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory, pools: Pools) -> Result:
    return train(Case(1), model, tmp_path_factory.mktemp("single"), pools)


@pytest.mark.parametrize("case", matrix(CASES, SLOW), ids=str)
def test_same_samples_rewards_and_weights_as_on_one_rank(
    case: Case, single: Result, model: Path, tmp_path: Path, pools: Pools
) -> None:
    result = train(case, model, tmp_path, pools)
    assert result.samples == single.samples
    assert result.rewards == single.rewards
    assert result.weights.keys() == single.weights.keys()
    for name, weight in single.weights.items():
        difference = (result.weights[name] - weight).abs().max()
        assert difference < WEIGHT_TOLERANCE, f"{name} differs by {difference:.2g}"
    assert result.metrics["sync/probe_gap"] < 1e-4
    if case.engine == "threed" and case.generation_tp == case.tp:
        assert result.metrics["sync/shared_bytes"] > 0, (
            "where shards coincide, generation computes with training's memory"
        )
    if case.release:
        assert result.metrics["memory/release_bytes"] > 16 * 2**20, (
            "the key/value cache and the weights"
        )
        assert {f"memory/{name}_s" for name in ("offload", "wake", "release", "onload")} <= set(
            result.metrics
        )


@pytest.mark.slow
def test_two_tensor_ranks_get_the_adapter_alone(model: Path, tmp_path: Path, pools: Pools) -> None:
    """Trained with cp=2, generated with tp=2: samples and adapter of one rank, whose base vLLM
    loaded by itself."""
    single = train(Case(1, lora=4), model, tmp_path / "single", pools)
    result = train(Case(2, generation_tp=2, cp=2, lora=4), model, tmp_path / "two", pools)
    assert result.samples == single.samples
    assert result.rewards == single.rewards
    assert result.weights.keys() == single.weights.keys()
    for name, weight in single.weights.items():
        assert "lora_" in name
        torch.testing.assert_close(result.weights[name], weight, rtol=0.0, atol=WEIGHT_TOLERANCE)
    assert result.metrics["sync/probe_gap"] < 1e-5


def train(case: Case, model: Path, directory: Path, pools: Pools) -> Result:
    """Two PPO steps with two mini-batches each."""
    pool = pools(case.num_devices)
    with spawned_actor(case, pool, model) as actor:
        roles: dict[str, Any] = {
            "actor": actor,
            "critic": spawn(
                CriticWorker,
                pool,
                CriticConfig(
                    model=model_config(model), train=train_config(case, tp=case.critic_tp)
                ),
            ),
            "reference": spawn(
                ReferenceWorker,
                pool,
                ReferenceConfig(model=model_config(model), train=train_config(Case(1))),
            ),
            "reward": spawn(
                FunctionRewardWorker,
                pool,
                ScorerConfig(function="tests.runtime.rewards:count", policy=model_config(model)),
                role="reward",
            ),
        }
        algorithm = PPO(**roles, config=PPOConfig(num_mini_batches=2))
        samples, rewards = [], []
        for step in range(2):
            batch = prompts(step)
            generated = actor.generate_sequences(batch)
            samples += [row.tolist() for row in generated.ragged("response_ids").unbind()]
            assert generated.tensor("weight_version").eq(step).all(), (
                "a batch carries the version of the weights that generated it"
            )
            metrics = algorithm.step(batch)
            rewards.append(round(metrics["reward/mean"], 6))
        actor.save_pretrained(str(directory))
        CALLS.finish()
        if case.generation_devices:
            the_sync_with_a_dead_trainer_ends_in_its_name(actor, pool)
    (weights,) = directory.glob("*model.safetensors")
    return Result(samples, rewards, load_file(weights), metrics)


@contextmanager
def spawned_actor(case: Case, pool: RayPool, model: Path) -> Iterator[Actor]:
    config = actor_config(case, model)
    if not case.generation_devices:
        yield spawn(ActorWorker, pool, config, role="actor")
        return
    with RayPool(
        PoolSpec(name="generation", num_devices=case.generation_devices, threads_per_device=1)
    ) as generation:
        policy = spawn(SplitTrainingWorker, pool, config, role="actor")
        generator = spawn(GenerationWorker, generation, config, role="generation")
        yield SplitActor.of(policy, generator, pool, generation)


def the_sync_with_a_dead_trainer_ends_in_its_name(actor: Actor, pool: RayPool) -> None:
    """The weights have changed; rank 1 is killed while both pools are about to exchange them."""
    os.kill(pool.hosts[1].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"actor rank 1 died in sync_weights \(pid \d+"):
        actor.generate_sequences(prompts(0)).ragged("response_ids")
    assert time.monotonic() - started < 120


def prompts(step: int) -> Batch:
    """11 prompts with 2 samples: nothing divides by 2 or 4 twice."""
    generator = np.random.default_rng(step)
    ids = [generator.integers(3, VOCAB, generator.integers(2, 9)) for _ in range(11)]
    return Batch.of(
        prompt_ids=Ragged.of(ids), uid=np.arange(11) + 11 * step, extras=[{}] * 11
    ).repeat(2)


def model_config(model: Path) -> ModelConfig:
    return ModelConfig(path=str(model))


def train_config(case: Case, **sizes: int) -> TrainConfig:
    settings: dict[str, Any] = {
        "engine": case.engine,
        "pp": case.pp,
        "tp": case.tp,
        "cp": case.cp,
        "zero_stage": 3,
        **sizes,
    }
    if case.engine == "fsdp":
        settings["pp"] = 1
    return TrainConfig(
        **settings,
        precision=Precision.fp32,
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=EPSILON),
        micro_batch_tokens=64,
        lora=LoraConfig(rank=case.lora),
    )


def actor_config(case: Case, model: Path) -> ActorConfig:
    return ActorConfig(
        model=model_config(model),
        train=train_config(case),
        generation=GenerationConfig(
            precision=Precision.fp32,
            tp=case.generation_tp,
            max_model_len=64,
            kv_cache_bytes=16 * 2**20,
            release_during_training=case.release,
            sampling=SamplingConfig(max_response_tokens=12),
        ),
    )
