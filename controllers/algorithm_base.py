"""The parts that the algorithms' pages share: common settings, cutting a batch into mini-batches, and the
numbers that describe a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from controllers.episodes import episode_metrics, whole_rows
from hybridflow.batch import Batch
from hybridflow.results import Metrics
from hybridflow.seeds import spread_seed
from hybridflow.tracing import on_controller
from workers import columns as columns  # declares every column named below
from workers.losses.kl import KLEstimator, kl_estimate
from workers.losses.segments import row_of_token, segment_sum


@dataclass(kw_only=True)
class AlgorithmConfig:
    """The settings that every algorithm has; each adds its own in its file."""

    name: str = "???"
    """The algorithm; the recipe chooses it, and with it the settings below."""
    samples_per_prompt: int = 1
    """Responses drawn for every prompt."""
    num_mini_batches: int = 1
    """Optimizer steps per epoch of an update: the batch's rows are dealt over them at random,
    equal numbers as far as it goes."""
    seed: int = 0
    """Decides the random choices on the controller: which mini-batch a row is dealt to, and the
    tokens that Clip-Cov and KL-Cov draw."""

    losses: ClassVar[tuple[str, ...]] = ()
    """The policy losses (actor.loss.name) that make it this algorithm; empty: any."""
    fewest_samples: ClassVar[int] = 1
    """Samples of a prompt without which there is nothing to learn from."""

    def __post_init__(self) -> None:
        if self.num_mini_batches < 1:
            raise ValueError(
                f"algorithm.num_mini_batches is {self.num_mini_batches}; use at least 1"
            )
        if self.samples_per_prompt < self.fewest_samples:
            why = (
                f": {self.name} compares the samples of a prompt" if self.fewest_samples > 1 else ""
            )
            raise ValueError(
                f"algorithm.samples_per_prompt is {self.samples_per_prompt}; use at least "
                f"{self.fewest_samples}{why}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the algorithm itself (not the actor's loss) reads ref_log_probs."""
        return False


class Algorithm(Protocol):
    """An algorithm as the loop runs it: a class in a file of its own and an entry in ALGORITHMS
    (controllers/__init__.py)."""

    config: Any

    def __init__(self, *, config: Any, **roles: Any) -> None:
        """Every role and stream of its entry by name; roles as handles, fakes, or stand-ins
        that record."""

    def step(self, prompts: Batch) -> Metrics:
        """One step on data.batch_size rows: calls the roles, updates what is trained, and returns
        the metrics by name, each a number of this step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must hold of the algorithm's own numbers: plain values for JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict returned, on an algorithm with the same settings."""
        ...


def check_fractions(**values: float) -> None:
    """ValueError for a setting of the algorithm outside 0 to 1."""
    for field, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"algorithm.{field} is {value}; choose 0 to 1")


