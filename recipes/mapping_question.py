"""Question: everything that a mapping depends on, in the words of the settings; and its translation
into the words of the mapper.

    setting = to_setting(question)      # hybridflow/mapping answers settings of this type

A run asks by recipes/mapping_settings.py, recipes.plan by its own settings. Quick to import: no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridflow.dataflow import Dataflow
from hybridflow.mapping.question.calibration import Calibration, usual_constants
from hybridflow.mapping.question.cluster import Cluster
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.space import SearchSpace
from hybridflow.mapping.question.workload import Asynchrony, Lengths, Workload
from hybridflow.mapping.search.setting import GENERATION, Setting, split_generation
from workers.config import Precision


@dataclass(frozen=True, kw_only=True)
class Question:
    """The work of a step, its models, the devices, and the layouts to choose from."""

    dataflow: Dataflow
    models: Mapping[str, ModelSpec | None]
    """Role -> model; None for a Python function. With `split_generation` also the role
    `generation`."""
    cluster: Cluster
    calibration: str
    """A file of recipes.calibrate, or "" for the usual constants of the cluster's kind."""
    batch_size: int
    samples_per_prompt: int
    prompt: Lengths
    response: Lengths
    num_mini_batches: int
    num_epochs: int
    split_generation: bool
    space: SearchSpace
    asynchrony: Asynchrony | None = None


def to_setting(question: Question) -> Setting:
    """The setting that the mapper's functions take; values that do not make sense are a
    ValueError."""
    dataflow, weights_from = question.dataflow, {}
    if question.split_generation:
        dataflow, weights_from = split_generation(dataflow), {GENERATION: "actor"}
    return Setting(
        dataflow=dataflow,
        models=question.models,
        cluster=question.cluster,
        workload=Workload(
            batch_size=question.batch_size,
            samples_per_prompt=question.samples_per_prompt,
            prompt=question.prompt,
            response=question.response,
            num_mini_batches=question.num_mini_batches,
            num_epochs=question.num_epochs,
            asynchrony=question.asynchrony,
        ),
        calibration=calibration_of(question.calibration, question.cluster),
        space=question.space,
        weights_from=weights_from,
    )


def calibration_of(file: str, cluster: Cluster) -> Calibration:
    """The constants in `file`, or the usual ones of the cluster's first kind of devices."""
    if file:
        return Calibration.load(Path(file))
    return usual_constants(cluster.groups[0].kind.name)


def precision_space(precision: Precision) -> SearchSpace:
    """The bytes of a parameter with float32 gradients and Adam states: 16 in float32; 18 in
    bf16, which has float32 master weights besides."""
    if precision is Precision.fp32:
        return SearchSpace(
            parameter_bytes=4.0, gradient_bytes=4.0, optimizer_bytes=8.0, activation_bytes=4.0
        )
    return SearchSpace(
        parameter_bytes=2.0, gradient_bytes=4.0, optimizer_bytes=12.0, activation_bytes=2.0
    )
