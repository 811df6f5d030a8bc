"""Distillation, rejection sampling, online DPO and the judge's GRPO: what each page passes on,
against hand-computed choices."""

from __future__ import annotations

import pytest

from controllers import create_algorithm
from controllers.algorithm_base import AlgorithmConfig
from controllers.distillation import DistillationConfig
from controllers.evaluation import Evaluate, EvaluateConfig, measure, pass_at_k
from controllers.generative_reward import GenerativeRewardConfig
from controllers.online_dpo import OnlineDPOConfig
from controllers.rejection_sampling import RejectionSamplingConfig
from tests.controllers.fakes import Script, fakes, prompts

RESPONSES = [[1], [2, 1], [3, 1], [4], [5, 1], [6]]
UIDS = [7, 7, 7, 9, 9, 9]
SCRIPT = Script(responses=RESPONSES, rewards=[0.5, 1.0, 0.0, 0.25, 0.25, 0.25])


def test_the_best_answer_of_each_prompt_is_imitated() -> None:
    roles, log = fakes(SCRIPT)
    metrics = create_algorithm("rejection_sampling", roles, RejectionSamplingConfig()).step(
        prompts(UIDS)
    )
    update = log.last("actor.update_supervised")
    assert [ids.tolist() for ids in update.ragged("response_ids").unbind()] == [[2, 1], [4]], (
        "the first of equals"
    )
    assert [len(ids) for ids in update.ragged("prompt_ids").unbind()] == [2, 4], (
        "each with its own prompt"
    )
    assert (metrics["best/rows"], metrics["best/reward"], metrics["reward/mean"]) == (
        2.0,
        0.625,
        0.375,
    )
    create_algorithm("rejection_sampling", roles, RejectionSamplingConfig(min_reward=0.5)).step(
        prompts(UIDS)
    )
    assert len(log.last("actor.update_supervised")) == 1


def test_best_and_worst_are_a_pair_where_the_judge_sees_a_difference() -> None:
    roles, log = fakes(SCRIPT)
    metrics = create_algorithm("online_dpo", roles, OnlineDPOConfig()).step(prompts(UIDS))
    update = log.last("actor.update_dpo")
    assert [ids.tolist() for ids in update.ragged("response_ids").unbind()] == [[2, 1], [3, 1]]
    assert update.tensor("chosen").tolist() == [True, False] and update.tensor("pair").tolist() == [
        7,
        7,
    ]
    assert metrics["pairs"] == 1.0 and "reward.compute_reward" not in log.names, "the judge decides"
    with pytest.raises(ValueError, match="use at least 2"):
        OnlineDPOConfig(samples_per_prompt=1)


def test_the_teacher_sees_the_students_answers() -> None:
    script = Script(
        responses=RESPONSES,
        rewards=[],
        ref_log_probs=[[-float(i)] * len(ids) for i, ids in enumerate(RESPONSES)],
    )
    roles, log = fakes(script)
    create_algorithm("distillation", roles, DistillationConfig(num_mini_batches=2)).step(
        prompts(UIDS)
    )
    update = log.last("actor.update_distilled")
    assert update.ragged("teacher_log_probs").values.tolist() == [0, -1, -1, -2, -2, -3, -4, -4, -5]
    assert sorted(update.tensor("mini_batch").tolist()) == [0, 0, 0, 1, 1, 1]


def test_the_judges_verdict_is_grpos_reward() -> None:
    roles, log = fakes(SCRIPT)
    create_algorithm("generative_reward", roles, GenerativeRewardConfig(scale_by_std=False)).step(
        prompts(UIDS)
    )
    advantages = log.last("actor.update_actor").ragged("advantages")
    assert [row[0].item() for row in advantages.unbind()] == [0.0, 0.5, -0.5, 0.0, 0.0, 0.0]


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    from itertools import combinations, product

    passed = [3, 0, 1]
    for k in (1, 2, 4, 5):
        draws = []
        for num_passed, subset in product(passed, combinations(range(5), k)):
            draws.append(min(subset) < num_passed)
        assert pass_at_k(passed, 5, k) == pytest.approx(sum(draws) / len(draws))
    assert EvaluateConfig(samples_per_prompt=6).ks == [1, 2, 4] and EvaluateConfig().ks == [1]
    with pytest.raises(ValueError, match=r"pass_at has 3, and algorithm\.samples_per_prompt is 2"):
        EvaluateConfig(samples_per_prompt=2, pass_at=[3])
    assert issubclass(EvaluateConfig, AlgorithmConfig)


def test_a_reward_equal_to_the_bound_has_passed() -> None:
    """Rewards are float32, where 0.9 is 0.89999998."""
    roles, _ = fakes(Script(responses=[[1]], rewards=[0.9, 0.8]))
    asked = Evaluate(
        generator=roles["actor"], reward=roles["reward"], config=EvaluateConfig(success_reward=0.9)
    )
    assert measure([asked.answer(prompts([7, 9]))], asked.config)["pass@1"] == 0.5
