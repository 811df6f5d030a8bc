"""The algorithms' dataflows as plain data, for planning without loading a model library.

`dataflow_of` is the only way in. For an algorithm whose page exists in controllers/ the traced graph has the same calls
and the same order (tests/mapping/test_dataflows.py compares them).
"""

from __future__ import annotations

from hybridflow.dataflow import Call, CallKind, Dataflow

GENERATE = "actor.generate_sequences"
ADVANTAGES = "controller.compute_advantages"


def _call(name: str, kind: CallKind, *depends_on: str) -> Call:
    role, method = name.split(".")
    return Call(name=name, role=role, method=method.split("#")[0], kind=kind, depends_on=depends_on)


def _step(algorithm: str, before: tuple[Call, ...], *, critic: bool) -> Dataflow:
    """Generation, the calls `before` the advantages, the advantages, the updates."""
    advantages = _call(ADVANTAGES, CallKind.controller, *(call.name for call in before))
    updates = [_call("critic.update_critic", CallKind.training, ADVANTAGES)] if critic else []
    updates.append(_call("actor.update_actor", CallKind.training, ADVANTAGES))
    return Dataflow(
        algorithm=algorithm, calls=(_call(GENERATE, CallKind.generation), *before, advantages, *updates), inputs=("prompt_ids",)
    )


VALUES = _call("critic.compute_values", CallKind.inference, GENERATE)
REFERENCE = _call("reference.compute_ref_log_prob", CallKind.inference, GENERATE)
REWARD = _call("reward.compute_reward", CallKind.inference, GENERATE)
COST = _call("cost.compute_cost", CallKind.inference, GENERATE)
PRETRAIN_LOSS = _call("actor.compute_loss", CallKind.inference)
GREEDY = _call("actor.generate_sequences#2", CallKind.generation)
BASELINE = _call("reward.compute_reward#2", CallKind.inference, "actor.generate_sequences#2")

STANDARD: dict[str, Dataflow] = {
    dataflow.algorithm: dataflow
    for dataflow in (
        _step("ppo", (VALUES, REFERENCE, REWARD), critic=True),
        _step("grpo", (REFERENCE, REWARD), critic=False),
        _step("rloo", (REFERENCE, REWARD), critic=False),
        _step("remax", (GREEDY, REFERENCE, REWARD, BASELINE), critic=False),
        _step("safe_rlhf", (VALUES, REFERENCE, REWARD, COST, PRETRAIN_LOSS), critic=True),
    )
}
"""PAPER.md section 5. GRPO stands for all that normalise rewards over a group of samples; ReMax generates twice and scores both;
Safe-RLHF adds the cost model and the pretraining loss."""


def dataflow_of(algorithm: str) -> Dataflow:
    """The step of `algorithm`; an unknown name lists the known ones."""
    if algorithm not in STANDARD:
        raise ValueError(f"algorithm is {algorithm!r}; known: {', '.join(STANDARD)}")
    return STANDARD[algorithm]
