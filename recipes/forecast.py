"""forecast: the seconds and bytes of every call of a run on a cluster, before anything starts; and
predicted beside measured seconds when a run has ended.

Leaves out the translation of settings into the mapper's words: recipes/mapping_settings.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from controllers.loop import Outcome
from hybridflow.mapping.answer.auto import shortage
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.answer.explain import mapping_report
from hybridflow.mapping.answer.judge import Judgement, judge
from hybridflow.mapping.calibrate.compare import Run, side_by_side
from hybridflow.mapping.search.search import search
from hybridflow.mapping.search.setting import GENERATION
from recipes.mapping_cluster import knows_devices
from recipes.mapping_settings import MapperInputs, configured_mapping, setting_of

LOGGER = logging.getLogger(__name__)
MAPPING = "mapping.json"
"""A file in a run's directory: the pools of its models, their layouts, and the predictions."""


def forecast(
    inputs: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]
) -> Judgement:
    """Predictions for the run as it is set up (role -> pool, pool -> devices)."""
    return judge(setting_of(inputs), configured_mapping(inputs, pool_of, sizes))


def verdict(inputs: MapperInputs, pool_of: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Time and memory per call as text. Where the memory is too small, a ValueError that says
    what would do."""
    if not knows_devices(inputs.config):
        return (
            "seconds and memory: name the devices with plan.cluster, such as "
            "plan.cluster=2x8xH100-80GB"
        )
    judgement = forecast(inputs, pool_of, sizes)
    text = mapping_report(judgement.mapping)
    if judgement.fits:
        return text
    setting = setting_of(inputs)
    best = search(setting).best
    if best is None:
        advice = shortage(setting)
    else:
        advice = f"placement=auto fits on this cluster: {best.step_s:.3g} s a step"
    LOGGER.info("%s", text)
    reasons = "; ".join(line.strip() for line in judgement.report().splitlines())
    raise ValueError(
        f"this placement does not fit on {setting.cluster}: {reasons.replace(':; ', ': ')}; {advice}"
    )


def predicted_vs_measured(mapping: DeviceMapping, outcome: Outcome) -> str:
    """Predicted and measured seconds per phase, once a run has ended."""
    return side_by_side(measured_run("run", mapping, outcome))


def measured_run(
    configuration: str, mapping: DeviceMapping, outcome: Outcome, group: str = ""
) -> Run:
    """The medians of a finished run beside its predictions; `group`: runs that are ranked
    against each other."""
    phases = {call.call.partition("#")[0] for call in mapping.calls}
    measured = {name: seconds for name, seconds in outcome.median_s.items() if name in phases}
    for name in measured:
        if name.startswith(GENERATION):  # the sync is predicted as a part of generation
            measured[name] += outcome.median_s.get(f"{GENERATION}.sync_weights", 0.0)
    return Run(
        configuration=configuration,
        mapping=mapping,
        measured_s=measured,
        step_s=outcome.median_s["step"],
        compare_group=group,
    )
