"""Validation: what a run is judged by between its steps. Each is called without arguments and
returns named numbers, with the rows that they describe where those are responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from controllers.algorithm_base import means_of_dicts
from controllers.data import RowDataset
from controllers.episodes import episode_metrics, whole_rows
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from workers.generation.config import SamplingConfig
from workers.roles import Generator, Reward

REWARD = "reward/mean"
Validate = Callable[[], Metrics]


class ResponseReward:
    """validate = ResponseReward(actor, reward, prompts, sampling, max_response_tokens); validate()
    # {"reward/mean": 0.4}

    The mean reward of one response for every held-out prompt; with `gold`, a reward that nothing is
    trained on, also what that one says of the same responses (gold/mean and its further numbers).
    """

    def __init__(
        self,
        actor: Generator,
        reward: Reward,
        prompts: RowDataset,
        sampling: SamplingConfig,
        max_response_tokens: int,
        gold: Reward | None = None,
    ) -> None:
        self.actor, self.reward, self.gold, self.prompts = actor, reward, gold, prompts
        self.sampling = replace(sampling, max_response_tokens=max_response_tokens)

    def __call__(self) -> Metrics:
        batch = self.prompts.all()
        batch |= self.actor.generate_sequences(batch, self.sampling)
        scored = self.reward.compute_reward(batch)
        judged = self.gold.compute_reward(batch) if self.gold is not None else None
        whole = whole_rows(batch)
        numbers = {REWARD: float(scored.tensor("rewards")[whole].mean())}
        numbers |= episode_metrics(batch)
        batch |= scored
        if judged is not None:
            numbers["gold/mean"] = float(judged.tensor("rewards")[whole].mean())
            of_whole = judged.rows(whole.numpy())
            numbers |= means_of_dicts(of_whole.objects("reward_metrics"), "gold")
            batch |= judged.rename(rewards="gold_rewards", reward_metrics="gold_metrics")
        return Metrics(numbers, rows=batch)


class HeldOutRows:
    """The algorithm's own numbers (Evaluated.evaluate) on held-out rows."""

    def __init__(self, evaluate: Callable[[Batch], Mapping[str, float]], rows: RowDataset) -> None:
        self.evaluate, self.rows = evaluate, rows

    def __call__(self) -> Metrics:
        return Metrics(self.evaluate(self.rows.all()))
