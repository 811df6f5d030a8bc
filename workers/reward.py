"""Rewards and costs: a Python function over the text of each response, or a sequence-classification
model over its tokens.

A function that raises, takes too long or returns no number stops the run with the row it failed on:
never a reward of 0 for a failed reward.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.devices import HIDDEN
from hybridflow.errors import UserCodeError
from hybridflow.layout import Layout
from hybridflow.worker import Worker
from workers.engines.base import Head
from workers.layouts import training_layout
from workers.model_worker import ModelWorker, sequences_of
from workers.reward_function import function_name, resolve, runs_programs, score_rows
from workers.rewards.sandbox.mode import Sandbox
from workers.rewards.sandbox.probing import check_once
from workers.role_config import RewardConfig, ScorerConfig
from workers.roles import Cost, Reward
from workers.text import ResponseReader, end_token_ids
from workers.time_limit import OutOfTime, limited
from workers.tokenizer import load_tokenizer

LOGGER = logging.getLogger(__name__)
Row = dict[str, Any]
"""Prompt, response, finish_reason and the data's columns, as the function gets them."""
Score = tuple[float, dict[str, float]]


class FunctionScorer(Worker):
    """Runs the function with a timeout: in Ray tasks, or with runtime=local in this process, where
    a breakpoint works."""

    config: ScorerConfig
    role: ClassVar[str] = "reward"

    def __init__(self, config: ScorerConfig, context: RankContext) -> None:
        super().__init__(config, context)
        assert config.function is not None
        function = resolve(config.function, self.role)
        if config.sandbox is Sandbox.required and runs_programs(function):
            LOGGER.info("%s: %s", self.role, check_once())
        self.tokenizer = load_tokenizer(config.policy)
        self.read_responses = ResponseReader(
            self.tokenizer,
            end_token_ids(config.policy, tokenizer=self.tokenizer),
            special_tokens=config.special_tokens,
        )

    @classmethod
    def layouts(cls, config: RewardConfig, world_size: int) -> dict[str, Layout]:
        return {"train": Layout.of(dp=world_size)}

    def score(self, batch: Batch) -> tuple[Tensor, list[dict[str, float]]]:
        """(float32 [rows], further numbers of each row)."""
        if not batch:  # of a rank without rows, or of a step whose groups were all given up
            return torch.zeros(0), []
        rows = self._rows(batch)
        scored = self._run_in_tasks(rows) if self.context.in_ray else self._run_here(rows)
        return torch.tensor([score for score, _ in scored], dtype=torch.float32), [
            metrics for _, metrics in scored
        ]

    def _rows(self, batch: Batch) -> list[Row]:
        prompts = self.tokenizer.batch_decode(
            [row.tolist() for row in batch.ragged("prompt_ids").unbind()], skip_special_tokens=True
        )
        responses = self.read_responses(
            row.tolist() for row in batch.ragged("response_ids").unbind()
        )
        extras = batch.objects("extras") if "extras" in batch else [{}] * len(batch)
        fixed = zip(prompts, responses, batch.objects("finish_reason"), extras, strict=True)
        return [
            {**extra, "prompt": prompt, "response": response, "finish_reason": reason}
            for prompt, response, reason, extra in fixed
        ]

    def _chunks(self, rows: list[Row]) -> list[list[Row]]:
        """The rows of each task."""
        parts = np.array_split(np.arange(len(rows)), self.config.num_tasks)
        return [[rows[i] for i in part] for part in parts if len(part)]

    def _too_slow(self, chunk: list[Row]) -> str:
        assert self.config.function is not None
        return (
            f"{self.role}.function={function_name(self.config.function)!r} took over "
            f"timeout_s={self.config.timeout_s} for {len(chunk)} rows, the first with prompt "
            f"{chunk[0]['prompt']!r} and response {chunk[0]['response'][:200]!r}; make it "
            f"faster, give it a timeout of its own, or raise {self.role}.timeout_s"
        )

    def _run_here(self, rows: list[Row]) -> list[Score]:
        assert self.config.function is not None
        scored = []
        for chunk in self._chunks(rows):
            score = partial(score_rows, self.config.function, chunk, self.role, self.config.sandbox)
            try:
                scored += limited(score, self.config.timeout_s)
            except OutOfTime:
                raise UserCodeError(self._too_slow(chunk)) from None
        return scored

    def _run_in_tasks(self, rows: list[Row]) -> list[Score]:
        import ray

        assert self.config.function is not None
        if not rows:
            return []
        task = ray.remote(score_rows).options(
            num_cpus=0,
            max_retries=self.config.retries,  # after a death, not after an exception
            name=f"{self.role}: {function_name(self.config.function)}",
            runtime_env={"env_vars": HIDDEN},
        )
        chunks = self._chunks(rows)
        function, sandbox = self.config.function, self.config.sandbox
        refs = [task.remote(function, chunk, self.role, sandbox) for chunk in chunks]
        _, late = ray.wait(refs, num_returns=len(refs), timeout=self.config.timeout_s)
        if late:
            for ref in late:
                ray.cancel(ref, force=True)
            raise RuntimeError(self._too_slow(chunks[refs.index(late[0])]))
        try:
            return [row for part in ray.get(refs) for row in part]
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            raise RuntimeError(
                f"{self.role}.function={function_name(self.config.function)!r}: the process that "
                f"scored rows died {self.config.retries + 1} times (native code that crashed, or "
                f"memory that ran out); run the function on those rows by hand, or raise "
                f"{self.role}.retries"
            ) from None


