"""A run whose responses are drawn ahead: what has to hold for it, its actor, and its rows.

With asynchrony.staleness=0 nothing here takes part. docs/asynchronous.md is the user's page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controllers import AlgorithmEntry
from controllers.data import RowLoader
from controllers.streams import RowsAhead
from hybridflow.dataflow import Dataflow
from hybridflow.pool import ResourcePool
from recipes.config import RunConfig
from recipes.placing import Placement
from recipes.roles import GENERATION
from recipes.trial import depends_on_old_policy
from workers.losses.config import Correction, CorrectionLevel, OldPolicy, PolicyLossConfig
from workers.streaming_actor import ColocatedStreamingActor, StreamingActor


def check_asynchrony(config: RunConfig, entry: AlgorithmEntry, dataflow: Dataflow) -> None:
    """A ValueError where a run can't be asynchronous, or would learn from stale responses as if
    they were fresh."""
    if config.asynchrony.staleness == 0:
        return
    where, name = f"asynchrony.staleness is {config.asynchrony.staleness}", config.algorithm.name
    if "actor" not in entry.roles or not entry.answers_prompts:
        raise ValueError(f"{where}, but {name} draws no responses to train on; set it to 0")
    updates = {call.method for call in dataflow.calls if call.role == "actor"}
    if "update_distilled" in updates:
        raise ValueError(
            f"{where}, but nothing in {name} corrects for responses of older weights; set it to 0"
        )
    if "update_actor" in updates:
        _check_loss(where, config.actor.loss)


def _check_loss(where: str, loss: PolicyLossConfig) -> None:
    correction = loss.rollout_correction
    if loss.old_policy is OldPolicy.rollout:
        if not depends_on_old_policy(loss):
            raise ValueError(
                f"{where} with actor.loss.old_policy=rollout, but the loss {loss.name} takes no "
                "ratio to the old policy, so that nothing corrects for stale responses; set "
                "old_policy=recomputed and rollout_correction.correction=truncate"
            )
        return
    if correction.correction is Correction.none:
        raise ValueError(
            f"{where}: responses come from older weights than those that train on them, and nothing "
            "corrects for it (published runs without a correction collapsed at staleness 1); set "
            "actor.loss.rollout_correction.correction=truncate or mask, or "
            "actor.loss.old_policy=rollout, or asynchrony.staleness=0"
        )
    if correction.level is CorrectionLevel.sequence:
        raise ValueError(
            f"{where} with actor.loss.rollout_correction.level=sequence: the product over a stale "
            "response's tokens is far from 1 for all but the shortest; set level=token"
        )


def streaming_actor(
    placement: Placement, handles: Mapping[str, Any], pools: Mapping[str, ResourcePool]
) -> StreamingActor:
    """The actor of a run that draws ahead, over the handles of its workers."""
    config, roles = placement.config, {role.name: role for role in placement.roles}
    window = config.asynchrony.window(config.data.batch_size)
    generating = roles.get(GENERATION, roles["actor"])
    settings: dict[str, Any] = {
        "num_replicas": placement.layouts(generating)["generation"].axis_size("dp"),
        "slice_steps": config.asynchrony.slice_steps,
        "bound": window.bound,
        "whole_groups": config.environment is not None,
    }
    training, generation = pools[roles["actor"].pool], pools[generating.pool]
    if GENERATION not in roles:
        actor = handles["actor"]
        return ColocatedStreamingActor(actor, actor, (training,), **settings)
    split = StreamingActor(
        handles["actor"], handles[GENERATION], (training, generation), **settings
    )
    split.join()
    return split


def rows_ahead(
    config: RunConfig, loader: RowLoader, actor: StreamingActor, dataflow: Dataflow
) -> RowsAhead:
    """The run's rows, drawn ahead within its window and not beyond its end: all that the
    algorithm's page asks of the actor for them."""
    length = config.loop.length(len(loader.dataset), config.data.batch_size)
    return RowsAhead(
        loader,
        actor,
        config.asynchrony.window(config.data.batch_size),
        samples_per_prompt=config.algorithm.samples_per_prompt,
        num_rows=length.row_limit or length.num_steps * length.batch_size,
        further_count=length.row_limit is None,
        drains=config.asynchrony.drains,
        greedy=config.asynchrony.staleness > 0 and asks_for_greedy(dataflow),
    )


def asks_for_greedy(dataflow: Dataflow) -> bool:
    """Whether a step has the actor draw most likely responses, too (ReMax's baseline)."""
    return any(
        call.role == "actor" and ("do_sample", False) in call.options for call in dataflow.calls
    )
