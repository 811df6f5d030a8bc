"""Two updates of every trained role with an adapter, against LoRA in plain PyTorch: supervised
fine-tuning, DPO, the critic, a reward model (issue 16)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.local_pool import LocalPool
from hybridflow.pool import PoolSpec
from tests.engines.threed_cases import VOCABULARY, load_plain, save_tiny_model
from tests.lora.plain import adapt, matrices_of
from workers.config import LoraConfig, ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.engines.base import Head
from workers.engines.model.scored import score_head
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.losses.config import DPOLossConfig, ValueLossConfig
from workers.losses.preference import pair_columns
from workers.policy import PolicyWorker
from workers.preference import PreferenceWorker
from workers.reference import ReferenceWorker
from workers.role_config import CriticConfig, PolicyConfig, PreferenceConfig, ReferenceConfig

RANK, ALPHA, BETA, NUM_UPDATES = 4, 8.0, 0.5, 2
EXACT = 1e-6
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, clip_grad_norm=0.05, epsilon=1e-3)
TRAIN = TrainConfig(
    precision=Precision.fp32, lora=LoraConfig(rank=RANK, alpha=ALPHA), optimizer=OPTIMIZER
)
LENGTHS = (torch.tensor([3, 5, 1, 4]), torch.tensor([2, 4, 6, 1]))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[LocalPool]:
    save_tiny_model(tmp_path / "base", "llama", layers=2)
    with LocalPool(PoolSpec(name="main")) as pool:
        yield pool


def rows() -> Batch:
    """Two pairs."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, Ragged | Tensor] = {}
    for name, lengths in zip(("prompt_ids", "response_ids"), LENGTHS, strict=True):
        ids = torch.randint(3, VOCABULARY, (int(lengths.sum()),), generator=generator)
        columns[name] = Ragged(ids, lengths)
    columns["returns"] = Ragged(torch.randn(13, generator=generator), LENGTHS[1])
    pairs = pair_columns(2)
    return Batch.of(**columns, pair=pairs["pair"], chosen=pairs["chosen"])


def plain_rows(batch: Batch) -> list[tuple[Tensor, int]]:
    """(tokens, number of the prompt's) of every row."""
    parts = []
    for name, lengths in zip(("prompt_ids", "response_ids"), LENGTHS, strict=True):
        parts.append(batch.local([name]).ragged(name).values.split(lengths.tolist()))
    pairs = zip(*parts, strict=True)
    return [(torch.cat(pair), len(pair[0])) for pair in pairs]


def log_probs(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Of every row's response tokens."""
    result = []
    for tokens, start in plain_rows(batch):
        table = model(input_ids=tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
        result.append(table.gather(-1, tokens[start:, None]).squeeze(-1))
    return result


def numbers(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """The scalar head's at every token of every row."""
    result = []
    for tokens, _ in plain_rows(batch):
        hidden = model.base_model(input_ids=tokens[None]).last_hidden_state[0]
        result.append(score_head(model)(hidden).squeeze(-1))
    return result


def check_role(
    worker: PolicyWorker | CriticWorker | PreferenceWorker,
    path: Path,
    head: Head,
    prefix: str,
    update: Callable[[], dict[str, float]],
    loss_of: Callable[[PreTrainedModel], Tensor],
) -> None:
    """`update` and plain PyTorch with `loss_of` take the same steps."""
    engine = worker.engine
    assert isinstance(engine, ShardedEngine)
    engine.save_pretrained(path / "adapter")
    model = load_plain(path / "base", head)
    if head is not Head.lm:
        with torch.no_grad():
            score_head(model).weight.copy_(engine._gathered_trained()["score.weight"])
    adapt(model, matrices_of(path / "adapter"), ALPHA / RANK)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=OPTIMIZER.learning_rate, eps=OPTIMIZER.epsilon, weight_decay=0.0
    )
    optimizer.param_groups[0]["betas"] = (OPTIMIZER.beta1, OPTIMIZER.beta2)
    for _ in range(NUM_UPDATES):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.clip_grad_norm)
        optimizer.step()
        metrics = update()
        assert metrics[f"{prefix}/loss"] == pytest.approx(loss.item(), abs=EXACT, rel=EXACT)
        assert metrics[f"{prefix}/grad_norm"] == pytest.approx(norm.item(), abs=EXACT, rel=EXACT)
    expected = {}
    for name, parameter in trained.items():
        layer, _, last = name.rpartition(".")
        name = f"{layer}.lora_{last.upper()}" if last in "ab" else name
        expected[name] = parameter.detach()
    found = engine._gathered_trained()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0.0, atol=EXACT)


