"""Settings of episodes, and of the roles that run and reward them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from workers.role_config import ScorerConfig, StreamingActorConfig


class History(StrEnum):
    """The reaction where the chat template would write earlier turns differently once further
    messages follow (it leaves out thoughts, say)."""

    checked = "checked"
    """The run stops, and names the template and the place."""
    as_drawn = "as_drawn"
    """The turns stay as the policy drew them."""
    segments = "segments"
    """The policy reads what the template writes, in a further segment of the episode."""


@dataclass(kw_only=True)
class EpisodeConfig:
    """The limits of an episode, and what its failures lead to. Most tokens of one reply are
    actor.generation.sampling.max_response_tokens, most tokens of the whole conversation
    actor.generation.max_model_len (0: the model's limit)."""

    max_turns: int = 16
    """Replies of the policy after which an episode ends, with finish reason "turns"."""
    max_sampled_tokens: int = 0
    """Tokens that the policy draws in one episode at most, which then ends with finish reason
    "length"; 0: as many as the context holds."""
    step_timeout_s: float = 60.0
    """Most seconds that the environment may take between two replies, and before the first."""
    retries: int = 2
    """How often an episode that failed (its code raised, or took too long) starts again, with a
    fresh environment and the same draws."""
    max_given_up: float = 0.25
    """The run stops before the update of a step where more than this share of its groups (the
    episodes of one prompt), over all rounds, had one that failed every time; nothing is learned
    from a group that is given up, and it counts in no mean."""
    lockstep: bool = True
    """Ask the generation engine when every live episode waits for it, so that a run does not depend
    on how long environments take; false asks when half of them wait and no others have joined
    them for a tenth of the last round's time."""
    processes: int = 0
    """Processes of each generation replica that run the episodes, Ray actors that take a processor
    each: for environments that compute much, need other nodes, or may crash; 0: the process of the
    generation engine runs them."""
    history: History = History.checked
    """The reaction where the chat template would write earlier turns differently."""

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ValueError(f"episode.max_turns is {self.max_turns}; use at least 1")
        for name in ("max_sampled_tokens", "retries", "processes"):
            if vars(self)[name] < 0:
                raise ValueError(f"episode.{name} is {vars(self)[name]}; use 0 or more")
        if not self.step_timeout_s > 0:
            raise ValueError(f"episode.step_timeout_s is {self.step_timeout_s}; use more than 0")
        if not 0 <= self.max_given_up <= 1:
            raise ValueError(f"episode.max_given_up is {self.max_given_up}; choose 0 to 1")


@dataclass(kw_only=True)
class EpisodeActorConfig(StreamingActorConfig):
    """An actor whose responses are episodes."""

    environment: Any = None
    """See RunConfig.environment."""
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    date: str | None = None
    """See DataConfig.date."""


@dataclass(kw_only=True)
class EpisodeScorerConfig(ScorerConfig):
    """The reward of episodes: the environment's, plus that of a function or a model where one is
    set."""
