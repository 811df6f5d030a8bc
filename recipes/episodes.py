"""Whether an environment fits the run: its algorithm, its layout, its chat template. Known before
anything starts.

Every problem is a ValueError with field, value and fix.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from controllers import ALGORITHMS
from hybridflow.protocols import data_groups
from recipes.config import RunConfig, Runtime
from recipes.placing import Placement
from recipes.roles import reward_settings
from workers.agents.config import EpisodeActorConfig, EpisodeConfig, History
from workers.agents.interfaces import as_episode, environment_name
from workers.agents.outcome import EnvironmentMistake
from workers.agents.renderer import FURTHER, QUESTION, Renderer

LOGGER = logging.getLogger(__name__)


def check_environment(placement: Placement) -> None:
    """The environment is one, and the run can have it."""
    config = placement.config
    if config.environment is None:
        if config.episode != EpisodeConfig():
            raise ValueError(
                "episode.* is set, which nothing reads without an environment; set "
                "environment=package.module:name, or leave it out"
            )
        return
    name = environment_name(config.environment)
    interface = as_episode(config.environment)
    if config.episode.processes and config.runtime is Runtime.local:
        raise ValueError(
            f"episode.processes={config.episode.processes} with runtime=local, which is one process; "
            "leave it out, or use runtime=ray"
        )
    scored = reward_settings(config)
    if not interface.rewards and scored.function is None and scored.model is None:
        raise ValueError(
            f"environment={name} has no method reward(answer), and nothing else scores the "
            "episodes; write one, or set reward.function=package.module:name"
        )
    if not placement.entry.answers_prompts:
        usable = [name for name, entry in ALGORITHMS.items() if entry.answers_prompts]
        raise ValueError(
            f"environment={name}: {config.algorithm.name} generates nothing; use one of "
            f"{', '.join(usable)}"
        )
    if "judge" in placement.entry.roles and "reward" not in placement.entry.roles:
        raise ValueError(
            f"environment={name} gives its episodes rewards, and {config.algorithm.name} learns "
            "from its judge alone; use an algorithm that learns from rewards, such as grpo or ppo"
        )
    if "reward" not in placement.entry.roles:
        LOGGER.warning(
            "environment=%s: %s learns from its %s alone; the rewards of the episodes are not read",
            name,
            config.algorithm.name,
            placement.entry.roles[-1],
        )
    if config.episode.history is History.segments and scored.model is not None:
        raise ValueError(
            f"episode.history=segments: an episode may have several contexts, and reward.model="
            f"{scored.model.path} reads one; use reward.function or the environment's own reward"
        )


def num_processes(placement: Placement) -> int:
    """Processes that run episodes and nothing else, of all generation replicas."""
    number = 0
    for role in placement.roles:
        if isinstance(role.config, EpisodeActorConfig):
            generation = placement.layouts(role).get("generation")
            replicas = data_groups(generation) if generation is not None else ()
            number += role.config.episode.processes * len(replicas)
    return number


def check_template(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The chat template keeps earlier turns as they are, whatever follows of a role that the
    environment sends."""
    if config.environment is None or config.episode.history is History.as_drawn:
        return
    if tokenizer.chat_template is None:
        return  # an environment may speak in text or tokens: the first message tells
    interface = as_episode(config.environment)
    renderer = Renderer(tokenizer, interface.tools)
    roles = interface.roles or tuple(FURTHER)
    verdicts = {role: renderer.check(role, thoughts=False) for role in roles}
    broken = [verdict for verdict in verdicts.values() if verdict]
    if broken and len(broken) == len(roles):
        raise EnvironmentMistake(f"environment={interface.name}: {broken[0]}")
    question = [QUESTION]
    if interface.tools and renderer.render(question) == Renderer(tokenizer).render(question):
        LOGGER.warning(
            "environment=%s: the chat template does not read the tools that it is given, so the "
            "policy is not told of them; set data.chat_template to one that does",
            interface.name,
        )
    for role in roles:
        verdict = verdicts[role] or renderer.check(role, thoughts=True)
        if verdict:
            LOGGER.warning(
                "environment=%s: an episode that does so stops: %s", interface.name, verdict
            )
