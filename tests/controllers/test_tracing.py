"""Tracing: the graphs of PPO and GRPO, and steps that cannot work, found before any role does
anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from controllers import ALGORITHMS, create_algorithm
from controllers.kl import KLCoefficient
from controllers.loop import INPUTS
from controllers.ppo import PPOConfig, compute_advantages
from hybridflow.batch import Batch
from hybridflow.dataflow import CallKind, Dataflow
from hybridflow.tracing import to_mermaid, trace, traced_roles
from tests.controllers.fakes import CLASSES


def traced(name: str) -> Dataflow:
    placeholder_roles, recorder = traced_roles(
        {role: CLASSES[role] for role in ALGORITHMS[name].roles}
    )
    return trace(
        name,
        create_algorithm(name, placeholder_roles, ALGORITHMS[name].load_config()()).step,
        INPUTS,
        recorder,
    )


def trace_step(step: Callable[[Any, Batch], object]) -> Dataflow:
    """A step written in the test: step(roles, prompts)."""
    placeholder_roles, recorder = traced_roles(CLASSES)
    return trace("test", lambda prompts: step(Roles(placeholder_roles), prompts), INPUTS, recorder)


class Roles:
    def __init__(self, roles: dict[str, Any]) -> None:
        self.actor, self.critic, self.reference, self.reward = (
            roles[name] for name in ("actor", "critic", "reference", "reward")
        )


def test_ppos_graph() -> None:
    dataflow = traced("ppo")
    assert {call.name: set(call.depends_on) for call in dataflow.calls} == {
        "actor.generate_sequences": set(),
        "critic.compute_values": {"actor.generate_sequences"},
        "reference.compute_ref_log_prob": {"actor.generate_sequences"},
        "reward.compute_reward": {"actor.generate_sequences"},
        "controller.compute_advantages": {
            "actor.generate_sequences",
            "critic.compute_values",
            "reference.compute_ref_log_prob",
            "reward.compute_reward",
        },
        "critic.update_critic": {
            "actor.generate_sequences",
            "critic.compute_values",
            "controller.compute_advantages",
        },
        "actor.update_actor": {
            "actor.generate_sequences",
            "reference.compute_ref_log_prob",
            "controller.compute_advantages",
        },
    }
    kinds = [call.kind for call in dataflow.calls]
    assert kinds == [
        CallKind.generation,
        *[CallKind.inference] * 3,
        CallKind.controller,
        *[CallKind.training] * 2,
    ]
    assert (
        dataflow.roles == ("actor", "critic", "reference", "reward") and dataflow.inputs == INPUTS
    )


def test_grpos_graph_has_no_critic() -> None:
    dataflow = traced("grpo")
    assert dataflow.roles == ("actor", "reference", "reward")
    assert set(dataflow.call("controller.compute_advantages").depends_on) == {
        "actor.generate_sequences",
        "reward.compute_reward",
    }
    assert "reference.compute_ref_log_prob" in dataflow.call("actor.update_actor").depends_on


def test_a_missing_column_names_its_reader() -> None:
    def step(roles: Roles, prompts: Batch) -> None:
        batch = prompts | roles.actor.generate_sequences(prompts)
        batch |= roles.critic.compute_values(batch)
        config = PPOConfig()
        compute_advantages(batch, config, KLCoefficient(config.kl))

    with pytest.raises(
        ValueError,
        match=(
            r"compute_advantages reads rewards, which no earlier call wrote; the batch has "
            r"prompt_ids, "
        ),
    ):
        trace_step(step)


def test_a_reader_before_its_writer_is_named() -> None:
    def step(roles: Roles, prompts: Batch) -> None:
        roles.reward.compute_reward(prompts)

    with pytest.raises(
        ValueError,
        match=(
            r"reward\.compute_reward reads response_ids, finish_reason, which no earlier call "
            r"wrote"
        ),
    ):
        trace_step(step)


def test_a_forgotten_join_is_explained() -> None:
    def step(roles: Roles, prompts: Batch) -> None:
        batch = prompts | roles.actor.generate_sequences(prompts)
        roles.critic.compute_values(batch)
        roles.critic.update_critic(batch)

    with pytest.raises(
        ValueError,
        match=r"critic\.update_critic reads returns, .* join its result with `batch \|= \.\.\.`",
    ):
        trace_step(step)


def test_a_column_written_twice_is_named() -> None:
    def step(roles: Roles, prompts: Batch) -> None:
        batch = prompts | roles.actor.generate_sequences(prompts)
        batch |= roles.critic.compute_values(batch)
        batch |= roles.critic.compute_values(batch)

    writers = "values is written by critic.compute_values and critic.compute_values#2"
    with pytest.raises(
        ValueError,
        match=r"columns \['values'\] are in both; rename or drop them in one; " + writers,
    ):
        trace_step(step)


def test_reading_numbers_outside_a_marked_function_is_explained() -> None:
    def step(roles: Roles, prompts: Batch) -> None:
        batch = prompts | roles.actor.generate_sequences(prompts)
        batch |= roles.reward.compute_reward(batch)
        if batch.tensor("rewards").mean() > 0:
            roles.critic.compute_values(batch)

    with pytest.raises(
        ValueError,
        match=r"reads a column of reward\.compute_reward on the controller .* marked @on_controller",
    ):
        trace_step(step)


def test_an_unknown_method_lists_the_known() -> None:
    with pytest.raises(
        AttributeError, match=r"reward: no remote method 'score'; it has compute_reward"
    ):
        trace_step(lambda roles, prompts: roles.reward.score(prompts))


def test_calls_of_one_name_are_numbered_and_wait_for_the_weights() -> None:
    """ReMax's second generation, and a generation after an update."""

    def step(roles: Roles, prompts: Batch) -> None:
        batch = prompts | roles.actor.generate_sequences(prompts)
        roles.actor.generate_sequences(prompts)
        batch |= roles.reward.compute_reward(batch)
        batch |= roles.critic.compute_values(batch)
        config = PPOConfig()
        batch |= compute_advantages(batch, config, KLCoefficient(config.kl))
        roles.actor.update_actor(batch)
        roles.actor.generate_sequences(prompts)

    dataflow = trace_step(step)
    assert dataflow.call("actor.generate_sequences#2").depends_on == ()
    assert dataflow.call("actor.generate_sequences#3").depends_on == ("actor.update_actor",)
    assert "-->|weights|" in to_mermaid(dataflow)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_drawing_has_every_call_and_every_dependency(name: str) -> None:
    dataflow = traced(name)
    lines = to_mermaid(dataflow).splitlines()
    assert lines[0] == "flowchart LR"
    names = dict(
        re.findall(r'^  (n\d+)[^"\n]*"([^"\n]+)".*$', "\n".join(lines), flags=re.MULTILINE)
    )
    assert sorted(names.values()) == sorted(call.name for call in dataflow.calls)
    edges = set()
    for source, target in re.findall(
        r"^  (n\d+) -->\|.+\| (n\d+)$", "\n".join(lines), flags=re.MULTILINE
    ):
        edges.add((names[source], names[target]))
    expected = set()
    for call in dataflow.calls:
        expected.update((source, call.name) for source in call.depends_on)
    assert edges == expected
    assert "  prompts -->|prompt_ids, uid, sample| n0" in lines


def test_a_function_that_chooses_rows_passes_the_batch_on() -> None:
    """DAPO: whoever comes after it reads what was there before, and depends on it where it
    reads what it wrote."""
    dataflow = traced("dapo")
    assert dataflow.call("controller.with_signal").reads == ("uid", "rewards")
    assert "actor.generate_sequences" in dataflow.call("actor.update_actor").depends_on
    text = traced("safe_rlhf")
    assert "controller.with_pretraining" in text.call("actor.update_actor").depends_on
    assert "controller.with_pretraining" not in text.call("critic.update_critic").depends_on
