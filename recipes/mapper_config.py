"""The settings of the mapper that a run (plan.cluster=...) and recipes.plan (cluster=...)
share, by the same names."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class QuestionConfig:
    """cluster=16x8xA100-80GB response=lognormal:600:4096: the devices and lengths to make
    predictions for."""

    cluster: str = ""
    """NODESxDEVICESxKIND or DEVICESxKIND, joined by +, or a JSON file; for recipes.plan and
    dry_run=true it need not exist. Empty in a run: the devices of the run, on this machine."""
    calibration: str = ""
    """calibration.json of recipes.calibrate (its cluster.json beside it describes the devices);
    empty: constants of A100 nodes, or of CPUs where the devices are processes. A run that has
    one prints predicted and measured seconds side by side when it ends."""
    response: str = ""
    """Tokens of a response: a number, uniform:LOW:HIGH or lognormal:MEAN:MAX. Empty in a run:
    always the most that sampling allows."""
    split_generation: bool = False
    """The search may give generation a pool of its own (role `generation`), which gets the
    weights sent over after every update."""
    mapping: str = ""
    """A mapping (JSON) to take in place of searching: mapping.json of a run's output_dir, or
    save= of recipes.plan. recipes.plan judges it; a run with placement=auto uses it as it is. A
    run that resumes from its checkpoint uses the mapping that it saved."""


@dataclass(kw_only=True)
class MapperConfig(QuestionConfig):
    """plan.* of a run."""

    node_resources: list[str] = field(default_factory=list)
    """For placement=auto with several kinds of devices, KIND:RESOURCE: the Ray resource that
    the nodes of a kind have. For kinds that are not named, what Ray calls their GPUs:
    H100-80GB:accelerator_type:H100."""
