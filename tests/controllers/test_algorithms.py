"""Every algorithm against hand-written roles: order of calls, columns, and advantages computed
by hand."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from controllers import ALGORITHMS, create_algorithm
from controllers.dapo import DAPOConfig
from controllers.grpo import GRPOConfig
from controllers.grpo_cov import ClipCovConfig, CovConfig, KLCovConfig
from controllers.kl import KLControlConfig
from controllers.lagrange import LagrangeConfig
from controllers.loop import INPUTS
from controllers.ppo import PPOConfig
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.dataflow import CallKind
from hybridflow.tracing import trace, traced_roles
from tests.controllers.fakes import CLASSES, FAKES, Script, fakes, prompts, streams
from workers.losses.config import DPOLossConfig, PolicyLossConfig, ValueLossConfig

TWO_ROWS = Script(
    responses=[[8, 1], [1]],
    rewards=[1.0, -1.0],
    values=[[0.5, 1.0], [0.25]],
    log_probs=[[-1.0, -2.0], [-0.5]],
    ref_log_probs=[[-1.5, -1.0], [-0.5]],
)
FOUR_ROWS = Script(responses=[[8, 1], [1], [1], [8, 8, 1]], rewards=[1.0, 0.0, 2.0, 2.0])
LEARNABLE = Script(responses=FOUR_ROWS.responses, rewards=[1.0, 0.0, 2.0, 3.0])
"""Every prompt's samples differ, so that no algorithm asks for others."""
KNOWN = [name for name, entry in ALGORITHMS.items() if set(entry.roles) <= set(FAKES)]


def made(name: str, script: Script, **settings):
    """(algorithm, log) with two samples a prompt, as prompts([7, 7, 9, 9]) has."""
    roles, log = fakes(script)
    extra = {"k": 2} if name == "pass_at_k" else {}
    config = ALGORITHMS[name].load_config()(**{"samples_per_prompt": 2, **extra, **settings})
    return create_algorithm(name, roles, config, streams()), log


def advantages_of(name: str, script: Script, uid: list[int], **settings) -> list[float]:
    algorithm, log = made(name, script, **settings)
    algorithm.step(prompts(uid))
    return log.last("actor.update_actor").ragged("advantages").values.tolist()


def ppo(script: Script = TWO_ROWS, **settings):
    roles, log = fakes(script)
    config = PPOConfig(
        gamma=0.5,
        lam=0.5,
        whiten_advantages=False,
        kl=settings.pop("kl", KLControlConfig(coefficient=0.1)),
        **settings,
    )
    return create_algorithm("ppo", roles, config), log


@pytest.mark.parametrize("name", KNOWN)
def test_the_trace_is_what_a_step_really_calls(name: str) -> None:
    """Order of calls, and the columns that each of them reads."""
    algorithm, log = made(name, LEARNABLE)
    algorithm.step(prompts([7, 7, 9, 9]))
    placeholder_roles, recorder = traced_roles(
        {role: CLASSES[role] for role in ALGORITHMS[name].roles}
    )
    dataflow = trace(
        name, create_algorithm(name, placeholder_roles, algorithm.config).step, INPUTS, recorder
    )
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
    """KL per token (0.5, -1 | 0) times 0.1, the score at the end: rewards (-0.05, 1.1 | -1);
    deltas (-0.05, 0.1 | -1.25)."""
    algorithm, log = ppo()
    algorithm.step(prompts([7, 9]))
    update = log.last("actor.update_actor")
    assert update.ragged("advantages").values.tolist() == pytest.approx(
        [-0.05 + 0.25 * 0.1, 0.1, -1.25]
    )
    assert update.ragged("advantages").lengths.tolist() == [2, 1]
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == pytest.approx(
        [0.475, 1.1, -1.0]
    )


