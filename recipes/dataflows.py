"""The algorithms' dataflows for planning: traced from their pages, and the paper's as plain data.

    dataflow_of("ppo")      # runs the page's step on abstract batches; loads torch, no model library

Every model of a page is in its dataflow; without(dataflow, "reference") is the same step where no
coefficient asks for one. PAPER is what figure 1 of the paper draws, for benchmarks and tests that
need no pages (tests/mapping/test_dataflows.py compares).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import get_type_hints

from hybridflow.dataflow import Call, CallKind, Dataflow

GENERATE = "actor.generate_sequences"
ADVANTAGES = "controller.compute_advantages"


@lru_cache(maxsize=64)
def dataflow_of(algorithm: str) -> Dataflow:
    """The traced step of an entry of ALGORITHMS, with its default settings; a name that can't be
    planned lists those that can.

    The roles are the abstract ones that the page asks for.
    """
    from controllers import ENTRIES, algorithm_entry, create_algorithm
    from controllers.loop import INPUTS
    from hybridflow.tracing import trace, traced_roles

    if algorithm not in ENTRIES:
        raise ValueError(
            f"algorithm is {algorithm!r}, which is not known; known: {', '.join(planned())}"
        )
    if algorithm not in planned():
        raise ValueError(
            f"algorithm is {algorithm!r}, which answers no prompts and is not planned; known: "
            f"{', '.join(planned())}"
        )
    entry = algorithm_entry(algorithm)
    page = entry.load()
    hints = get_type_hints(page.__init__)
    roles, recorder = traced_roles({role: hints[role] for role in entry.roles})
    return trace(
        algorithm, create_algorithm(algorithm, roles, entry.load_config()()).step, INPUTS, recorder
    )


def planned() -> tuple[str, ...]:
    """The algorithms whose steps begin with prompts; training on existing rows needs no
    placement of several models."""
    from controllers import ALGORITHMS

    return tuple(name for name, entry in ALGORITHMS.items() if entry.answers_prompts)


def without(dataflow: Dataflow, role: str) -> Dataflow:
    """The step without the calls of `role`; what they wrote must be optional to whoever reads
    it."""
    removed = {call.name for call in dataflow.calls if call.role == role}
    calls = []
    for call in dataflow.calls:
        if call.role != role:
            depends_on = tuple(name for name in call.depends_on if name not in removed)
            calls.append(replace(call, depends_on=depends_on))
    return replace(dataflow, calls=tuple(calls))


def _call(name: str, kind: CallKind, *depends_on: str) -> Call:
    role, method = name.split(".")
    return Call(name=name, role=role, method=method.split("#")[0], kind=kind, depends_on=depends_on)


def _step(algorithm: str, before: tuple[Call, ...], *, critic: bool) -> Dataflow:
    """Generation, the calls `before` the advantages, the advantages, the updates."""
    advantages = _call(ADVANTAGES, CallKind.controller, *(call.name for call in before))
    updates = []
    if critic:
        updates.append(_call("critic.update_critic", CallKind.training, ADVANTAGES))
    updates.append(_call("actor.update_actor", CallKind.training, ADVANTAGES))
    return Dataflow(
        algorithm=algorithm,
        calls=(_call(GENERATE, CallKind.generation), *before, advantages, *updates),
        inputs=("prompt_ids",),
    )


VALUES = _call("critic.compute_values", CallKind.inference, GENERATE)
REFERENCE = _call("reference.compute_ref_log_prob", CallKind.inference, GENERATE)
REWARD = _call("reward.compute_reward", CallKind.inference, GENERATE)
COST = _call("cost.compute_cost", CallKind.inference, GENERATE)
PRETRAIN_LOSS = _call("actor.compute_loss", CallKind.inference)
GREEDY = _call("actor.generate_sequences#2", CallKind.generation)
BASELINE = _call("reward.compute_reward#2", CallKind.inference, "actor.generate_sequences#2")

PAPER: dict[str, Dataflow] = {
    dataflow.algorithm: dataflow
    for dataflow in (
        _step("ppo", (VALUES, REFERENCE, REWARD), critic=True),
        _step("grpo", (REFERENCE, REWARD), critic=False),
        _step("remax", (GREEDY, REFERENCE, REWARD, BASELINE), critic=False),
        _step("safe_rlhf", (VALUES, REFERENCE, REWARD, COST, PRETRAIN_LOSS), critic=True),
    )
}
"""docs/paper.md section 5. ReMax generates twice and scores both; Safe-RLHF adds the cost model
and the pretraining loss."""
