"""EpisodeSampler: rows of tasks become rows of episodes, in the place of Sampler.

Leaves out how episodes run (executor.py) and what they are (interfaces.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from workers.agents.config import EpisodeActorConfig
from workers.agents.executor import Executor, Finished
from workers.agents.interfaces import as_episode
from workers.agents.model import Draw, Drawn, Limits, Model, Request
from workers.agents.renderer import Renderer
from workers.agents.rows import batch_of, row_of
from workers.engines.base import Head
from workers.engines.model.loading import position_limit
from workers.generation.checked import check_generations
from workers.generation.config import SamplingConfig
from workers.generation.draws import mix
from workers.generation.sampling import most_tokens, stop_token_ids
from workers.sampler import Sampler, sample_seeds
from workers.text import ResponseReader, end_token_ids
from workers.tokenizer import load_tokenizer

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
        self.interface = as_episode(config.environment)
        tokenizer = load_tokenizer(config.model)
        self._tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, self.interface.tools)
        ends = end_token_ids(config.model, tokenizer=tokenizer)
        self.end_token_ids = ends
        self.read = ResponseReader(tokenizer, ends)
        self.context_tokens = config.generation.max_model_len or position_limit(
            config.model, Head.lm
        )

    def generate(
        self, prompts: Batch, sampling: SamplingConfig | None, *, do_sample: bool = True
    ) -> Batch:
        """One episode for every row. A group (rows of one uid) of which an episode failed every
        time is given up; a RuntimeError where too many are."""
        sampling = self._settled(sampling or self.config.generation.sampling)
        if not do_sample:
            sampling = replace(sampling, greedy=True)
        seeds = sample_seeds(self.config.seed, prompts)
        closing = frozenset(stop_token_ids(sampling, self.end_token_ids))
        budgets = self._budgets(prompts)

        def make_model(row: int, draw: Draw) -> Model:
            return Model(
                row=row,
                draw=draw,
                renderer=self.renderer,
                read=self.read,
                end_token_ids=closing,
                config=self.config.episode,
                limits=Limits(
                    reply_tokens=sampling.max_response_tokens,
                    sampled_tokens=budgets[row],
                    context_tokens=self.context_tokens,
                ),
            )

        def answer(requests: Sequence[Request]) -> list[Drawn]:
            return self._answer(requests, seeds, sampling)

        executor = Executor(
            self.interface.episode, self.interface.name, self.config.episode, make_model, answer
        )
        finished = executor.run(prompts.objects("task"))
        return self._rows(finished, prompts)

    def _budgets(self, prompts: Batch) -> list[int]:
        """Most tokens that the policy may draw in each row's episode."""
        most = self.config.episode.max_sampled_tokens or self.context_tokens
        if "max_response_tokens" not in prompts:
            return [most] * len(prompts)
        return prompts.tensor("max_response_tokens").clamp(max=most).tolist()

    def _answer(
        self, requests: Sequence[Request], seeds: np.ndarray, sampling: SamplingConfig
    ) -> list[Drawn]:
        """Answers to the requests, in order. Those near the end of the context have less
        room than the others, and are asked for apart."""
        answers: dict[int, Drawn] = {}
        by_most: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            space = self.context_tokens - len(request.ids)
            by_most.setdefault(min(space, sampling.max_response_tokens), []).append(number)
        for most in sorted(by_most, reverse=True):
            numbers = by_most[most]
            part = [requests[number] for number in numbers]
            limited = replace(sampling, max_response_tokens=most)
            answers |= zip(numbers, self._draw(part, seeds, limited), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _draw(
        self, requests: Sequence[Request], seeds: np.ndarray, sampling: SamplingConfig
    ) -> list[Drawn]:
        limits = np.array([request.limit for request in requests], dtype=np.int64)
        turn_seeds = [turn_seed(int(seeds[request.row]), request.num_drawn) for request in requests]
        generated = self.engine.generate(
            [np.array(request.ids, dtype=np.int64) for request in requests],
            np.array(turn_seeds, dtype=np.int64),
            sampling,
            limits,
        )
        most = np.array(most_tokens(len(requests), sampling, limits), dtype=np.int64)
        check_generations(
            generated, len(requests), self._vocab_size, self.config.generation.engine, most
        )
        ends = np.cumsum(generated.lengths)
        answers = []
        for end, length, reason in zip(
            ends, generated.lengths, generated.finish_reasons, strict=True
        ):
            answers.append(
                Drawn(
                    ids=generated.response_ids[end - length : end].tolist(),
                    log_probs=generated.log_probs[end - length : end].tolist(),
                    stopped=reason == "stop",
                    weight_version=self.engine.weight_version,
                )
            )
        return answers

    def _rows(self, finished: Sequence[Finished], prompts: Batch) -> Batch:
        """The rows of the episodes, those of failed groups emptied."""
        uids = prompts.tensor("uid").tolist()
        given_up: dict[int, str] = {}
        for uid, episode in zip(uids, finished, strict=True):
            if episode.outcome is None:
                given_up.setdefault(uid, episode.failures[-1].text)
        num_groups = len(set(uids))
        for uid, reason in given_up.items():
            LOGGER.warning(
                "environment=%s: the group of prompt %d is given up: %s",
                self.interface.name,
                uid,
                reason,
            )
        if len(given_up) > self.config.episode.max_given_up * num_groups:
            reason = next(iter(given_up.values()))
            raise RuntimeError(
                f"environment={self.interface.name}: {len(given_up)} of {num_groups} groups had an "
                f"episode that failed {1 + self.config.episode.retries} times, more than "
                f"episode.max_given_up={self.config.episode.max_given_up}; the first because "
                f"{reason}"
            )
        version = self.engine.weight_version
        return batch_of(
            [
                row_of(episode, version, given_up=uid in given_up)
                for uid, episode in zip(uids, finished, strict=True)
            ]
        )


def turn_seed(seed: int, num_drawn: int) -> int:
    """The seed of a reply after `num_drawn` drawn tokens of the episode; the first reply has the
    episode's own, so that an episode of one turn draws what a plain response would."""
    if num_drawn == 0:
        return seed
    mixed: Any = mix(torch.tensor([seed])) + num_drawn
    return int(mix(mixed)[0]) & (2**63 - 1)