def test_ppo_whitens_over_all_tokens() -> None:
    roles, log = fakes(TWO_ROWS)
    config = PPOConfig(gamma=0.5, lam=0.5, kl=KLControlConfig(coefficient=0.1))
    create_algorithm("ppo", roles, config).step(prompts([7, 9]))
    plain = [-0.025, 0.1, -1.25]
    mean = sum(plain) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in plain) / 3)
    expected = [(value - mean) / deviation for value in plain]
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(("scale_by_std", "expected"), [(True, 0.5 / math.sqrt(0.5)), (False, 0.5)])
def test_grpo_advantages_by_hand(scale_by_std: bool, expected: float) -> None:
    """Group 7 has rewards 1 and 0, group 9 twice 2: nothing to learn there. Lengths 2, 1, 1, 3."""
    roles, log = fakes(FOUR_ROWS)
    create_algorithm("grpo", roles, GRPOConfig(scale_by_std=scale_by_std)).step(
        prompts([7, 7, 9, 9])
    )
    advantages = log.last("actor.update_actor").ragged("advantages")
    assert advantages.values.tolist() == pytest.approx(
        [expected, expected, -expected, 0, 0, 0, 0], rel=1e-4
    )
    assert advantages.lengths.tolist() == [2, 1, 1, 3]
    assert "critic.compute_values" not in log.names


def test_grpo_does_not_care_where_a_group_lies() -> None:
    script = Script(responses=[[1]] * 4, rewards=[1.0, 2.0, 0.0, 2.0])
    roles, log = fakes(script)
    create_algorithm("grpo", roles, GRPOConfig(scale_by_std=False)).step(prompts([7, 9, 7, 9]))
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == [0.5, 0, -0.5, 0]


@pytest.mark.parametrize("name", KNOWN)
def test_a_steps_metrics_describe_the_batch(name: str) -> None:
    algorithm, _ = made(name, LEARNABLE)
    metrics = algorithm.step(prompts([7, 7, 9, 9]))
    assert metrics["actor/loss"] == 1.0
    assert metrics["response_tokens/mean"] == 7 / 4 and metrics["tokens"] == 7 + 1 + 2 + 3 + 4
    assert metrics["response_tokens/finished"] == 1.0
    if name == "distillation":
        return
    assert (metrics["reward/mean"], metrics["reward/min"], metrics["reward/max"]) == (1.5, 0.0, 3.0)
    assert metrics["reward/right"] == 0.25, "the reward function's own numbers"
    reads_reference = "reference" in ALGORITHMS[name].roles and name != "online_dpo"
    assert metrics.get("kl/reference") == (0.0 if reads_reference else None)


@pytest.mark.parametrize("name", KNOWN)
def test_state_survives_a_checkpoint(name: str) -> None:
    (algorithm, _), (restored, _) = made(name, LEARNABLE), made(name, LEARNABLE)
    algorithm.step(prompts([7, 7, 9, 9]))
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert restored.state_dict() == algorithm.state_dict()


def test_the_adaptive_kl_coefficient_moves_and_is_restored() -> None:
    """KL per response is (-0.5, 0), its mean -0.25 far below the target: down by 0.2 x 2 rows /
    horizon 10."""
    kl = KLControlConfig(coefficient=0.1, target=6.0, horizon=10)
    algorithm, _ = ppo(kl=kl)
    assert algorithm.step(prompts([7, 9]))["kl/coefficient"] == 0.1, (
        "the one that this step's rewards hold"
    )
    assert algorithm.state_dict() == {"value": pytest.approx(0.1 * (1 - 0.2 * 2 / 10))}
    assert algorithm.step(prompts([7, 9]))["kl/coefficient"] == pytest.approx(0.096)
    other, log = ppo(kl=kl)
    other.load_state_dict({"value": 0.0})
    assert other.step(prompts([7, 9]))["kl/coefficient"] == 0.0
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == pytest.approx(
        [0.5, 1.0, -1.0]
    )


