"""Settings of the roles: which model, which engines, which loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from workers.config import ModelConfig, TrainConfig
from workers.generation.config import GenerationConfig
from workers.losses.config import PolicyLossConfig, ValueLossConfig


class Consistency(StrEnum):
    """What happens where the first step on fresh samples shows that trainer and sampler disagree."""

    off = "off"
    warn = "warn"
    error = "error"


@dataclass(kw_only=True)
class ActorConfig:
    """The policy: trained by `train`, sampled by `generation`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    num_epochs: int = 1
    """Passes of an update over the batch."""
    critic_warmup_steps: int = 0
    """First updates of a run that leave the actor as it is, so that a new critic learns to judge it first."""
    report_entropy: bool = True
    """Log the policy's entropy even where the loss does not need it."""
    probe_tolerance: float = -1.0
    """Largest mean difference of the probe's log-probs between trainer and generation engine after a sync; the run stops above it.
    -1: 1e-3 in fp32, 0.1 where either side computes in bf16."""
    consistency: Consistency = Consistency.warn
    """On the first optimizer step of an update on fresh samples the ratio is 1, the approximate KL 0, and the log-probs are those of
    the generation engine. Where they are not: warn, stop with an error, or do not look."""
    consistency_tolerance: float = -1.0
    """What counts as rounding there: of any token where both engines compute in fp32, of the mean over tokens otherwise.
    -1: 1e-4 in fp32, 0.05 where either side computes in bf16."""
    seed: int = 0
    """Of sampling: a response is a function of (seed, prompt's uid, number of the sample, weights)."""


@dataclass(kw_only=True)
class CriticConfig:
    """The value model; started from the actor's model with a new head unless `model.path` says otherwise."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: ValueLossConfig = field(default_factory=ValueLossConfig)
    num_epochs: int = 1
    seed: int = 0
    """Of the new value head."""


@dataclass(kw_only=True)
class ReferenceConfig:
    """The frozen policy that the KL is taken to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Engine, layout and micro-batch size of the forward pass; its optimizer is not used."""
    temperature: float = 1.0
    """Of the log-probs: the actor's sampling temperature."""


@dataclass(kw_only=True)
class RewardConfig:
    """Either a Python function or a model that scores whole responses: rewards, and costs too."""

    function: str | None = None
    """package.module:name of f(*, prompt, response, finish_reason, **columns) -> float or dict with "reward" (a cost: with "cost")."""
    model: ModelConfig | None = None
    """A sequence-classification model with one label; its score of prompt + response is the reward."""
    tokenizer: str = "???"
    """Hub name or directory of the tokenizer that turns tokens into the function's text."""
    timeout_s: float = 60.0
    """Most seconds that the function may take for the rows of one task."""
    num_tasks: int = 1
    """Ray tasks that one rank's rows are spread over."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Engine, layout and micro-batch size where the reward is a model."""

    def __post_init__(self) -> None:
        if self.num_tasks < 1:
            raise ValueError(f"reward.num_tasks (or cost.num_tasks) is {self.num_tasks}; use at least 1")