class ModelScorer(ModelWorker):
    """The score of a sequence-classification model at the last token of prompt + response that is
    not padding."""

    config: RewardConfig
    role: ClassVar[str] = "reward"

    def __init__(self, config: RewardConfig, context: RankContext) -> None:
        super().__init__(config, context)
        assert config.model is not None
        self.build(config.model, self.config.train, Head.score, context, trains=False)

    @classmethod
    def layouts(cls, config: RewardConfig, world_size: int) -> dict[str, Layout]:
        return {"train": training_layout(config.train, world_size, cls.role)}

    def score(self, batch: Batch) -> tuple[Tensor, list[dict[str, float]]]:
        """(float32 [rows], an empty dict for each row)."""
        self.to_training()
        outputs = self.engine.forward(self.to_score(sequences_of(batch)))
        if outputs is None or outputs.scores is None:
            return torch.empty(0), []
        return outputs.scores.cpu(), [{}] * len(batch)


class FunctionRewardWorker(FunctionScorer, Reward):
    """The reward of a Python function, one number a response: RewardConfig(function=...).

    A call that raises, runs out of time or returns no finite number stops the run and names the row.
    """

    def compute_reward(self, batch: Batch) -> Batch:
        rewards, metrics = self.score(batch)
        return Batch.of(rewards=rewards, reward_metrics=metrics)


class ModelRewardWorker(ModelScorer, Reward):
    """The reward of a sequence-classification model with one label, one number a response:
    RewardConfig(model=...)."""

    def compute_reward(self, batch: Batch) -> Batch:
        rewards, metrics = self.score(batch)
        return Batch.of(rewards=rewards, reward_metrics=metrics)


class FunctionCostWorker(FunctionScorer, Cost):
    role = "cost"

    def compute_cost(self, batch: Batch) -> Batch:
        costs, metrics = self.score(batch)
        return Batch.of(costs=costs, cost_metrics=metrics)


class ModelCostWorker(ModelScorer, Cost):
    role = "cost"

    def compute_cost(self, batch: Batch) -> Batch:
        costs, metrics = self.score(batch)
        return Batch.of(costs=costs, cost_metrics=metrics)


def reward_worker(config: RewardConfig) -> type[Reward]:
    """Which of the two the settings ask for."""
    return FunctionRewardWorker if is_function(config, "reward") else ModelRewardWorker


def cost_worker(config: RewardConfig) -> type[Cost]:
    return FunctionCostWorker if is_function(config, "cost") else ModelCostWorker


def is_function(config: RewardConfig, role: str) -> bool:
    """ValueError if it is neither a function nor a model, or both."""
    if config.function is None and config.model is None:
        raise ValueError(
            f"{role}: neither function nor model is set; set {role}.function=package.module:name "
            f"or {role}.model.path=..."
        )
    if config.function is not None and config.model is not None:
        raise ValueError(
            f"{role}: both function={function_name(config.function)!r} and a model are set; "
            "choose one"
        )
    return config.function is not None
