"""One step of PPO, GRPO, GSPO and Safe-RLHF in plain PyTorch and float64, from the rollouts: what
benchmarks.invariance compares with.

Written from the papers' equations, row by row, with full logits, no padding, no micro-batches, no
code of this project but the numbers of the case. Transformers computes norms and rotations in
float32 whatever the weights; everything else is float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.invariance import case

Rows = list[dict[str, Any]]
"""number, prompt, response, reward; as the reward function saw them."""


@dataclass(kw_only=True)
class Numbers:
    """Loss, gradient norm and change of one model's update."""

    loss: float
    """Mean over the optimizer steps."""
    grad_norm: float
    """Before clipping; mean over the optimizer steps."""
    change: dict[str, Tensor] = field(default_factory=dict)
    """Change of every parameter after the last step."""


def reference_step(algorithm: str, directory: Path, rows: Rows) -> dict[str, Numbers]:
    """The numbers of every role that learns."""
    actor = AutoModelForCausalLM.from_pretrained(directory / "policy", dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(directory / "reference", dtype=torch.float64)
    with torch.no_grad():
        old = [log_probs(actor, row)[0] for row in rows]
        ref = [log_probs(reference, row)[0] for row in rows]
    if algorithm in ("grpo", "gspo"):
        advantages = group_advantages(rows)
        return {
            "actor": train(
                actor,
                lambda: group_loss(
                    actor, rows, old, ref, advantages, sequence_ratio=algorithm == "gspo"
                ),
            )
        }
    rewards = [row["reward"] for row in rows]
    if algorithm == "ppo":
        gae, critic = evaluate(directory / "critic", rows, rewards, old, ref, case.KL)
        return {"actor": train(actor, lambda: ppo_loss(actor, rows, old, gae)), "critic": critic}
    costs = [case.cost_of(row["response"]) for row in rows]
    # Half of the KL lowers the rewards, half raises the costs; ln lambda takes one step before it
    # is used.
    reward_advantages, critic = evaluate(directory / "critic", rows, rewards, old, ref, case.KL / 2)
    cost_advantages, cost_critic = evaluate(
        directory / "cost_critic", rows, costs, old, ref, -case.KL / 2
    )
    mean_cost = sum(costs) / len(costs)
    multiplier = case.MULTIPLIER * exp(
        case.MULTIPLIER_RATE * case.MULTIPLIER * (mean_cost - case.COST_THRESHOLD)
    )
    mixed = []
    for gain, cost in zip(reward_advantages, cost_advantages, strict=True):
        mixed.append((gain - multiplier * cost) / (1 + multiplier))
    texts = [
        json.loads(line)["text"] for line in (directory / "texts.jsonl").read_text().splitlines()
    ]
    update = train(
        actor,
        lambda: ppo_loss(actor, rows, old, mixed) + case.PRETRAINING * text_loss(actor, texts),
    )
    return {"actor": update, "critic": critic, "cost_critic": cost_critic}


def evaluate(
    directory: Path,
    rows: Rows,
    scores: list[float],
    old: list[Tensor],
    ref: list[Tensor],
    coefficient: float,
) -> tuple[list[Tensor], Numbers]:
    """Advantages of every row by the critic in `directory`, and the critic's update."""
    critic = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        values = [value(critic, row) for row in rows]
    penalties = [-coefficient * (a - b) for a, b in zip(old, ref, strict=True)]
    advantages = [
        generalized_advantages(*of_row) for of_row in zip(scores, penalties, values, strict=True)
    ]
    returns = [advantage + v for advantage, v in zip(advantages, values, strict=True)]
    return advantages, train(critic, lambda: critic_loss(critic, rows, values, returns))


def train(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Numbers:
    """The optimizer steps of an update on one mini-batch."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": case.WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=case.LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=case.EPSILON,
    )
    losses, norms = [], []
    for _ in range(case.NUM_EPOCHS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), case.CLIP_GRAD_NORM)))
        losses.append(loss.item())
        optimizer.step()
    change = {
        name: parameter.detach() - start[name] for name, parameter in model.named_parameters()
    }
    return Numbers(loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms), change=change)


def log_probs(model: Any, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs of the response's tokens, and the entropies of the distributions that they were
    sampled from."""
    tokens, first = torch.tensor(row["prompt"] + row["response"]), len(row["prompt"])
    table = torch.log_softmax(model(input_ids=tokens[None]).logits[0, first - 1 : -1].double(), -1)
    return table.gather(-1, tokens[first:, None]).squeeze(-1), -(table.exp() * table).sum(-1)


def value(model: Any, row: dict[str, Any]) -> Tensor:
    """V of the state before each token of the response."""
    tokens, first = torch.tensor(row["prompt"] + row["response"]), len(row["prompt"])
    hidden = model.base_model(input_ids=tokens[None]).last_hidden_state[0, first - 1 : -1]
    return (hidden.double() @ model.score.weight.double().T).squeeze(-1)


def generalized_advantages(score: float, penalties: Tensor, values: Tensor) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, the KL penalty on every token and the score on
    the last."""
    rewards = penalties.clone()
    rewards[-1] += score
    following = torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    delta = rewards + case.GAMMA * following - values
    advantages = torch.zeros_like(delta)
    running = torch.zeros((), dtype=torch.float64)
    for t in reversed(range(len(delta))):
        running = delta[t] + case.GAMMA * case.LAMBDA * running
        advantages[t] = running
    return advantages


def group_advantages(rows: Rows) -> list[float]:
    """(reward - mean) / (deviation + 1e-6) among the samples of one prompt; the deviation with
    Bessel's correction."""
    result = []
    for row in rows:
        rewards = [other["reward"] for other in rows if other["number"] == row["number"]]
        group = torch.tensor(rewards, dtype=torch.float64)
        result.append(float((row["reward"] - group.mean()) / (group.std() + 1e-6)))
    return result


def clipped(ratio: Tensor, advantage: Tensor | float) -> Tensor:
    """-min(r A, clip(r) A)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - case.CLIP, 1 + case.CLIP) * advantage)


def ppo_loss(model: Any, rows: Rows, old: list[Tensor], advantages: list[Tensor]) -> Tensor:
    """Mean over all tokens, minus the entropy bonus."""
    num_tokens = sum(len(row["response"]) for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row, before, advantage in zip(rows, old, advantages, strict=True):
        now, entropy = log_probs(model, row)
        total = total + (clipped((now - before).exp(), advantage) - case.ENTROPY * entropy).sum()
    return total / num_tokens


def group_loss(
    model: Any,
    rows: Rows,
    old: list[Tensor],
    ref: list[Tensor],
    advantages: list[float],
    *,
    sequence_ratio: bool,
) -> Tensor:
    """Mean over rows of the mean over tokens (GRPO, eq. 3); with the ratio of whole sequences,
    GSPO (eq. 5 and 7). KL: k3."""
    total = torch.zeros((), dtype=torch.float64)
    for row, before, reference, advantage in zip(rows, old, ref, advantages, strict=True):
        now, entropy = log_probs(model, row)
        log_ratio = now - before
        if sequence_ratio:
            log_ratio = log_ratio.mean()
        ratio = log_ratio.exp()
        kl = (reference - now).exp() - (reference - now) - 1
        total = total + (clipped(ratio, advantage) + case.KL * kl - case.ENTROPY * entropy).mean()
    return total / len(rows)


def text_loss(model: Any, texts: list[str]) -> Tensor:
    """Cross-entropy, mean over all tokens but the first of each text."""
    rows = [{"prompt": tokens[:1], "response": tokens[1:]} for tokens in map(case.numbers, texts)]
    return -torch.cat([log_probs(model, row)[0] for row in rows]).mean()


def critic_loss(model: Any, rows: Rows, old: list[Tensor], returns: list[Tensor]) -> Tensor:
    """Half the larger of two squared errors, one with the value held near the rollout's; mean
    over all tokens."""
    num_tokens = sum(len(row["response"]) for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row, before, target in zip(rows, old, returns, strict=True):
        now = value(model, row)
        near = before + (now - before).clamp(-case.VALUE_CLIP, case.VALUE_CLIP)
        total = total + 0.5 * torch.maximum((now - target).square(), (near - target).square()).sum()
    return total / num_tokens
