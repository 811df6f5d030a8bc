"""Settings of the roles: which model, which engines, which loss."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from workers.config import ModelConfig, TrainConfig
from workers.generation.config import GenerationConfig, InFlight, SamplingConfig
from workers.losses.config import PolicyLossConfig, ValueLossConfig
from workers.rewards.combined import RewardPart
from workers.rewards.sandbox.mode import Sandbox


class Consistency(StrEnum):
    """The reaction where the first step on fresh samples shows that trainer and sampler
    disagree."""

    off = "off"
    warn = "warn"
    error = "error"


class AdapterSync(StrEnum):
    """The form in which a weight sync sends a policy with an adapter."""

    auto = "auto"
    """The adapter where the generation engine can take it, the merged weights elsewhere."""
    adapter = "adapter"
    """The small matrices alone; the engine computes with base and adapter."""
    merged = "merged"
    """The weights with the adapter in them; the engine computes as with any weights."""


class RouterReplay(StrEnum):
    """Whose choice of experts a mixture of experts is trained with."""

    off = "off"
    """The routers choose anew in every pass."""
    R2 = "R2"
    """That of the training engine before the update: the pass that gives the old log-probs."""
    R3 = "R3"
    """That of the generation engine, as it drew the response."""


@dataclass(kw_only=True)
class ActorConfig:
    """The policy: trained by `train`, sampled by `generation`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    num_epochs: int = 1
    """Optimizer passes over the rows of every step (PPO's epochs). Passes over the data are
    loop.num_epochs."""
    critic_warmup_steps: int = 0
    """First updates of a run that leave the actor as it is, so that a new critic learns to
    judge it first."""
    report_entropy: bool = True
    """Log the policy's entropy even where the loss does not need it."""
    adapter_sync: AdapterSync = AdapterSync.auto
    """With train.lora: what a weight sync sends."""
    router_replay: RouterReplay = RouterReplay.off
    """With a mixture of experts: routes that are recorded once and replayed in every pass of the
    update, so that a rounding that turns a route over does not change the policy that is compared.
    The experts' weights are the router's scores of the moment, through which it is trained."""
    probe_tolerance: float = -1.0
    """Largest mean difference of the probe's log-probs between trainer and generation engine after
    a sync; the run stops above it.
    -1: 1e-3 in fp32, 0.1 where either side computes in bf16."""
    consistency: Consistency = Consistency.warn
    """On the first optimizer step of an update on fresh samples the ratio is 1, the approximate
    KL 0, and the log-probs are those of the generation engine. Where they are not: warn, stop
    with an error, or do not look."""
    consistency_tolerance: float = -1.0
    """The largest difference that counts as rounding: of any token where both engines compute in
    fp32, of the mean over tokens otherwise.
    -1: 1e-4 in fp32, 0.05 where either side computes in bf16."""
    seed: int = 0
    """Decides sampling (a response is a function of seed, prompt's uid, number of the sample
    and weights), and the order of mini-batches from the second pass over a batch on."""

    @property
    def passes_per_batch(self) -> int:
        """num_epochs under the name that PolicyConfig has for it."""
        return self.num_epochs


@dataclass(kw_only=True)
class StreamingActorConfig(ActorConfig):
    """The actor's settings, and what becomes of rows in flight when new weights come
    (asynchrony.in_flight)."""

    in_flight: InFlight = InFlight.recompute


@dataclass(kw_only=True)
class PolicyConfig:
    """A language model that is trained without generating (supervised fine-tuning, DPO)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    passes_per_batch: int = 1
    """Optimizer passes over the rows of every step. Passes over the data are loop.num_epochs."""
    seed: int = 0
    """Decides the order of mini-batches from the second pass on."""


@dataclass(kw_only=True)
class PreferenceConfig:
    """A reward or cost model in training, started from a language model with a new head or from
    an earlier reward model."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(new_head=True))
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Decides the new head's weights."""


