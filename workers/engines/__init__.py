"""Training engines by name. An engine is a class that implements TrainingEngine: built-in ones
are a folder here and an entry in ENGINES; hybridflow/registry.py says how other packages bring
theirs."""

from __future__ import annotations

from hybridflow.mapping.question.space import SearchSpace
from hybridflow.registry import Registry
from workers.engines.base import TrainingEngine

ENGINES = Registry(
    group="hybridflow.training_engines",
    builtin={
        "fsdp": "workers.engines.fsdp.engine:FsdpEngine",
        "threed": "workers.engines.threed.engine:ThreeDEngine",
        "deepspeed": "workers.engines.deepspeed.engine:DeepspeedEngine",
    },
)


def engine_class(name: str, field: str = "engine") -> type[TrainingEngine]:
    """The engine's class; `field` is the setting, for the ValueError of a name that is not
    known."""
    engine: type[TrainingEngine] = ENGINES.load_class(name, field, TrainingEngine)
    return engine


def pipeline_engines(*, with_pipeline: bool) -> str:
    """The known engines that have (or lack) pipeline stages, for the advice of an error; one that
    can't be loaded here is no advice."""
    names = []
    for name in ENGINES:
        try:
            space = engine_class(name).limit(SearchSpace())
        except ValueError:
            continue
        if (space.max_pipeline > 1) == with_pipeline:
            names.append(name)
    return ", ".join(names)
