"""The plain-data dataflows are what tracing the controllers' pages gives, as far as time depends on it."""

from __future__ import annotations

import pytest

from controllers import ALGORITHMS, create_algorithm
from controllers.loop import INPUTS
from hybridflow.dataflow import CallKind
from hybridflow.tracing import trace, traced_roles
from recipes.dataflows import STANDARD, dataflow_of
from workers.roles import Actor, Critic, Reference, Reward

ROLES = {"actor": Actor, "critic": Critic, "reference": Reference, "reward": Reward}


@pytest.mark.parametrize("algorithm", [name for name in STANDARD if name in ALGORITHMS and set(ALGORITHMS[name].roles) <= set(ROLES)])
def test_standard_dataflows_have_the_traced_calls(algorithm):
    stand_ins, recorder = traced_roles({role: ROLES[role] for role in ALGORITHMS[algorithm].roles})
    step = create_algorithm(algorithm, stand_ins, ALGORITHMS[algorithm].load_config()()).step
    traced = [call for call in trace(algorithm, step, INPUTS, recorder).calls if call.kind is not CallKind.controller]
    plain = [call for call in dataflow_of(algorithm).calls if call.kind is not CallKind.controller]
    assert [(call.name, call.role, call.kind) for call in traced] == [(call.name, call.role, call.kind) for call in plain]


def test_unknown_algorithm_lists_the_known():
    with pytest.raises(ValueError, match="known: ppo"):
        dataflow_of("sft")
