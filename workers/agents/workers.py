"""The workers of a run with an environment: the actor's, whose responses are episodes, and the
reward's, which reads what the episodes returned."""

from __future__ import annotations

from abc import abstractmethod

import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.dataflow import CallKind
from hybridflow.layout import Layout
from hybridflow.protocols import THREE_D, THREE_D_ALL_MICRO_DP
from hybridflow.worker import remote
from workers.actor import ActorWorker
from workers.agents.config import EpisodeScorerConfig
from workers.agents.episode_stream import EpisodeStream
from workers.agents.outcome import FAILED, PARTS, EnvironmentMistake
from workers.agents.rows import WRITES, WRITES_AHEAD
from workers.agents.sampler import EpisodeSampler
from workers.generation.config import SamplingConfig
from workers.generator import GeneratorWorker
from workers.reward import reward_worker
from workers.role_config import RewardConfig
from workers.roles import TO_REPLICAS, Actor, Generator, Reward, StreamingGenerator
from workers.row_stream import Stream
from workers.split_actor import GenerationWorker


class EpisodeGenerator(Generator):
    """A generator whose responses are episodes: it reads tasks, and writes their prompts too."""

    @remote(
        THREE_D_ALL_MICRO_DP,
        reads=("task", "uid"),
        optional=("sample", "max_response_tokens"),
        writes=WRITES,
        kind=CallKind.generation,
        together="uid",
    )
    @abstractmethod
    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        """One episode for every row, all of them under the actor's latest weights."""


class EpisodeActor(Actor, EpisodeGenerator):
    """The actor of a run with an environment, as its page is traced."""


class EpisodeStreamingGenerator(EpisodeGenerator, StreamingGenerator):
    """The same in slices of generation, between which environments go on."""

    @remote(
        TO_REPLICAS,
        reads=("task", "uid", "sample", "replica"),
        optional=("max_response_tokens",),
        part="replica",
    )
    @abstractmethod
    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        """Begins an episode for every row; the rows of a group go to one replica."""

    @remote(
        THREE_D_ALL_MICRO_DP,
        reads=("uid", "sample", "replica"),
        writes=WRITES_AHEAD,
        part="replica",
    )
    @abstractmethod
    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        """The episodes of whole groups that ended, which the generator then forgets."""


class EpisodeActorWorker(ActorWorker, EpisodeStreamingGenerator):
    sampler_class = EpisodeSampler

    def make_stream(self) -> Stream:
        assert isinstance(self.sampler, EpisodeSampler), "it is of sampler_class"
        return EpisodeStream(self.sampler)


class EpisodeGenerationWorker(GenerationWorker, EpisodeStreamingGenerator):
    sampler_class = EpisodeSampler

    def make_stream(self) -> Stream:
        assert isinstance(self.sampler, EpisodeSampler), "it is of sampler_class"
        return EpisodeStream(self.sampler)


class EpisodeGeneratorWorker(GeneratorWorker, EpisodeGenerator):
    sampler_class = EpisodeSampler


class EpisodeRewardWorker(Reward):
    """The reward that each episode returned, plus that of a function or a model where one is set;
    each is logged under its own name then."""

    config: EpisodeScorerConfig

    def __init__(self, config: EpisodeScorerConfig, context: RankContext) -> None:
        super().__init__(config, context)
        self.further: Reward | None = None
        if scores_further(config):
            self.further = reward_worker(config)(config, context)

    @classmethod
    def layouts(cls, config: RewardConfig, world_size: int) -> dict[str, Layout]:
        if scores_further(config):
            return reward_worker(config).layouts(config, world_size)
        return {"train": Layout.of(dp=world_size)}

    @remote(
        THREE_D,
        reads=(
            "prompt_ids",
            "response_ids",
            "finish_reason",
            "episode_rewards",
            "episode_metrics",
        ),
        optional=("extras", "segment_lengths"),
        writes=("rewards", "reward_metrics"),
        balance="num_tokens",
        near="uid",
    )
    def compute_reward(self, batch: Batch) -> Batch:
        rewards = batch.tensor("episode_rewards").clone()
        failed = torch.tensor([reason == FAILED for reason in batch.objects("finish_reason")])
        metrics = [dict(of_row.get("numbers", {})) for of_row in batch.objects("episode_metrics")]
        if self.config.model is not None and "segment_lengths" in batch:
            segments = batch.ragged("segment_lengths")
            if len(segments.values) > len(batch):
                raise EnvironmentMistake(
                    "reward.model reads one context, and an episode has several, since its "
                    "history was rewritten; use reward.function or the environment's own reward"
                )
        if self.further is not None:
            # A failed row has nothing to judge.
            whole = torch.nonzero(~failed).squeeze(1)
            scored = self.further.compute_reward(batch.rows(whole.numpy()))
            further = scored.tensor("rewards")
            for row, value, numbers in zip(
                whole.tolist(), further.tolist(), scored.objects("reward_metrics"), strict=True
            ):
                parts = dict(zip(PARTS, (float(rewards[row]), value), strict=True))
                doubled = sorted(numbers.keys() & {*parts, *metrics[row]})
                if doubled:
                    raise EnvironmentMistake(
                        f"the reward beside the environment returned {doubled[0]!r}, which is a number of "
                        "the episode's own; give one of the two another name"
                    )
                metrics[row] |= parts | numbers
            rewards[whole] += further
        return Batch.of(rewards=rewards, reward_metrics=metrics)


def scores_further(config: RewardConfig) -> bool:
    """Whether a function or a model is set beside the environment."""
    return config.function is not None or config.model is not None