@dataclass(kw_only=True)
class CriticConfig:
    """The value model; started from the actor's model with a new head unless `model.path` says
    otherwise."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: ValueLossConfig = field(default_factory=ValueLossConfig)
    num_epochs: int = 1
    """Optimizer passes over the rows of every step (PPO's epochs). Passes over the data are
    loop.num_epochs."""
    seed: int = 0
    """Decides the new value head's weights, and the order of mini-batches from the second pass
    on."""


@dataclass(kw_only=True)
class ReferenceConfig:
    """The frozen policy that the KL is taken to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Engine, layout and micro-batch size of the forward pass; its optimizer is not used."""
    temperature: float = 1.0
    """Temperature of the log-probs: the actor's sampling temperature."""


@dataclass(kw_only=True)
class RewardConfig:
    """Either a Python function or a model that scores whole responses: rewards, and costs too."""

    function: Any = None
    """package.module:name of f(*, prompt, response, finish_reason, **columns) -> float or dict
    with "reward" (a cost: with "cost"); from Python also the function itself."""
    parts: dict[str, RewardPart] = field(default_factory=dict)
    """Several functions with weights in place of one: name -> {function, weight, options}. The
    reward is the weighted sum; each part's own value is logged as reward/<name>."""
    model: ModelConfig | None = None
    """A sequence-classification model with one label; its score of prompt + response is the
    reward."""
    special_tokens: bool = True
    """Leave special tokens, such as a <think> that is registered as one, in the response's text;
    those that begin, end or pad it never are. false leaves all of them out."""
    timeout_s: float = 60.0
    """Most seconds that the function may take for the rows of one task."""
    retries: int = 2
    """Times that a task's rows are scored anew after the process that scored them died. A function
    that raises is not called again."""
    sandbox: Sandbox = Sandbox.required
    """Programs that a reward such as workers.rewards:code runs: required: in the sandbox, which is
    tried before the first step, or the run stops; off: as the run's user, if the reward's options
    say allow_unsafe: true as well."""
    num_tasks: int = 1
    """Ray tasks that one rank's rows are spread over."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Engine, layout and micro-batch size where the reward is a model."""

    def __post_init__(self) -> None:
        if self.num_tasks < 1:
            raise ValueError(
                f"reward.num_tasks (or cost.num_tasks) is {self.num_tasks}; use at least 1"
            )
        if not self.timeout_s > 0:
            raise ValueError(
                f"reward.timeout_s (or cost.timeout_s) is {self.timeout_s}; use more than 0"
            )
        if self.retries < 0:
            raise ValueError(
                f"reward.retries (or cost.retries) is {self.retries}; use 0, or how often rows may "
                "be scored anew"
            )
        if self.parts and self.function is not None:
            raise ValueError(
                "reward.function and reward.parts are both set; make the function one of the parts"
            )


@dataclass(kw_only=True)
class ScorerConfig(RewardConfig):
    """The settings of a reward or cost, and the model whose tokens its worker turns
    into text."""

    policy: ModelConfig


class VerdictKind(StrEnum):
    probability = "probability"
    """The probability that the judge would say yes, from one forward pass: a reward between 0
    and 1."""
    written = "written"
    """The judge writes, and the verdict is read out of its text: 0 or 1, or the number that it
    gives."""


@dataclass(kw_only=True)
class JudgeConfig:
    """A language model that judges answers: judge.model.path=Qwen/Qwen2.5-7B-Instruct"""

    model: ModelConfig = field(default_factory=ModelConfig)
    special_tokens: bool = True
    """Leave special tokens, such as a <think> that is registered as one, in the response's text;
    those that begin, end or pad it never are. false leaves all of them out."""
    verdict: VerdictKind = VerdictKind.probability
    template: str = (
        "Question:\n{prompt}\n\nAnswer:\n{response}\n\nIs the answer correct? Reply with yes or no."
    )
    """The judge's prompt; {prompt}, {response} and every column of the data may stand in it. It
    becomes the message of a user where the judge's tokenizer has a chat template."""
    yes: str = "yes"
    """The judge's word for a good answer, as it would write it after the prompt."""
    no: str = "no"
    """Its word for a bad answer."""
    pattern: str = ""
    """written: regular expression of the verdict (yes, no or a number; the last match counts,
    its group where it has one); empty looks for yes and no."""
    unreadable_reward: float | None = None
    """written: reward of a row whose verdict can't be read, counted in reward/unreadable; null
    stops the run with the text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """probability: engine, layout and micro-batch size of the forward pass."""
    generation: GenerationConfig = field(
        default_factory=lambda: GenerationConfig(sampling=SamplingConfig(greedy=True))
    )
    """written: the engine that the judge writes with."""
    seed: int = 0
    """written: decides what a judge that draws (generation.sampling.greedy=false) writes of a
    text."""

    def __post_init__(self) -> None:
        if "response" not in self.template_fields:
            raise ValueError(
                f"judge.template is {self.template!r}; it must have {{response}}, or the judge "
                "would not see the answer"
            )
        yes, no = self.yes.strip().lower(), self.no.strip().lower()
        if not yes or not no or yes == no:
            raise ValueError(
                f"judge.yes is {self.yes!r} and judge.no {self.no!r}; they must be two different "
                "words"
            )
        for name, value in (
            ("pattern", self.pattern),
            ("unreadable_reward", self.unreadable_reward),
        ):
            if self.verdict is VerdictKind.probability and value not in ("", None):
                raise ValueError(
                    f"judge.{name} is {value!r}, which nothing reads with "
                    "judge.verdict=probability; set judge.verdict=written, or leave it out"
                )
        self._check_pattern()
        if self.unreadable_reward is not None and not math.isfinite(self.unreadable_reward):
            raise ValueError(
                f"judge.unreadable_reward is {self.unreadable_reward}; give a finite reward, or "
                "null to stop the run instead"
            )

    @property
    def template_fields(self) -> list[str]:
        """Names in braces."""
        try:
            return [
                name
                for _, name, _, _ in string.Formatter().parse(self.template)
                if name is not None
            ]
        except ValueError as error:
            raise ValueError(
                f"judge.template is {self.template!r} ({error}); names stand in braces, and a "
                "brace that is text is written twice"
            ) from None

    def _check_pattern(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(
                f"judge.pattern is {self.pattern!r}, which is no regular expression ({error}); "
                "correct it"
            ) from None
        if groups > 1:
            raise ValueError(
                f"judge.pattern is {self.pattern!r} with {groups} groups; use one for the "
                "verdict, and (?:...) for the others"
            )


@dataclass(kw_only=True)
class JudgeRoleConfig(JudgeConfig):
    """The judge's settings, and the model whose tokens its worker turns into text."""

    policy: ModelConfig
    date: str | None = None
    """See DataConfig.date."""