def spawn(pool: LocalPool, role: str, worker: type, config: object) -> object:
    pool.create(role, worker, config)
    return pool.workers[role]


def test_supervised(pool: LocalPool, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tmp_path / "base"))
    policy = spawn(pool, "policy", PolicyWorker, PolicyConfig(model=model, train=TRAIN))
    assert isinstance(policy, PolicyWorker)
    batch = rows()

    def loss_of(model: PreTrainedModel) -> Tensor:
        return -torch.cat(log_probs(model, batch)).mean()

    def update() -> dict[str, float]:
        return policy.update_supervised(batch)

    check_role(policy, tmp_path, Head.lm, "policy", update, loss_of)


def test_dpo(pool: LocalPool, tmp_path: Path) -> None:
    """Rafailov et al. 2023, equation 7; the reference is the policy's engine without the adapter."""
    model = ModelConfig(path=str(tmp_path / "base"))
    policy = spawn(pool, "policy", PolicyWorker, PolicyConfig(model=model, train=TRAIN))
    frozen = TrainConfig(precision=Precision.fp32)
    reference = spawn(
        pool, "reference", ReferenceWorker, ReferenceConfig(model=model, train=frozen)
    )
    assert isinstance(policy, PolicyWorker)
    assert isinstance(reference, ReferenceWorker)
    assert reference.engine is policy.engine
    batch = rows()
    plain = load_plain(tmp_path / "base", Head.lm)
    with torch.no_grad():
        referred = [row.sum() for row in log_probs(plain, batch)]

    def loss_of(model: PreTrainedModel) -> Tensor:
        rewards = []
        for row, base in zip(log_probs(model, batch), referred, strict=True):
            rewards.append(BETA * (row.sum() - base))
        margins = torch.stack([rewards[0] - rewards[1], rewards[2] - rewards[3]])
        return -F.logsigmoid(margins).mean()

    def update() -> dict[str, float]:
        both = batch | reference.compute_ref_log_prob(batch)
        return policy.update_dpo(both, DPOLossConfig(beta=BETA))

    check_role(policy, tmp_path, Head.lm, "policy", update, loss_of)


def test_critic(pool: LocalPool, tmp_path: Path) -> None:
    """Half the squared error to the returns; the head is trained whole."""
    model = ModelConfig(path=str(tmp_path / "base"))
    config = CriticConfig(model=model, train=TRAIN, loss=ValueLossConfig(clip=0.0))
    critic = spawn(pool, "critic", CriticWorker, config)
    assert isinstance(critic, CriticWorker)
    batch = rows()
    returns = batch.local(["returns"]).ragged("returns").values

    def loss_of(model: PreTrainedModel) -> Tensor:
        values = []
        for row, (_, start) in zip(numbers(model, batch), plain_rows(batch), strict=True):
            values.append(row[start - 1 : -1])
        return 0.5 * (torch.cat(values) - returns).square().mean()

    def update() -> dict[str, float]:
        return critic.update_critic(batch)

    check_role(critic, tmp_path, Head.value, "critic", update, loss_of)


def test_reward_model(pool: LocalPool, tmp_path: Path) -> None:
    """InstructGPT, equation 1."""
    model = ModelConfig(path=str(tmp_path / "base"), new_head=True)
    scorer = spawn(
        pool, "reward_model", PreferenceWorker, PreferenceConfig(model=model, train=TRAIN)
    )
    assert isinstance(scorer, PreferenceWorker)
    batch = rows()

    def loss_of(model: PreTrainedModel) -> Tensor:
        scores = [row[-1] for row in numbers(model, batch)]
        margins = torch.stack([scores[0] - scores[1], scores[2] - scores[3]])
        return -F.logsigmoid(margins).mean()

    def update() -> dict[str, float]:
        return scorer.update_preferences(batch)

    check_role(scorer, tmp_path, Head.score, scorer.prefix, update, loss_of)
