"""place(): which role stands in which pool, with which worker and settings; whether layouts and
models fit.

    placement = place(config)      # made once; everything after that reads it
    placement.roles, placement.pool_sizes, placement.entry

Reads model configurations; starts nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from controllers import AlgorithmEntry, algorithm_entry
from hybridflow.dataflow import Dataflow
from hybridflow.layout import Layout
from hybridflow.wording import counted
from recipes.checks import (
    check_algorithm,
    check_settings,
)
from recipes.config import Device, PlacementMode, RunConfig, Runtime
from recipes.generation_checks import check_generation_groups, check_generation_memory
from recipes.model_checks import check_model
from recipes.roles import GENERATION, Role, role_kind, role_names, section_of
from workers.config import ModelConfig
from workers.engines.model import fit
from workers.engines.model.loading import check_weights
from workers.generation import generation_engine_class
from workers.hub import local_directory
from workers.split_actor import SplitTrainingWorker
from workers.weight_files import check_weight_files


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A run's roles and the pools that they stand in.

    Placement(config=config, entry=ALGORITHMS["grpo"], role_names=("actor", "reference", "reward"),
        roles=(Role(name="actor", ...), Role(name="reward", ...)), pool_sizes={"main": 8})
    """

    config: RunConfig
    entry: AlgorithmEntry
    """The algorithm's."""
    role_names: tuple[str, ...]
    """Every role that the algorithm or its validation names, placed or not."""
    roles: tuple[Role, ...]
    """Those that are needed, in the order in which they are started."""
    pool_sizes: Mapping[str, int]
    """Devices of every pool."""

    @property
    def pool_of(self) -> dict[str, str]:
        """Role -> name of its pool."""
        return {role.name: role.pool for role in self.roles}

    @property
    def num_devices(self) -> int:
        """Devices of all pools together."""
        return sum(self.pool_sizes.values())

    def layouts(self, role: Role) -> dict[str, Layout]:
        """The role's layouts over its pool, by name."""
        worker = role.worker
        try:
            return worker.layouts(role.config, self.pool_sizes[role.pool])
        except ValueError as error:  # one class serves several roles: critic and cost_critic
            text = str(error).replace(f"{worker.__name__}.train", f"{role.name}.train", 1)
            raise ValueError(text) from None


def place(config: RunConfig) -> Placement:
    """Every role of the algorithm with its worker, settings and pool; settings and layouts are
    checked."""
    entry, names = algorithm_entry(config.algorithm.name), role_names(config)
    pool_of = _pools(config, names)
    roles = []
    for name in (*names, *([GENERATION] if GENERATION in pool_of else [])):
        kind = role_kind(name)
        if not kind.needed(config):
            continue
        settings = kind.settings(config)
        worker = (
            SplitTrainingWorker
            if name == "actor" and GENERATION in pool_of
            else kind.worker(settings)
        )
        roles.append(Role(name=name, worker=worker, config=settings, pool=pool_of[name]))
    placement = Placement(
        config=config,
        entry=entry,
        role_names=names,
        roles=tuple(roles),
        pool_sizes=_pool_sizes(config),
    )
    check_layouts(placement)
    check_algorithm(config, entry)
    check_start(placement)
    return placement


def check_start(placement: Placement) -> None:
    """A policy that begins with an adapter has a reference that begins with it too."""
    settings = {role.name: role.config for role in placement.roles}
    reference = settings.get("reference")
    if reference is None or reference.train.lora.enabled:
        return
    for name in ("actor", "policy"):
        policy = settings.get(name)
        if policy is None or policy.train.lora.adapter is None:
            continue
        if policy.model.path == reference.model.path:
            directory = policy.train.lora.adapter
            raise ValueError(
                f"{name}.train.lora.adapter is {directory!r}, and reference would be its base "
                f"without it; set reference.train.lora.adapter={directory}, or begin with the merged "
                "model (python -m recipes.merge)"
            )


def check_layouts(placement: Placement) -> None:
    """Settings of every role, its layouts on its pool, and those of generation engines that
    share one."""
    engines: dict[str, dict[str, Layout]] = {}
    shares: dict[str, dict[str, float]] = {}
    for role in placement.roles:
        check_settings(role.name, role.config)
        layouts = placement.layouts(role)
        if "generation" not in layouts:
            continue
        engine = generation_engine_class(role.config.generation.engine)
        if placement.config.device is Device.cpu:
            # A run on GPUs can be planned on a machine without one: session.py checks those.
            engine.check_device(Device.cpu.value)
        if engine.shares_process:
            engines.setdefault(role.pool, {})[role.name] = layouts["generation"]
            shares.setdefault(role.pool, {})[role.name] = role.config.generation.gpu_memory_fraction
    for pool, of_roles in engines.items():
        check_generation_groups(pool, of_roles)
        if placement.config.device is Device.cuda:
            check_generation_memory(pool, shares[pool])


