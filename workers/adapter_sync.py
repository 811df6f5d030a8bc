"""How an actor's adapter reaches the generation engine: alone, or merged into the weights."""

from __future__ import annotations

from workers.engines.base import Head
from workers.engines.model.loading import model_config
from workers.engines.model.peft_files import adapter_rank
from workers.generation import generation_engine_class
from workers.role_config import ActorConfig, AdapterSync


def sends_adapter(config: ActorConfig) -> bool:
    """Whether the adapter alone is sent. ValueError where it is to be, and can't be."""
    if not config.train.lora.enabled or config.adapter_sync is AdapterSync.merged:
        return False
    problem = why_merged(config)
    if problem and config.adapter_sync is AdapterSync.adapter:
        raise ValueError(
            f"actor.adapter_sync is adapter, but {problem}; set it to auto or merged, which sends the "
            "weights with the adapter in them"
        )
    return not problem


def why_merged(config: ActorConfig) -> str:
    """The reason for which the adapter can't be sent alone; empty where it can."""
    generation = config.generation
    if generation.release_during_training:
        return "actor.generation.release_during_training gives the base's memory back"
    engine = generation_engine_class(generation.engine)
    model = model_config(config.model, Head.lm)
    if not engine.takes_adapter(model, generation, config.train.lora):
        return (
            f"generation engine {generation.engine!r} can't take an adapter of rank "
            f"{adapter_rank(config.train.lora)} of this {model.model_type} model with "
            f"pp={generation.pp}"
        )
    return ""
