"""Generation engines, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.generation.base import GenerationEngine


def generation_engine_class(name: str) -> type[GenerationEngine]:
    """The engine that `actor.generation.engine` names; imported here, because importing vLLM takes
    seconds."""
    if name not in ENGINES:
        raise ValueError(f"actor.generation.engine={name!r} is unknown; use one of {', '.join(ENGINES)}")
    return ENGINES[name]()


def _vllm() -> type[GenerationEngine]:
    from workers.generation.vllm.engine import VllmEngine

    return VllmEngine


def _hf() -> type[GenerationEngine]:
    from workers.generation.hf import HfEngine

    return HfEngine


ENGINES = {"vllm": _vllm, "hf": _hf}