def check_models(placement: Placement) -> None:
    """Every model's directory has a configuration and whole files, and its layouts fit it; no weights
    are read."""
    for role in placement.roles:
        if role.config.model is not None:
            model, adapter = role.config.model, role.config.train.lora.adapter
            is_policy = model.path == placement.config.model.path
            setting = "model.path" if is_policy else f"{role.section}.model.path"
            check_weight_files(model.path, setting, local_directory(model.path, model.revision))
            if adapter:
                check_weight_files(adapter, f"{role.section}.train.lora.adapter")
        if role.name != GENERATION:  # the model is the actor's, and checked with it
            check_model(
                role.name, role.config, role_kind(role.name).head, placement.pool_sizes[role.pool]
            )
            if role.config.model is not None:
                _check_weights(role.name, role.config.model)


def without_weights(placement: Placement) -> list[str]:
    """A line for every role whose model's directory has none; dry_run=true needs none."""
    lines = []
    for role in placement.roles:
        if role.name != GENERATION and role.config.model is not None:
            line = fit.without_weights(role.config.model)
            if line:
                lines.append(f"{role.section}: {line}")
    return lines


def _check_weights(role: str, model: ModelConfig) -> None:
    try:
        check_weights(model, role_kind(role).head)
    except ValueError as error:
        raise ValueError(f"{section_of(role)}: {error}") from None


def placeholder_roles(placement: Placement, placed: Container[str]) -> dict[str, Any]:
    """Stand-ins for the roles of the algorithm that were not placed because nothing asks for
    them."""
    placeholders = {}
    for name in placement.role_names:
        make = role_kind(name).absent
        if name not in placed and make is not None:
            placeholders[name] = make()
    return placeholders


def placement_report(placement: Placement, dataflow: Dataflow) -> str:
    """A line for every role: its pool, devices and layouts."""
    lines = [f"{placement.config.algorithm.name}: {len(dataflow.calls)} calls a step"]
    for role in placement.roles:
        layouts = ", ".join(f"{name} {layout}" for name, layout in placement.layouts(role).items())
        size = placement.pool_sizes[role.pool]
        if role.config.train.ep > 1:
            layouts += f", experts over {role.config.train.ep} ranks each"
        lines.append(f"  {role.name:<10} pool {role.pool} ({counted(size, 'devices')}): {layouts}")
    return "\n".join(lines)


def _pools(config: RunConfig, names: tuple[str, ...]) -> dict[str, str]:
    """Role -> name of its pool; all in one until placement=auto has chosen."""
    may_be_placed = (*names, *([GENERATION] if "actor" in names else []))
    if config.placement is PlacementMode.colocated and config.pools:
        raise ValueError(
            f"pools ({', '.join(config.pools)}) are set with placement=colocated; set "
            "placement=custom or leave them out"
        )
    if config.placement is PlacementMode.custom and not config.pools:
        raise ValueError(
            "placement=custom needs pools, for example pools.policy.num_devices=2 "
            "'pools.policy.roles=[actor,reference]'"
        )
    if config.placement is not PlacementMode.custom or config.runtime is Runtime.local:
        return dict.fromkeys(names, "main")
    owners: dict[str, list[str]] = {}
    for pool, settings in config.pools.items():
        for role in settings.roles:
            owners.setdefault(role, []).append(pool)
    wrong = []
    for role in dict.fromkeys((*names, *owners)):
        pools = owners.get(role, [])
        if role not in may_be_placed:
            wrong.append(f"{role} is none of them")
        elif len(pools) > 1:
            wrong.append(f"{role} is in {' and '.join(pools)}")
        elif not pools and role in names:
            wrong.append(f"{role} is in none")
    if wrong:
        raise ValueError(
            f"pools: every role of {config.algorithm.name} ({', '.join(names)}) must be in "
            f"exactly one pool; {', '.join(wrong)}"
        )
    if GENERATION in owners and owners[GENERATION] == owners["actor"]:
        raise ValueError(
            f"pools.{owners['actor'][0]}.roles names both actor and {GENERATION}: an actor "
            f"generates in its own pool anyway; leave {GENERATION} out, or give it another pool"
        )
    return {role: pools[0] for role, pools in owners.items()}


def _pool_sizes(config: RunConfig) -> dict[str, int]:
    """Devices of every pool."""
    if config.num_devices < 1:
        raise ValueError(f"num_devices is {config.num_devices}; use at least 1")
    if config.runtime is Runtime.local:
        if config.num_devices > 1:
            raise ValueError(
                f"num_devices={config.num_devices} with runtime=local, which is one process; "
                "leave it out or use runtime=ray"
            )
        return {"main": 1}
    if config.placement is PlacementMode.custom:
        if config.num_devices > 1:
            raise ValueError(
                f"num_devices={config.num_devices} with placement=custom, where every pool has "
                "its own; leave it out"
            )
        sizes = {name: pool.num_devices for name, pool in config.pools.items()}
    else:
        sizes = {"main": config.num_devices}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"pools.{name}.num_devices is {size}; use at least 1")
    return sizes
