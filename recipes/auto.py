"""placement=auto: the mapper chooses the run's pools and layouts.

    mapping = choose(inputs)                # searched, saved by the run that is resumed, or plan.mapping
    config = apply_mapping(inputs, mapping) # recipes/mapping_settings.py: from then on placement=custom

With several kinds of devices every pool asks for nodes of its kind. Leaves out roles with different
training engines or precisions, and CPUs beside GPUs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeGuard

from hybridflow.checkpoint import CheckpointStore
from hybridflow.mapping.answer.auto import mapping_of, shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.judge import judge
from hybridflow.mapping.search.branch import Solution
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION, Setting
from recipes.config import RunConfig, Runtime
from recipes.forecast import MAPPING
from recipes.mapping_cluster import node_resources
from recipes.mapping_settings import MapperInputs, setting_of, with_split_generation

LOGGER = logging.getLogger(__name__)


def choose(inputs: MapperInputs) -> DeviceMapping:
    """The mapping of this run: a saved one as it is, or the fastest that fits."""
    setting = setting_of(inputs)
    _check(inputs, setting)
    saved = saved_mapping(inputs.config)
    if saved is not None:
        mapping = _reused(inputs, setting, saved)
        if mapping is not None:
            return mapping
    best = search(setting).best
    if inputs.config.plan.split_generation or inputs.config.asynchrony.staleness:
        split = setting_of(with_split_generation(inputs))
        split_best = search(split).best
        if _is_faster(split_best, best) and _generates_apart(split_best):
            return mapping_of(split, split_best)
    if best is None:
        raise ValueError(shortage(setting))
    return mapping_of(setting, best)


def _is_faster(solution: Solution | None, other: Solution | None) -> TypeGuard[Solution]:
    if solution is None:
        return False
    return other is None or solution.step_s < other.step_s


def _generates_apart(solution: Solution) -> bool:
    """Whether generation is in another pool than the actor."""
    return not any({"actor", GENERATION} <= set(roles) for roles in solution.placement)


def _reused(inputs: MapperInputs, setting: Setting, saved: Path) -> DeviceMapping | None:
    """A saved mapping, with predictions made anew; None where a run is resumed on other devices
    and did not name the mapping."""
    mapping = DeviceMapping.load(saved)
    if not inputs.config.plan.mapping and mapping.cluster != str(setting.cluster):
        LOGGER.info(
            "placement=auto: %s was made for %s, this is %s: chosen anew",
            saved,
            mapping.cluster,
            setting.cluster,
        )
        return None
    if any(plan.role == GENERATION for plan in mapping.roles):
        setting = setting_of(with_split_generation(inputs))
    judgement = judge(setting, mapping)
    if not judgement.fits:
        raise ValueError(
            f"mapping {saved} does not fit on {setting.cluster}:\n{judgement.report()}"
        )
    LOGGER.info("placement=auto: as in %s", saved)
    return judgement.mapping


def saved_mapping(config: RunConfig) -> Path | None:
    """plan.mapping, or the file that a run saved which this one resumes."""
    if config.plan.mapping:
        path = Path(config.plan.mapping)
        if not path.is_file():
            raise ValueError(
                f"plan.mapping is {config.plan.mapping!r}, which is no file; give one that a run "
                "or recipes.plan has saved"
            )
        return path
    directory = Path(config.output_dir)
    path = directory / MAPPING
    if config.loop.resume == "never" or not path.is_file():
        return None
    if config.loop.resume != "auto":
        return path
    checkpoints = CheckpointStore(directory / "checkpoints", keep_last=1, keep_best=0)
    if checkpoints.latest() is None:
        return None
    return path


def _check(inputs: MapperInputs, setting: Setting) -> None:
    """ValueErrors for settings that contradict placement=auto."""
    config = inputs.config
    if config.runtime is Runtime.local:
        raise ValueError(
            "placement=auto with runtime=local, which is one process: there is nothing to place; "
            "leave one of them out"
        )
    if config.pools:
        raise ValueError(
            f"pools ({', '.join(config.pools)}) are set with placement=auto, which makes its own; "
            "use placement=custom for yours"
        )
    node_resources(config, setting.cluster)
    if config.num_devices not in (1, setting.cluster.num_devices):
        raise ValueError(
            f"num_devices is {config.num_devices}, plan.cluster has {setting.cluster.num_devices} "
            "devices; leave one of them out"
        )
    engines: dict[str, str] = {}
    for role in setting.roles:
        train = inputs.roles[role].train
        engines[role] = f"{train.engine} {train.precision}"
    if len(set(engines.values())) > 1:
        listed = ", ".join(f"{role} {engine}" for role, engine in engines.items())
        raise ValueError(
            f"placement=auto needs one training engine and precision for all roles: {listed}; set "
            "them alike, or place them yourself with placement=custom"
        )
