"""Whether a model's published configuration fits the layouts and engines of its role; no weights are
read."""

from __future__ import annotations

from dataclasses import replace

from recipes.checks import RoleConfig
from recipes.engine_facts import ask_engine
from recipes.generation_checks import check_token_ids
from recipes.image_layouts import check_image_layout
from recipes.roles import GENERATOR, section_of
from workers.adapter_sync import sends_adapter
from workers.agents.config import EpisodeScorerConfig
from workers.config import ModelConfig, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.engines.model.loading import (
    check_packing,
    check_whole_numbers,
    model_config,
    position_limit,
)
from workers.engines.model.lora import check_adapter, check_scores
from workers.engines.model.routers import check_replays
from workers.generation import ENGINES, generation_engine_class
from workers.generation.config import GenerationConfig
from workers.role_config import ActorConfig, JudgeConfig, RewardConfig, RouterReplay, VerdictKind

ANOTHER = "; set generation.engine to "
"""How engines begin their advice to take another one."""


def check_model(role: str, config: RoleConfig, head: Head, num_devices: int) -> None:
    """Loads the model's configuration (not its weights) and holds the layouts against it."""
    if isinstance(config, RewardConfig) and config.function is not None:
        return
    if isinstance(config, EpisodeScorerConfig) and config.model is None:
        return
    assert config.model is not None, "is_function() saw to it"
    writes = isinstance(config, JudgeConfig) and config.verdict is VerdictKind.written
    only_generates = role == GENERATOR or writes
    role = section_of(role)
    try:
        if not only_generates:
            _check_train_layout(config.model, config.train, head, num_devices)
        if isinstance(config, RewardConfig) and config.model.new_head:
            check_scores(config.train.lora)
        if isinstance(config, ActorConfig):
            sends_adapter(config)
            if config.router_replay is not RouterReplay.off:
                published = model_config(config.model, head)
                check_replays(published, f"router_replay is {config.router_replay.value}")
        if isinstance(config, ActorConfig) or (isinstance(config, JudgeConfig) and writes):
            synced = not only_generates
            _check_generation_sizes(role, config.model, config.generation, synced=synced)
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from None


def _check_train_layout(
    model: ModelConfig, train: TrainConfig, head: Head, num_devices: int
) -> None:
    published = model_config(model, head)
    check_whole_numbers(model, published)
    check_image_layout(published, train, model.attention)
    check = engine_class(train.engine).check
    ask_engine(train.engine, "check", check, published, train, head, num_devices)
    if train.packing:
        check_packing(model, head, train.cp)
    if train.lora.enabled:
        check_adapter(model, train.lora, head)


def _check_generation_sizes(
    role: str, model: ModelConfig, config: GenerationConfig, *, synced: bool
) -> None:
    """`synced`: the engine gets its weights from a trainer."""
    size = int(model_config(model, Head.lm).get_text_config().vocab_size)
    check_token_ids("generation.sampling.stop_token_ids", config.sampling.stop_token_ids, size)
    check_token_ids("model.end_token_ids", model.end_token_ids or [], size)
    refused = _refusal(config.engine, model, config, synced=synced)
    if ANOTHER in refused:
        refused = _without_way_out(refused, model, config, synced=synced)
    if refused:
        raise ValueError(refused)
    (limit, source), needed = most_tokens(model, config, role), config.sampling.max_response_tokens
    if needed >= limit:
        raise ValueError(
            f"generation.sampling.max_response_tokens is {needed}, which leaves no room for a "
            f"prompt in {limit} tokens ({source}); lower it"
        )


def _refusal(name: str, model: ModelConfig, config: GenerationConfig, *, synced: bool) -> str:
    """Why the generation engine `name` does not take the model; empty where it does."""
    engine, published = generation_engine_class(name), model_config(model, Head.lm)
    try:
        if synced:
            ask_engine(name, "check_sync", engine.check_sync, published)
        ask_engine(name, "check_model", engine.check_model, published, config)
    except ValueError as error:
        return str(error)
    return ""


def _without_way_out(
    refused: str, model: ModelConfig, config: GenerationConfig, *, synced: bool
) -> str:
    """The refusal, which names other engines; where these refuse too, with their reasons instead."""
    reasons = [refused]
    for name in ENGINES.builtin:
        if name != config.engine:
            reasons.append(
                _refusal(name, model, replace(config, engine=name, tp=1, pp=1), synced=synced)
            )
    if not all(reasons):
        return refused
    on_gpus = any("generate on GPUs" in reason for reason in reasons)
    whys = [reason.partition(ANOTHER)[0] for reason in reasons]
    advice = "generate on GPUs" if on_gpus else "use a model of another family"
    return f"{'; nor does another engine: '.join(whys)}; {advice}"


def most_tokens(model: ModelConfig, config: GenerationConfig, role: str) -> tuple[int, str]:
    """Tokens that prompt and response may have together, and who says so."""
    if config.max_model_len:
        return config.max_model_len, f"{role}.generation.max_model_len"
    return position_limit(model, Head.lm), "the limit of the model"
