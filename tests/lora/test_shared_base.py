"""Roles of one pool whose models are adapters of the same directory: its weights are in memory once,
and every role answers as if it had them for itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.context import RankContext
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.engines.threed_cases import VOCABULARY, save_tiny_model
from tests.lora.workers import frozen_memory
from tests.matrix import matrix
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.model_worker import ModelWorker, sequences_of
from workers.policy import PolicyWorker
from workers.reference import ReferenceWorker
from workers.reward import ModelRewardWorker
from workers.role_config import CriticConfig, PolicyConfig, ReferenceConfig, RewardConfig

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture
def pools() -> Iterator[dict[str, LocalPool]]:
    """One for all roles, and one for each."""
    with LocalPool(PoolSpec(name="shared")) as shared:
        pools = {"shared": shared}
        for role in ("policy", "reference", "critic", "reward"):
            pools[role] = LocalPool(PoolSpec(name=f"pool-of-{role}"))
        yield pools


def settings(path: Path, reward: Path, train: TrainConfig) -> dict[str, tuple[type, object]]:
    """Role -> worker and settings."""
    model = ModelConfig(path=str(path), new_head=True)
    scored = replace(train, lora=LoraConfig(adapter=str(reward)))
    return {
        "policy": (PolicyWorker, PolicyConfig(model=model, train=train)),
        "reference": (
            ReferenceWorker,
            ReferenceConfig(model=model, train=replace(train, lora=LoraConfig())),
        ),
        "critic": (CriticWorker, CriticConfig(model=model, train=train, seed=3)),
        "reward": (ModelRewardWorker, RewardConfig(model=model, train=scored)),
    }


def rows() -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 1, 4])
    columns = {}
    for name in ("prompt_ids", "response_ids"):
        ids = torch.randint(3, VOCABULARY, (int(lengths.sum()),), generator=generator)
        columns[name] = Ragged(ids, lengths)
    columns["returns"] = Ragged(torch.randn(13, generator=generator), lengths)
    columns["values"] = Ragged(torch.zeros(13), lengths)
    return Batch.of(**columns)


def answers(workers: dict[str, ModelWorker]) -> list[Tensor]:
    """A training step of the policy and of the critic, and what every role says afterwards."""
    batch = rows()
    policy, reference = workers["policy"], workers["reference"]
    critic, reward = workers["critic"], workers["reward"]
    norm = policy.update_supervised(batch)["policy/grad_norm"]
    value_norm = critic.update_critic(batch)["critic/grad_norm"]
    log_probs = policy.compute_log_prob(batch).local(["log_probs"]).ragged("log_probs")
    frozen = reference.compute_ref_log_prob(batch).local(["ref_log_probs"])
    values = critic.compute_values(batch).local(["values"]).ragged("values")
    rewards = reward.compute_reward(batch).local(["rewards"]).tensor("rewards")
    numbers = torch.tensor([norm, value_norm])
    return [
        numbers,
        log_probs.values,
        frozen.ragged("ref_log_probs").values,
        values.values,
        rewards,
    ]


@pytest.mark.parametrize("engine", matrix(["fsdp"], ["threed"]))
def test_roles_share_their_base(pools: dict[str, LocalPool], tmp_path: Path, engine: str) -> None:
    """Policy, reference, critic and reward model (SCALE.md 5.1): one storage, and a training step
    and outputs that are those of four models, bit for bit."""
    path = save_tiny_model(tmp_path / "base", "qwen3", layers=2)
    train = TrainConfig(
        engine=engine,
        precision=Precision.fp32,
        lora=LORA,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    reward = tmp_path / "reward"
    scorer = engine_class(engine)(
        model=ModelConfig(path=str(path), new_head=True),
        config=train,
        head=Head.score,
        context=RankContext(),
        seed=7,
    )
    scorer.save_pretrained(reward)
    together, apart = {}, {}
    for role, (worker, config) in settings(path, reward, train).items():
        for pool, workers in (("shared", together), (role, apart)):
            pools[pool].create(role, worker, config)
            workers[role] = pools[pool].workers[role]
    policy = frozen_memory(together["policy"].engine)
    assert together["reference"].engine is together["policy"].engine
    for role in ("critic", "reward"):
        memory = frozen_memory(together[role].engine)
        assert len(memory) == len(policy) - 1, "all of it but the output embedding"
        assert memory.items() <= policy.items()
        assert not memory.items() & frozen_memory(apart[role].engine).items()
    for shared, alone in zip(answers(together), answers(apart), strict=True):
        assert torch.equal(shared, alone)


def test_another_directory_is_another_base(pools: dict[str, LocalPool], tmp_path: Path) -> None:
    """Only settings that give the same weights and numbers share; so do values: a directory that was
    written to in between is not taken for the one that was read."""
    path = save_tiny_model(tmp_path / "base", "llama", layers=2)
    other = save_tiny_model(tmp_path / "other", "llama", layers=2)
    train = TrainConfig(precision=Precision.fp32, lora=LORA)
    model = ModelConfig(path=str(path), new_head=True)

    def build(head: Head, lender: ShardedEngine | None = None) -> ShardedEngine:
        engine = engine_class("fsdp")(
            model=model, config=train, head=head, context=RankContext(), lender=lender
        )
        assert isinstance(engine, ShardedEngine)
        return engine

    policy = build(Head.lm)
    assert policy.lends_base(model, train)
    assert not policy.lends_base(replace(model, path=str(other)), train)
    assert not policy.lends_base(model, replace(train, precision=Precision.bf16))
    assert not policy.lends_base(model, replace(train, engine="threed"))
    assert not policy.lends_base(model, replace(train, lora=LoraConfig()))
    weights = load_file(path / "model.safetensors")
    doubled = {name: 2 * weight for name, weight in weights.items()}
    save_file(doubled, path / "model.safetensors", metadata={"format": "pt"})
    critic = frozen_memory(build(Head.value, policy))
    assert not critic.items() & frozen_memory(policy).items()


def test_a_base_takes_two_bytes_in_bf16(pools: dict[str, LocalPool], tmp_path: Path) -> None:
    """With precision=bf16 the frozen weights are kept in it, and where there is one data rank they
    are used where they lie; adapters are float32. The numbers are those of a base that is cast for
    every pass, bit for bit."""
    path = save_tiny_model(tmp_path / "base", "llama", layers=2)
    train = TrainConfig(precision=Precision.bf16, lora=LORA)
    model = ModelConfig(path=str(path))
    engine = engine_class("fsdp")(model=model, config=train, head=Head.lm, context=RankContext())
    assert isinstance(engine, ShardedEngine)
    trained = {p.name.removeprefix("model.") for p in engine.state(moments=False, copies=True)}
    for parameter in engine.local_parameters():
        expected = torch.float32 if parameter.name in trained else torch.bfloat16
        (shard,) = parameter.shards
        assert parameter.dtype is shard.tensor.dtype is expected
    whole = engine_class("fsdp")(
        model=model, config=replace(train, lora=LoraConfig()), head=Head.lm, context=RankContext()
    )
    sequences = sequences_of(rows())
    assert torch.equal(engine.forward(sequences).log_probs, whole.forward(sequences).log_probs)
