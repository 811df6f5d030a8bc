"""Every algorithm against hand-written roles: order of calls, columns, and advantages computed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from controllers import ALGORITHMS, create_algorithm
from controllers.grpo import GRPOConfig
from controllers.kl import KLControlConfig
from controllers.loop import INPUTS
from controllers.ppo import PPOConfig
from hybridflow.dataflow import CallKind
from hybridflow.tracing import trace, traced_roles
from tests.controllers.fakes import CLASSES, FAKES, Script, fakes, prompts

TWO_ROWS = Script(
    responses=[[8, 1], [1]],
    rewards=[1.0, -1.0],
    values=[[0.5, 1.0], [0.25]],
    log_probs=[[-1.0, -2.0], [-0.5]],
    ref_log_probs=[[-1.5, -1.0], [-0.5]],
)
FOUR_ROWS = Script(responses=[[8, 1], [1], [1], [8, 8, 1]], rewards=[1.0, 0.0, 2.0, 2.0])
KNOWN = [name for name, entry in ALGORITHMS.items() if set(entry.roles) <= set(FAKES)]


def ppo(script: Script = TWO_ROWS, **settings):
    roles, log = fakes(script)
    config = PPOConfig(gamma=0.5, lam=0.5, whiten_advantages=False, kl=settings.pop("kl", KLControlConfig(coefficient=0.1)), **settings)
    return create_algorithm("ppo", roles, config), log


@pytest.mark.parametrize("name", KNOWN)
def test_the_trace_is_what_a_step_really_calls(name: str) -> None:
    """Order of calls, and the columns that each of them reads."""
    config = ALGORITHMS[name].load_config()()
    roles, log = fakes(FOUR_ROWS)
    create_algorithm(name, roles, config).step(prompts([7, 7, 9, 9]))
    stand_ins, recorder = traced_roles({role: CLASSES[role] for role in ALGORITHMS[name].roles})
    dataflow = trace(name, create_algorithm(name, stand_ins, config).step, INPUTS, recorder)
    models = [call for call in dataflow.calls if call.kind is not CallKind.controller]
    assert [f"{call.role}.{call.method}" for call in models] == log.names
    assert [set(call.reads) for call in models] == [set(seen.batch.columns) for seen in log]


def test_ppo_is_the_papers_seven_calls() -> None:
    """Six of models, in this order; compute_advantages, the seventh, stays on the controller."""
    algorithm, log = ppo()
    algorithm.step(prompts([7, 9]))
    assert log.names == [
        "actor.generate_sequences",
        "critic.compute_values",
        "reference.compute_ref_log_prob",
        "reward.compute_reward",
        "critic.update_critic",
        "actor.update_actor",
    ]


def test_ppo_advantages_by_hand() -> None:
    """KL per token (0.5, -1 | 0) times 0.1, the score at the end: rewards (-0.05, 1.1 | -1); deltas (-0.05, 0.1 | -1.25)."""
    algorithm, log = ppo()
    algorithm.step(prompts([7, 9]))
    update = log.last("actor.update_actor")
    assert update.ragged("advantages").values.tolist() == pytest.approx([-0.05 + 0.25 * 0.1, 0.1, -1.25])
    assert update.ragged("advantages").lengths.tolist() == [2, 1]
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == pytest.approx([0.475, 1.1, -1.0])


def test_ppo_whitens_over_all_tokens() -> None:
    roles, log = fakes(TWO_ROWS)
    config = PPOConfig(gamma=0.5, lam=0.5, kl=KLControlConfig(coefficient=0.1))
    create_algorithm("ppo", roles, config).step(prompts([7, 9]))
    plain = [-0.025, 0.1, -1.25]
    mean = sum(plain) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in plain) / 3)
    expected = [(value - mean) / deviation for value in plain]
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("scale_by_std", "expected"), [(True, 0.5 / math.sqrt(0.5)), (False, 0.5)])
def test_grpo_advantages_by_hand(scale_by_std: bool, expected: float) -> None:
    """Group 7 has rewards 1 and 0, group 9 twice 2: nothing to learn there. Lengths 2, 1, 1, 3."""
    roles, log = fakes(FOUR_ROWS)
    create_algorithm("grpo", roles, GRPOConfig(scale_by_std=scale_by_std)).step(prompts([7, 7, 9, 9]))
    advantages = log.last("actor.update_actor").ragged("advantages")
    assert advantages.values.tolist() == pytest.approx([expected, expected, -expected, 0, 0, 0, 0], rel=1e-4)
    assert advantages.lengths.tolist() == [2, 1, 1, 3]
    assert "critic.compute_values" not in log.names


def test_grpo_does_not_care_where_a_group_lies() -> None:
    script = Script(responses=[[1]] * 4, rewards=[1.0, 2.0, 0.0, 2.0])
    roles, log = fakes(script)
    create_algorithm("grpo", roles, GRPOConfig(scale_by_std=False)).step(prompts([7, 9, 7, 9]))
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == [0.5, 0, -0.5, 0]


@pytest.mark.parametrize("name", KNOWN)
def test_a_steps_metrics_describe_the_batch(name: str) -> None:
    roles, _ = fakes(FOUR_ROWS)
    metrics = create_algorithm(name, roles, ALGORITHMS[name].load_config()()).step(prompts([7, 7, 9, 9]))
    assert metrics["actor/loss"] == 1.0
    assert (metrics["reward/mean"], metrics["reward/min"], metrics["reward/max"]) == (1.25, 0.0, 2.0)
    assert metrics["reward/right"] == 0.25, "the reward function's own numbers"
    assert metrics["response_tokens/mean"] == 7 / 4 and metrics["tokens"] == 7 + 1 + 2 + 3 + 4
    assert metrics["response_tokens/finished"] == 1.0
    assert metrics["kl/reference"] == 0.0


@pytest.mark.parametrize("name", KNOWN)
def test_state_survives_a_checkpoint(name: str) -> None:
    roles, _ = fakes(FOUR_ROWS)
    config = ALGORITHMS[name].load_config()()
    algorithm, restored = create_algorithm(name, roles, config), create_algorithm(name, roles, config)
    algorithm.step(prompts([7, 7, 9, 9]))
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert restored.state_dict() == algorithm.state_dict()


def test_the_adaptive_kl_coefficient_moves_and_is_restored() -> None:
    """KL per response is (-0.5, 0), its mean -0.25 far below the target: down by 0.2 x 2 rows / horizon 10."""
    kl = KLControlConfig(coefficient=0.1, target=6.0, horizon=10)
    algorithm, _ = ppo(kl=kl)
    algorithm.step(prompts([7, 9]))
    assert algorithm.state_dict() == {"value": pytest.approx(0.1 * (1 - 0.2 * 2 / 10))}
    other, log = ppo(kl=kl)
    other.load_state_dict({"value": 0.0})
    other.step(prompts([7, 9]))
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == pytest.approx([0.5, 1.0, -1.0])


def test_ppo_without_a_reference_has_no_kl() -> None:
    roles, log = fakes(TWO_ROWS)
    roles["reference"] = NoColumn()
    config = PPOConfig(gamma=1.0, lam=1.0, whiten_advantages=False, kl=KLControlConfig(coefficient=0.0))
    metrics = create_algorithm("ppo", roles, config).step(prompts([7, 9]))
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == [1.0, 1.0, -1.0]
    assert "kl/reference" not in metrics and "ref_log_probs" not in log.last("actor.update_actor")


class NoColumn:
    """recipes.run.NoReference, by hand."""

    def compute_ref_log_prob(self, batch):
        return batch.select()


def test_mini_batches_reach_both_updates_alike() -> None:
    algorithm, log = ppo(FOUR_ROWS, num_mini_batches=2)
    algorithm.step(prompts([7, 7, 9, 9]))
    actor, critic = (log.last(name).tensor("mini_batch") for name in ("actor.update_actor", "critic.update_critic"))
    assert torch.equal(actor, critic) and sorted(actor.tolist()) == [0, 0, 1, 1]


def test_an_unknown_algorithm_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.name is 'sarsa'; known: ppo, grpo"):
        create_algorithm("sarsa", {}, PPOConfig())
