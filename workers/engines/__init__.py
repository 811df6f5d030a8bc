"""Training engines by name. An engine is one file that implements TrainingEngine and one entry here."""

from __future__ import annotations

from importlib import import_module

from workers.engines.base import TrainingEngine

ENGINES: dict[str, str] = {
    "fsdp": "workers.engines.fsdp.engine:FsdpEngine",
    "threed": "workers.engines.threed.engine:ThreeDEngine",
    "deepspeed": "workers.engines.deepspeed.engine:DeepspeedEngine",
}
"""name -> "module:class"; imported when asked for, so that one engine's libraries are no other's
dependencies."""


def engine_class(name: str) -> type[TrainingEngine]:
    """The engine's class; an unknown name is a ValueError that lists the known ones."""
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    found: type[TrainingEngine] = vars(import_module(module))[attribute]
    return found
