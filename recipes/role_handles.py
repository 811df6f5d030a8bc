"""spawn_roles(): a handle for every role of a run, on pools whose machines say what they compute."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridflow.group import each, spawn, spawn_all
from hybridflow.pool import ResourcePool
from recipes.asynchrony import streaming_actor
from recipes.config import Device
from recipes.placing import Placement, placeholder_roles
from recipes.preparation import Preparation
from recipes.roles import GENERATION
from workers.machine import MachineWorker
from workers.precision import native_precision
from workers.split_actor import SplitActor

if TYPE_CHECKING:
    from cluster.connect import ClusterInfo

LOGGER = logging.getLogger(__name__)


def with_precision_of_machines(
    prepared: Preparation, pools: Mapping[str, ResourcePool], cluster: ClusterInfo | None
) -> Preparation:
    """precision=auto as the run's own devices have it: bf16 only where all of them compute it.

    They are asked where they may differ from this machine's.
    """
    here = prepared.config.device is Device.cpu and (cluster is None or len(cluster.nodes) == 1)
    if here or not prepared.precision_line:
        return prepared
    answers: list[bool] = []
    for pool in pools.values():
        answers += each(spawn(MachineWorker, pool, None, role="machine").computes_bf16)
    if any(answers) and not all(answers):
        LOGGER.warning(
            "precision=auto: %d of the run's %d devices lack native bfloat16, so all compute in fp32",
            len(answers) - sum(answers),
            len(answers),
        )
    return prepared.with_precision(native_precision(all(answers)))


def spawn_roles(
    placement: Placement, pools: Mapping[str, ResourcePool], *, draws_ahead: bool = False
) -> dict[str, Any]:
    """A handle for every role, and placeholders for those that nothing asks for; an actor whose
    generation has a pool of its own, or whose responses are drawn ahead, is still one handle."""
    handles = spawn_all(
        {role.name: (role.worker, pools[role.pool], role.config) for role in placement.roles}
    )
    if draws_ahead:
        actor = streaming_actor(placement, handles, pools)
        handles.pop(GENERATION, None)
        handles["actor"] = actor
    elif GENERATION in handles:
        training, generation = (pools[placement.pool_of[name]] for name in ("actor", GENERATION))
        handles["actor"] = SplitActor.of(
            handles["actor"], handles.pop(GENERATION), training, generation
        )
    return handles | placeholder_roles(placement, handles)
