"""EpisodeSampler: rows of tasks become rows of episodes, in the place of Sampler.

Leaves out how episodes run (executor.py) and what they are (interfaces.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from workers.agents.config import EpisodeActorConfig
from workers.agents.executor import Episodes, Executor
from workers.agents.interfaces import as_episode
from workers.agents.live import Finished, LiveEpisodes
from workers.agents.model import Draw, Drawn, Model, Request
from workers.agents.models import Models, Plan
from workers.agents.processes import EpisodesInProcesses, Processes
from workers.agents.replica import Replica
from workers.agents.rows import WRITES, batch_of, row_of
from workers.engines.base import Head
from workers.engines.model.loading import position_limit
from workers.generation.base import generations
from workers.generation.checked import check_generations
from workers.generation.config import SamplingConfig
from workers.generation.draws import mix
from workers.generation.rows import FinishedRow
from workers.sampler import Sampler, sample_seeds
from workers.text import end_token_ids
from workers.tokenizer import dated_tokenizer

LOGGER = logging.getLogger(__name__)


class EpisodeSampler(Sampler):
    """A Sampler whose generate reads the column `task` and returns whole episodes."""

    config: EpisodeActorConfig

    def __init__(
        self,
        config: EpisodeActorConfig,
        context: RankContext,
        layout: Layout,
        *,
        load_weights: bool = False,
        adapter: bool = False,
    ) -> None:
        super().__init__(config, context, layout, load_weights=load_weights, adapter=adapter)
        self.replica = Replica(layout, context)
        self.interface = as_episode(config.environment)
        self._tokenizer = dated_tokenizer(config.model, config.date)
        self.models = Models(
            self._tokenizer,
            self.interface.tools,
            end_token_ids(config.model, tokenizer=self._tokenizer),
            config.episode,
            context_tokens=config.generation.max_model_len or position_limit(config.model, Head.lm),
            vocab_size=self._vocab_size,
        )
        self.processes: Processes | None = None
        """Those that run the episodes, where it is not this one."""
        if config.episode.processes and self.replica.leads:
            self.processes = Processes(
                config.episode.processes, context, config.environment, config.episode, self.models
            )

    def generate(
        self, prompts: Batch, sampling: SamplingConfig | None, *, do_sample: bool = True
    ) -> Batch:
        """One episode for every row. A group (rows of one uid) of which an episode failed every
        time is given up."""
        plans = self.plans(prompts, sampling, do_sample=do_sample)

        def compute(requests: Sequence[Request]) -> list[Drawn]:
            return self._answer(requests, plans)

        if not self.replica.leads:
            self.replica.follow(compute)
            return Batch.of()

        executor = Executor(
            lambda: self.episodes(plans),
            lambda requests: self.replica.compute(compute, requests),
            lockstep=self.config.episode.lockstep,
        )
        try:
            finished = executor.run(prompts.objects("task"))
        finally:
            self.replica.end()
        return self.rows(finished, prompts.tensor("uid").tolist()).select(*WRITES)

    def plans(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> list[Plan]:
        """How the episode of each row is drawn."""
        sampling = self._settled(sampling or self.config.generation.sampling)
        if not do_sample:
            sampling = replace(sampling, greedy=True)
        plans = []
        seeds = sample_seeds(self.config.seed, prompts).tolist()
        for seed, budget in zip(seeds, self._budgets(prompts), strict=True):
            plans.append(Plan(seed=seed, sampling=sampling, most_tokens=budget))
        return plans

    def episodes(self, plans: Sequence[Plan] | Mapping[int, Plan]) -> LiveEpisodes:
        """Those of the rows that `plans` has when they start."""
        if self.processes is not None:
            return EpisodesInProcesses(self.processes, plans)

        def make_model(row: int, draw: Draw) -> Model:
            return self.models.make(row, draw, plans[row])

        interface = self.interface
        return Episodes(interface.episode, interface.name, self.config.episode, make_model)

    def close(self) -> None:
        if self.processes is not None:
            self.processes.close()
        super().close()

    def _budgets(self, prompts: Batch) -> list[int]:
        """Most tokens that the policy may draw in each row's episode."""
        most = self.config.episode.max_sampled_tokens or self.models.context_tokens
        if "max_response_tokens" not in prompts:
            return [most] * len(prompts)
        return prompts.tensor("max_response_tokens").clamp(max=most).tolist()

    def _answer(self, requests: Sequence[Request], plans: Sequence[Plan]) -> list[Drawn]:
        """Answers to the requests, in order."""
        keys = []
        for request in requests:
            keys.append(self.ask(request, plans[request.row]))
        try:
            self.engine.run(until=keys)
            rows = self.engine.finished(keys)
        finally:
            self.engine.cancel(keys)  # after an error, those that are left
        return [self.reply(rows[key], request) for key, request in zip(keys, requests, strict=True)]

    def ask(self, request: Request, plan: Plan) -> int:
        """Submits the reply that is wanted; the engine's key."""
        seed = turn_seed(plan.seed, request.num_drawn)
        (key,) = self.engine.submit(
            [np.array(request.ids, dtype=np.int64)],
            np.array([seed], dtype=np.int64),
            plan.sampling,
            np.array([request.limit], dtype=np.int64),
        )
        return key

    def reply(self, row: FinishedRow, request: Request) -> Drawn:
        """The engine's answer to the request, checked."""
        check_generations(
            generations([row], num_prompt_tokens=len(request.ids), seconds=0.0),
            1,
            self._vocab_size,
            self.config.generation.engine,
            np.array([request.limit], dtype=np.int64),
        )
        return Drawn(
            ids=row.token_ids.tolist(),
            log_probs=row.log_probs.tolist(),
            stopped=row.finish_reason == "stop",
            weight_versions=row.weight_versions.tolist(),
        )

    def rows(self, finished: Sequence[Finished], uids: Sequence[int]) -> Batch:
        """The rows WRITES_AHEAD of the episodes, whose groups are whole; those of failed groups are
        empty."""
        given_up: dict[int, str] = {}
        for uid, episode in zip(uids, finished, strict=True):
            if episode.outcome is None:
                given_up.setdefault(uid, episode.failures[-1].text)
        for uid, reason in given_up.items():
            LOGGER.warning(
                "environment=%s: the group of prompt %d is given up: %s",
                self.interface.name,
                uid,
                reason,
            )
        if finished and all(map(_says_nothing, finished)):
            LOGGER.warning(
                "environment=%s: none of %d episodes asked the policy for a reply, and nothing of "
                "them is trained on; await model.reply, or give the agent the URL of an Endpoint",
                self.interface.name,
                len(finished),
            )
        if finished and all(map(_has_no_room, finished)):
            LOGGER.warning(
                "environment=%s: none of %d episodes had room for a reply, and nothing of them is trained "
                "on: what comes before it, the tools' schemas included, fills the context of %d tokens; "
                "set actor.generation.max_model_len higher, or make it shorter",
                self.interface.name,
                len(finished),
                self.models.context_tokens,
            )
        version = self.engine.weight_version
        return batch_of(
            [
                row_of(episode, version, given_up=given_up.get(uid, ""))
                for uid, episode in zip(uids, finished, strict=True)
            ]
        )


def _says_nothing(episode: Finished) -> bool:
    """Whether it came to its end without having asked for a reply."""
    segments = episode.segments
    return episode.outcome is not None and not segments.num_turns and not segments.finish_reason


def _has_no_room(episode: Finished) -> bool:
    """Whether its context was full before the first reply."""
    segments = episode.segments
    return not segments.num_turns and segments.finish_reason == "context"


def turn_seed(seed: int, num_drawn: int) -> int:
    """The seed of a reply after `num_drawn` drawn tokens of the episode; the first reply has the
    episode's own, so that an episode of one turn draws what a plain response would."""
    if num_drawn == 0:
        return seed
    mixed: Any = mix(torch.tensor([seed])) + num_drawn
    return int(mix(mixed)[0]) & (2**63 - 1)
