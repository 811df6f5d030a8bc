"""The traced dataflows are what the paper draws, as far as time depends on it, and every
algorithm's step can be planned."""

from __future__ import annotations

import pytest

from controllers import ALGORITHMS
from hybridflow.dataflow import CallKind, Dataflow
from recipes.dataflows import PAPER, dataflow_of, without
from recipes.mapping_question import to_setting
from recipes.plan import SCALAR_ROLES, to_config, to_question


def calls(dataflow: Dataflow) -> list[tuple[str, str, CallKind]]:
    return [
        (call.name, call.role, call.kind)
        for call in dataflow.calls
        if call.kind is not CallKind.controller
    ]


@pytest.mark.parametrize(
    "algorithm", [name for name in ("ppo", "grpo", "remax") if name in ALGORITHMS]
)
def test_pages_make_the_papers_calls(algorithm):
    assert sorted(calls(dataflow_of(algorithm))) == sorted(calls(PAPER[algorithm]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_is_planned_from_its_page(algorithm):
    dataflow = dataflow_of(algorithm)
    assert dataflow.algorithm == algorithm
    assert set(dataflow.roles) == set(ALGORITHMS[algorithm].roles)
    actor = [call for call in dataflow.calls if call.role == "actor"]
    assert actor[0].name == "actor.generate_sequences" and actor[-1].kind is CallKind.training
    arguments = [f"algorithm={algorithm}", "model=llama-7b", "cluster=2x8xA100-80GB", "engine=fsdp"]
    setting = to_setting(to_question(to_config(arguments)))
    assert setting.roles == dataflow.roles
    assert all(setting.models[role].scalar_head for role in setting.roles if role in SCALAR_ROLES)
    schedule = setting.schedule(dict.fromkeys(setting.roles, "main"))
    assert schedule.makespan([1.0] * len(dataflow.calls)) >= len(setting.roles)


def test_a_role_can_be_left_out():
    lean = without(dataflow_of("ppo"), "reference")
    assert lean.roles == ("actor", "critic", "reward")
    assert all("reference" not in name for call in lean.calls for name in call.depends_on)


def test_unknown_algorithm_lists_the_known():
    with pytest.raises(ValueError, match="known: ppo"):
        dataflow_of("sarsa")