@pytest.mark.parametrize("name", ["ppo", "safe_rlhf", "remax", "rloo", "reinforce_plus_plus"])
def test_the_kl_coefficient_of_the_reward_is_logged(name: str) -> None:
    for settings, expected in ((KLControlConfig(coefficient=0.1), 0.1), (KLControlConfig(), None)):
        algorithm, _ = made(name, LEARNABLE, kl=settings)
        assert algorithm.step(prompts([7, 7, 9, 9])).get("kl/coefficient") == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOConfig(num_mini_batches=0), "algorithm.num_mini_batches is 0; use at least 1"),
        (
            lambda: KLControlConfig(coefficient=-0.1),
            "algorithm.kl.coefficient is -0.1; choose more than 0",
        ),
        (
            lambda: KLControlConfig(coefficient=0.1, target=-1),
            "algorithm.kl.target is -1 and .* choose target >= 0",
        ),
        (
            lambda: KLControlConfig(coefficient=0.1, horizon=0),
            "algorithm.kl.horizon 0; .* horizon >= 1",
        ),
        (lambda: KLCovConfig(fraction=0), "algorithm.fraction is 0; choose 0 < fraction <= 1"),
        (
            lambda: ClipCovConfig(low=5, high=5),
            "algorithm.low is 5 and algorithm.high 5; choose low < high",
        ),
        (lambda: DAPOConfig(max_rounds=0), "algorithm.max_rounds is 0; use at least 1"),
        (
            lambda: LagrangeConfig(initial=6),
            r"algorithm.lagrange.initial is 6; choose 0 < initial <= maximum \(5.0\)",
        ),
        (lambda: LagrangeConfig(learning_rate=-1), "algorithm.lagrange.learning_rate is -1; use 0"),
        (lambda: LagrangeConfig(window=0), "algorithm.lagrange.window is 0; choose at least 1"),
        (lambda: DPOLossConfig(beta=0), "algorithm.loss.beta is 0; .* choose more than 0"),
        (
            lambda: DPOLossConfig(label_smoothing=0.5),
            "algorithm.loss.label_smoothing is 0.5; choose 0 <= label_smoothing < 0.5",
        ),
        (lambda: ValueLossConfig(clip=-1), "critic.loss.clip is -1; choose more than 0"),
        (
            lambda: PolicyLossConfig(kl_coefficient=-1),
            "actor.loss.kl_coefficient is -1; use 0 or more",
        ),
    ],
)
def test_a_setting_out_of_its_range_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_selects_tokens_is_for_the_variants_to_say() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?select"):
        CovConfig()  # type: ignore[abstract]


def test_rloo_by_hand() -> None:
    """Scores minus a tenth of the KL of the response, (-0.5 | 0): 1.05 and -1; the other's
    score is the baseline."""
    kl = KLControlConfig(coefficient=0.1)
    assert advantages_of("rloo", TWO_ROWS, [7, 7], kl=kl) == pytest.approx([2.05, 2.05, -2.05])


def test_remax_by_hand() -> None:
    """Rewards per token (-0.05, 1.1 | -1), to go (1.05, 1.1 | -1), minus the greedy responses'
    0.5 and 0.25."""
    script = replace(TWO_ROWS, rewards=[1.0, -1.0, 0.5, 0.25])
    algorithm, log = made(
        "remax", script, samples_per_prompt=1, kl=KLControlConfig(coefficient=0.1)
    )
    algorithm.step(prompts([7, 9]))
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == pytest.approx(
        [0.55, 0.6, -1.25]
    )
    generations = [seen.do_sample for seen in log if seen.name == "actor.generate_sequences"]
    assert generations == [True, False] and log.names.count("reward.compute_reward") == 2


def test_reinforce_plus_plus_by_hand() -> None:
    to_go = [1.05, 1.1, -1.0]
    mean, deviation = statistics.fmean(to_go), statistics.pstdev(to_go)
    expected = [(value - mean) / deviation for value in to_go]
    kl = KLControlConfig(coefficient=0.1)
    assert advantages_of("reinforce_plus_plus", TWO_ROWS, [7, 9], kl=kl) == pytest.approx(
        expected, rel=1e-5
    )


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """Rewards 1, 0 | 2, 2 minus the groups' means on 2, 1, 1, 3 tokens."""
    centred = [0.5, 0.5, -0.5, 0, 0, 0, 0]
    mean, deviation = statistics.fmean(centred), statistics.pstdev(centred)
    expected = [(value - mean) / deviation for value in centred]
    assert advantages_of("reinforce_plus_plus_baseline", FOUR_ROWS, [7, 7, 9, 9]) == pytest.approx(
        expected, rel=1e-5, abs=1e-6
    )


