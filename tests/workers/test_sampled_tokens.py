"""Tokens of an environment in the models: they are read, and never scored, learned or counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.group import spawn
from hybridflow.local_pool import LocalPool
from tests.tiny import VOCAB, make_model
from workers.actor_training import ActorTrainingWorker
from workers.config import ModelConfig, Precision, TrainConfig
from workers.critic import CriticWorker
from workers.losses.aggregation import Aggregation
from workers.losses.config import PolicyLossConfig
from workers.role_config import ActorConfig, CriticConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    with LocalPool() as pool:
        yield pool


def rows() -> Batch:
    """Three groups of two rows with a common prompt; turns of the policy and an environment."""
    drawn = np.random.default_rng(1)
    prompts, responses, masks = [], [], []
    for size in (3, 5, 4):
        prompt = drawn.integers(3, VOCAB, size)
        for _ in range(2):
            turns = drawn.integers(1, 4, 3)
            prompts.append(prompt)
            responses.append(drawn.integers(3, VOCAB, int(turns.sum())))
            masks.append(np.repeat([True, False, True], turns))
    masks[-1][-1] = False  # the episode ends with the environment's token
    return Batch.of(
        prompt_ids=Ragged.of(prompts),
        response_ids=Ragged.of(responses),
        loss_mask=Ragged.of(masks, torch.bool),
        uid=torch.tensor([0, 0, 1, 1, 2, 2]),
    )


def settings(model: Path, share: bool) -> dict[str, object]:
    train = TrainConfig(precision=Precision.fp32, micro_batch_tokens=24, share_prompts=share)
    return {"model": ModelConfig(path=str(model)), "train": train}


def naive_log_probs(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """Of each row by itself: log_softmax at the places before the policy's tokens."""
    result = []
    for prompt, response, mask in zip(
        batch.ragged("prompt_ids").unbind(),
        batch.ragged("response_ids").unbind(),
        batch.ragged("loss_mask").unbind(),
        strict=True,
    ):
        ids = torch.cat([prompt, response])
        table = model(ids[None]).logits[0].log_softmax(-1)
        places = torch.nonzero(mask).squeeze(1) + len(prompt)
        result.append(table[places - 1, ids[places]])
    return result


@pytest.mark.parametrize("share", [False, True])
def test_the_actor_learns_from_its_own_tokens(model: Path, pool: LocalPool, share: bool) -> None:
    """Log-probs, loss and gradient norm are those of a loop over transformers' model."""
    loss = PolicyLossConfig(aggregation=Aggregation.seq_mean_token_mean)
    config = ActorConfig(**settings(model, share), loss=loss)
    actor = spawn(ActorTrainingWorker, pool, config, role="actor")
    batch = rows()
    naive = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = naive_log_probs(naive, batch)
    log_probs = actor.compute_log_prob(batch).ragged("log_probs")
    assert log_probs.lengths.tolist() == [len(row) for row in expected]
    torch.testing.assert_close(log_probs.values, torch.cat(expected), atol=2e-6, rtol=0)

    advantages = [torch.linspace(-1, 1, len(row)) + 0.1 for row in expected]
    # The ratio to the old policy is 1 everywhere: the gradient is that of -advantage * log-prob.
    total = torch.stack(
        [-(weights * row).mean() for weights, row in zip(advantages, expected, strict=True)]
    ).mean()
    total.backward()
    norm = torch.stack([p.grad.norm() for p in naive.parameters() if p.grad is not None]).norm()
    metrics = actor.update_actor(batch | Batch.of(advantages=Ragged.of(advantages)))
    value = torch.stack([-weights.mean() for weights in advantages]).mean()
    assert metrics["actor/loss"] == pytest.approx(float(value), abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_the_critic_values_the_states_before_them(model: Path, pool: LocalPool) -> None:
    """Whatever an environment writes after the last of the policy's tokens: the values stay."""
    critic = spawn(CriticWorker, pool, CriticConfig(**settings(model, False)), role="critic")
    batch = rows()
    whole = batch.select("prompt_ids", "response_ids")
    everywhere = critic.compute_values(whole).ragged("values").values
    values = critic.compute_values(batch).ragged("values")
    torch.testing.assert_close(values.values, everywhere[batch.ragged("loss_mask").values])
    changed = batch.ragged("response_ids").values.clone()
    changed[-1] = (changed[-1] + 1) % VOCAB
    prompts = batch.select("prompt_ids", "loss_mask")
    other = prompts | Batch.of(response_ids=Ragged(changed, batch.ragged("response_ids").lengths))
    assert torch.equal(critic.compute_values(other).ragged("values").values, values.values)
