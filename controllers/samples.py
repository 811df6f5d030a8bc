"""Samples of what the model says: a few rows of a validation or a training step as text, for
the tracker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridflow.batch import Batch
from hybridflow.metrics import Sample, SamplesConfig
from hybridflow.results import Metrics
from workers.agents.turns import turns_of
from workers.text import ResponseReader

NUMBERS = {
    "reward": "rewards",
    "baseline_reward": "baseline_rewards",
    "cost": "costs",
    "gold": "gold_rewards",
}
"""A sample's score -> its column."""
FURTHER_NUMBERS = {"reward": "reward_metrics", "cost": "cost_metrics", "gold": "gold_metrics"}
"""A sample's score -> the column with the further numbers of the function that gave it."""
TEXTS = ("prompt_ids", "response_ids", "finish_reason", "weight_version")
EPISODES = ("loss_mask", "turn_lengths", "turn_rewards", "episode_metrics")
"""The columns that tell an episode's turns apart."""


class SampleReader:
    """read = SampleReader(config.metrics.samples, tokenizer, seed=0); read.validation(metrics)

    Reads the rows behind an algorithm's or a validation's numbers (Metrics.rows), and of them only
    what is shown: the first response to each of a few prompts, the same ones for the same seed and
    number of prompts. Numbers that describe no generated responses (sft, dpo, ...) have no samples.
    """

    def __init__(
        self,
        config: SamplesConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.read_responses = ResponseReader(tokenizer, end_token_ids)

    def validation(self, metrics: Metrics) -> list[Sample]:
        return self._read(metrics.rows, self.config.validation)

    def training(self, metrics: Metrics, step: int) -> list[Sample]:
        every = self.config.train_every
        return self._read(metrics.rows, self.config.train if every and step % every == 0 else 0)

    def _read(self, batch: Batch | None, number: int) -> list[Sample]:
        if batch is None or number == 0 or not all(name in batch for name in TEXTS):
            return []
        return samples_of(
            batch.rows(self.choose(batch, number)), self.tokenizer, self.read_responses
        )

    def choose(self, batch: Batch, number: int) -> np.ndarray:
        """Positions of the first rows of `number` prompts (of all if there are fewer), in order."""
        _, first = np.unique(batch.tensor("uid").numpy(), return_index=True)
        first = np.sort(first)
        chosen = np.random.default_rng(self.seed).permutation(len(first))[:number]
        return first[np.sort(chosen)]


def samples_of(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, read_responses: ResponseReader
) -> list[Sample]:
    """Every row of the batch as text, with all its scores.

    The prompt is shown with its special tokens, as the model sees it; the response without its
    end, as a reward function sees it.
    """
    numbers = {name: column for name, column in NUMBERS.items() if column in batch}
    further = {name: column for name, column in FURTHER_NUMBERS.items() if column in batch}
    episodes = [column for column in EPISODES if column in batch]
    here = batch.local((*TEXTS, "uid", *numbers.values(), *further.values(), *episodes))
    scores: list[dict[str, float]] = [{} for _ in range(len(here))]
    for name, column in numbers.items():
        for row, value in zip(scores, here.tensor(column).tolist(), strict=True):
            row[name] = value
    for name, column in further.items():
        for row, values in zip(scores, here.objects(column), strict=True):
            row.update({f"{name}/{key}": float(value) for key, value in values.items()})
    prompts = tokenizer.batch_decode(_rows(here, "prompt_ids"))
    responses = read_responses(_rows(here, "response_ids"))
    reasons = here.objects("finish_reason")
    versions = here.tensor("weight_version").tolist()
    uids = here.tensor("uid").tolist()
    turns: list[list[dict[str, object]]] = [[] for _ in range(len(here))]
    if len(episodes) == len(EPISODES):
        turns = turns_of(here, tokenizer, read_responses)
    samples = []
    for index in range(len(here)):
        samples.append(
            Sample(
                prompt=prompts[index],
                response=responses[index],
                finish_reason=reasons[index],
                weight_version=versions[index],
                uid=uids[index],
                scores=scores[index],
                turns=turns[index],
            )
        )
    return samples


def _rows(batch: Batch, column: str) -> list[list[int]]:
    return [ids.tolist() for ids in batch.ragged(column).unbind()]