def test_opo_by_hand() -> None:
    """Group 7: lengths 2 and 1 weigh rewards 1 and 0, so the baseline is 2/3."""
    assert advantages_of("opo", FOUR_ROWS, [7, 7, 9, 9]) == pytest.approx(
        [1 / 3, 1 / 3, -2 / 3, 0, 0, 0, 0]
    )


def test_pass_at_k_by_hand() -> None:
    """k = 1 of two samples, one of them right: mean 1/2, deviation 1/2."""
    assert advantages_of("pass_at_k", FOUR_ROWS, [7, 7, 9, 9], k=1) == pytest.approx(
        [1, 1, -1, 0, 0, 0, 0]
    )


def test_dr_grpo_is_grpo_without_the_deviation() -> None:
    plain = advantages_of("grpo", FOUR_ROWS, [7, 7, 9, 9], scale_by_std=False)
    assert (
        advantages_of("dr_grpo", FOUR_ROWS, [7, 7, 9, 9]) == plain == [0.5, 0.5, -0.5, 0, 0, 0, 0]
    )


def test_the_selection_of_tokens_by_hand() -> None:
    """Advantages 1, 1, -1 and log-probs -1, -2, -0.5 (means 1/3 and -7/6): covariances 1/9,
    -5/9, -8/9."""
    for name, selected in {
        "kl_cov": [True, False, False],
        "clip_cov": [True, False, False],
    }.items():
        bounds = {"low": 0.0, "high": 1.0} if name == "clip_cov" else {}
        algorithm, log = made(name, TWO_ROWS, fraction=0.3, scale_by_std=False, **bounds)
        algorithm.step(prompts([7, 7]))
        assert (
            log.last("actor.update_actor").ragged("covariance_selected").values.tolist() == selected
        ), name


