"""Generation engines by name. An engine is a class that implements GenerationEngine: built-in
ones are a module here and an entry in ENGINES; hybridflow/registry.py says how other packages
bring theirs."""

from __future__ import annotations

from hybridflow.registry import Registry
from workers.generation.base import GenerationEngine

ENGINES = Registry(
    group="hybridflow.generation_engines",
    builtin={
        "vllm": "workers.generation.vllm.engine:VllmEngine",
        "hf": "workers.generation.hf:HfEngine",
    },
)


def other_engines(name: str) -> str:
    """The known engines besides `name`, for the advice of an error."""
    return " or ".join(known for known in ENGINES if known != name)


def generation_engine_class(name: str, field: str = "generation.engine") -> type[GenerationEngine]:
    """The engine's class; `field` is the setting, for the ValueError of a name that is not
    known."""
    found: type[GenerationEngine] = ENGINES.load_class(name, field, GenerationEngine)
    return found