class Stateless:
    """Base of an algorithm that has no numbers of its own to keep over a restart."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is nothing to store."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""


def response_lengths(batch: Batch) -> Tensor:
    """int64 [rows]: tokens that the policy sampled for each response."""
    if "num_sampled" in batch:
        return batch.tensor("num_sampled")
    return batch.tensor("num_tokens") - batch.ragged("prompt_ids").lengths


class Evaluated(Algorithm, Protocol):
    """An algorithm that is judged by its own numbers on held-out rows, not by the reward of
    responses."""

    def evaluate(self, rows: Batch) -> Mapping[str, float]: ...


def mini_batch_column(uid: Tensor, config: AlgorithmConfig) -> Tensor:
    """int64 [rows]: the mini-batch of every row, drawn at random from the prompts' ids and
    algorithm.seed, so that it does not depend on the layout.

    Samples of one prompt share its mini-batch, and so the computation of its tokens; with fewer
    prompts than mini-batches, or with prompts of different numbers of samples, rows are dealt one
    by one.
    """
    if config.num_mini_batches == 1 or not len(uid):
        return torch.zeros(len(uid), dtype=torch.int64)
    prompts, unit, counts = torch.unique(uid, return_inverse=True, return_counts=True)
    if len(prompts) % config.num_mini_batches or (counts != counts[0]).any():
        unit = torch.arange(len(uid))
    num_units = int(unit.max()) + 1
    entropy = uid.numpy().astype(np.uint64) ^ np.uint64(spread_seed(config.seed))
    order = np.random.default_rng(entropy).permutation(num_units)
    column = np.empty(num_units, dtype=np.int64)
    for number, units in enumerate(np.array_split(order, config.num_mini_batches)):
        column[units] = number
    return torch.from_numpy(column)[unit]


@on_controller(reads=("uid",), writes=("mini_batch",))
def assign_mini_batches(batch: Batch, config: AlgorithmConfig) -> Batch:
    """The mini-batch of every row, for a page that computes nothing else of its own."""
    return Batch.of(mini_batch=mini_batch_column(batch.tensor("uid"), config))


@on_controller(reads=("pair",), writes=("mini_batch",))
def assign_pair_mini_batches(pairs: Batch, config: AlgorithmConfig) -> Batch:
    """The same for preference pairs, whose two rows are in one mini-batch."""
    pair, row = torch.unique(pairs.tensor("pair"), return_inverse=True)
    return Batch.of(mini_batch=mini_batch_column(pair, config)[row])


def pair_accuracy(pairs: Batch, scores: Tensor) -> dict[str, float]:
    """The share of preference pairs (columns pair, chosen) whose chosen row has the higher of
    the scores [rows] (a tie does not count), the mean margin, and the mean of -log
    sigmoid(margin)."""
    pair, chosen = pairs.tensor("pair"), pairs.tensor("chosen")
    better = scores[chosen][torch.argsort(pair[chosen])].double()
    worse = scores[~chosen][torch.argsort(pair[~chosen])].double()
    margin = better - worse
    return {
        "accuracy": float((margin > 0).double().mean()),
        "loss": float(-torch.nn.functional.logsigmoid(margin).mean()),
        "margin": float(margin.mean()),
    }


def count_tokens(rows: Batch) -> Metrics:
    """The number of rows that nobody generates, and of their tokens."""
    return Metrics(
        sources=[
            lambda: {"rows": float(len(rows)), "tokens": float(rows.tensor("num_tokens").sum())}
        ]
    )


def batch_metrics(batch: Batch) -> Metrics:
    """Rewards, lengths and the KL to the reference of a batch, read when they are logged, and
    the batch for samples of it (controllers/samples.py)."""
    return Metrics(sources=[lambda: _batch_metrics(batch)], rows=batch)


def _batch_metrics(batch: Batch) -> Mapping[str, float]:
    if not batch:  # all groups were given up
        return {"tokens": 0.0}
    num_tokens = batch.tensor("num_tokens").float()
    response = batch.ragged("rollout_log_probs")
    lengths = response.lengths.float()
    finished = [reason == "stop" for reason in batch.objects("finish_reason")]
    metrics = {
        "response_tokens/mean": float(lengths.mean()),
        "response_tokens/max": float(lengths.max()),
        "response_tokens/min": float(lengths.min()),
        "response_tokens/finished": sum(finished) / len(finished),
        "tokens": float(num_tokens.sum()),
        **episode_metrics(batch),
    }
    if "ref_log_probs" in batch:
        kl = kl_estimate(response.values, batch.ragged("ref_log_probs").values, KLEstimator.k1)
        metrics["kl/reference"] = float(
            segment_sum(kl, row_of_token(response.lengths), len(batch)).mean()
        )
    if "rewards" in batch:
        rewards = batch.tensor("rewards")[whole_rows(batch)]
    if "rewards" in batch and len(rewards):
        metrics |= {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/max": float(rewards.max()),
            "reward/min": float(rewards.min()),
            **means_of_dicts(batch.objects("reward_metrics"), "reward"),
        }
    if "costs" in batch:
        costs = batch.tensor("costs")
        metrics |= {
            "cost/mean": float(costs.mean()),
            "cost/max": float(costs.max()),
            "cost/min": float(costs.min()),
        }
        metrics |= means_of_dicts(batch.objects("cost_metrics"), "cost")
    return metrics


def means_of_dicts(rows: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """The further numbers of a reward or cost function, each over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(f"{prefix}/{name}", []).append(value)
    return {name: float(np.mean(of_rows)) for name, of_rows in values.items()}