def test_dapo_replaces_prompts_that_teach_nothing() -> None:
    """Group 9 is all right and is replaced by prompt 100, whose samples differ; nothing that
    differs is lost."""
    script = Script(
        responses=[[1], [1], [1], [1], [8, 1], [1]], rewards=[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    )
    algorithm, log = made("dapo", script)
    metrics = algorithm.step(prompts([7, 7, 9, 9]))
    assert [len(seen.batch) for seen in log if seen.name == "actor.generate_sequences"] == [4, 2]
    step = 0.5 / math.sqrt(0.5)
    update = log.last("actor.update_actor")
    assert update.ragged("advantages").values.tolist() == pytest.approx(
        [step, -step, -step, -step, step], rel=1e-4
    )
    rounds = {
        name.partition("/")[2]: value
        for name, value in metrics.items()
        if name.startswith("dynamic_sampling")
    }
    assert rounds == {"rounds": 2, "prompts_kept": 2, "prompts_filtered": 1}


def test_dapo_ends_where_nothing_teaches() -> None:
    algorithm, log = made("dapo", Script(responses=[[1]], rewards=[1.0]), max_rounds=3)
    metrics = algorithm.step(prompts([7, 7, 9, 9]))
    assert log.names.count("actor.generate_sequences") == 3
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == [0.0] * 4, (
        "the first round's, and no step of the policy"
    )
    assert (
        metrics["dynamic_sampling/prompts_kept"],
        metrics["dynamic_sampling/prompts_filtered"],
    ) == (0, 6)


def test_dapo_shapes_overlong_responses() -> None:
    """Of 4 tokens at most, 2 of them buffer: three tokens cost half the penalty of 0.4."""
    script = Script(responses=[[8, 8, 1], [1]], rewards=[1.0, 0.0])
    shaped = advantages_of(
        "dapo",
        script,
        [7, 7],
        overlong_buffer_tokens=2,
        overlong_penalty=0.4,
        max_response_tokens=4,
    )
    assert shaped == pytest.approx([1 / math.sqrt(2)] * 3 + [-1 / math.sqrt(2)], rel=1e-4), (
        "scaled by the deviation of 0.8 and 0"
    )
    script.rewards = [0.1, 0.0]
    shaped = advantages_of(
        "dapo",
        script,
        [7, 7],
        overlong_buffer_tokens=2,
        overlong_penalty=0.4,
        max_response_tokens=4,
    )
    assert shaped[0] < 0 < shaped[3], "0.1 - 0.2 is less than 0"


def test_safe_rlhf_by_hand() -> None:
    """KL (0.5, -1 | 0) halves: rewards (-0.025, 1.05 | -1), costs (0.025, 1.95 | 0.5); gamma =
    lam = 1, so advantages are what is to come minus the value. ln lambda = 0 moves by 0.1 x the
    mean cost of 1.25."""
    script = replace(TWO_ROWS, costs=[2.0, 0.5])
    settings = {
        "gamma": 1.0,
        "lam": 1.0,
        "whiten_advantages": False,
        "kl": KLControlConfig(coefficient=0.1),
        "samples_per_prompt": 1,
    }
    algorithm, log = made("safe_rlhf", script, **settings)
    metrics = algorithm.step(prompts([7, 9]))
    multiplier = math.exp(0.125)
    rewards, costs = [1.025 - 0.5, 1.05 - 1.0, -1.0 - 0.25], [1.975 - 0.5, 1.95 - 1.0, 0.5 - 0.25]
    expected = [
        (r - multiplier * c) / (1 + multiplier) for r, c in zip(rewards, costs, strict=True)
    ]
    assert log.last("actor.update_actor").ragged("advantages").values.tolist() == pytest.approx(
        expected, rel=1e-5
    )
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == pytest.approx(
        [1.025, 1.05, -1.0]
    )
    assert log.last("cost_critic.update_critic").ragged("returns").values.tolist() == pytest.approx(
        [1.975, 1.95, 0.5]
    )
    assert (
        metrics["cost/multiplier"] == pytest.approx(multiplier)
        and metrics["cost/mean"] == metrics["cost/window_mean"] == 1.25
    )
    assert metrics["critic/loss"] == metrics["cost_critic/loss"] == 2.0


def test_pretraining_rows_join_the_actors_update_only() -> None:
    class Texts:
        def take(self, num_rows: int = 0) -> Batch:
            return Batch.of(
                prompt_ids=Ragged.of([[3], [3], [3]]), response_ids=Ragged.of([[4, 5], [6], [7]])
            )

    roles, log = fakes(LEARNABLE)
    config = ALGORITHMS["safe_rlhf"].load_config()(num_mini_batches=2)
    create_algorithm("safe_rlhf", roles, config, {"pretraining": Texts()}).step(
        prompts([7, 7, 9, 9])
    )
    update = log.last("actor.update_actor")
    assert update.tensor("pretrain").tolist() == [False] * 4 + [True] * 3
    assert update.tensor("mini_batch").tolist()[4:] == [0, 1, 0]
    assert update.ragged("advantages").values.tolist()[-4:] == [0.0] * 4
    assert [row.tolist() for row in update.ragged("response_ids").unbind()][4:] == [
        [4, 5],
        [6],
        [7],
    ]
    assert len(log.last("critic.update_critic")) == len(log.last("cost_critic.update_critic")) == 4


def test_ppo_without_a_reference_has_no_kl() -> None:
    roles, log = fakes(TWO_ROWS)
    roles["reference"] = NoColumn()
    config = PPOConfig(
        gamma=1.0, lam=1.0, whiten_advantages=False, kl=KLControlConfig(coefficient=0.0)
    )
    metrics = create_algorithm("ppo", roles, config).step(prompts([7, 9]))
    assert log.last("critic.update_critic").ragged("returns").values.tolist() == [1.0, 1.0, -1.0]
    assert "kl/reference" not in metrics and "ref_log_probs" not in log.last("actor.update_actor")


class NoColumn:
    """recipes.roles.NoReference, by hand."""

    def compute_ref_log_prob(self, batch):
        return batch.select()


def test_mini_batches_reach_both_updates_alike() -> None:
    algorithm, log = ppo(FOUR_ROWS, num_mini_batches=2)
    algorithm.step(prompts([7, 7, 9, 9]))
    actor, critic = (
        log.last(name).tensor("mini_batch")
        for name in ("actor.update_actor", "critic.update_critic")
    )
    assert torch.equal(actor, critic) and sorted(actor.tolist()) == [0, 0, 1, 1]


def test_an_unknown_algorithm_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.name is 'sarsa'; known: ppo, safe_rlhf, "):
        create_algorithm("sarsa", {}, PPOConfig())
