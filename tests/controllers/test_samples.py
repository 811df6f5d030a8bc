"""Samples: which rows of a batch are read, what stands in them, and that every algorithm that
generates has some."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from controllers import ALGORITHMS
from controllers.samples import TEXTS, SampleReader
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.metrics import SamplesConfig
from hybridflow.results import Metrics
from tests.controllers.fakes import prompts
from tests.controllers.test_algorithms import KNOWN, LEARNABLE, made
from tests.tiny import EOS, make_model

NUM_PROMPTS, SAMPLES_PER_PROMPT = 6, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("samples") / "model"))


def answered() -> Batch:
    """Row r: prompt [10 + r], response [50 + r, EOS], reward r / 10, right where r is even."""
    rows = list(range(NUM_PROMPTS * SAMPLES_PER_PROMPT))
    return Batch.of(
        prompt_ids=Ragged.of([[10 + row] for row in rows]),
        response_ids=Ragged.of([[50 + row, EOS] for row in rows]),
        uid=torch.tensor([100 - row // SAMPLES_PER_PROMPT for row in rows]),
        finish_reason=["stop"] * len(rows),
        weight_version=torch.full((len(rows),), 3),
        rewards=torch.tensor(rows) / 10,
        reward_metrics=[{"right": row % 2 == 0} for row in rows],
        costs=torch.tensor(rows) / 100,
        cost_metrics=[{} for _ in rows],
    )


def test_samples_are_the_first_responses_of_different_prompts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    read = SampleReader(SamplesConfig(validation=4), tokenizer, seed=5)
    samples = read.validation(Metrics(rows=answered()))
    assert samples == read.validation(Metrics(rows=answered())), "the same seed, the same prompts"
    assert len({sample.uid for sample in samples}) == 4
    for sample in samples:
        row = (100 - sample.uid) * SAMPLES_PER_PROMPT
        assert (sample.prompt, sample.response) == (str(10 + row), str(50 + row))
        assert (sample.finish_reason, sample.weight_version) == ("stop", 3)
        assert sample.scores == {
            "reward": pytest.approx(row / 10),
            "reward/right": 1.0,
            "cost": pytest.approx(row / 100),
        }
    others = SampleReader(SamplesConfig(validation=4), tokenizer, seed=6).validation(
        Metrics(rows=answered())
    )
    assert [sample.uid for sample in samples] != [sample.uid for sample in others]


def test_few_prompts_are_all_shown_and_training_shows_every_nth_step(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    metrics = Metrics(rows=answered())
    read = SampleReader(SamplesConfig(validation=99, train=2, train_every=3), tokenizer, seed=0)
    assert [sample.uid for sample in read.validation(metrics)] == [100, 99, 98, 97, 96, 95]
    assert [len(read.training(metrics, step)) for step in (1, 2, 3, 4, 5, 6)] == [0, 0, 2, 0, 0, 2]
    never = SampleReader(SamplesConfig(validation=0, train_every=0), tokenizer, seed=0)
    assert never.validation(metrics) == never.training(metrics, 3) == []


def test_numbers_without_responses_have_no_samples(tokenizer: PreTrainedTokenizerBase) -> None:
    read = SampleReader(SamplesConfig(train_every=1), tokenizer, seed=0)
    demonstrations = answered().select("prompt_ids", "response_ids", "uid")
    assert read.training(Metrics({"loss": 1.0}), 1) == []
    assert read.training(Metrics(rows=demonstrations), 1) == []


@pytest.mark.parametrize("name", KNOWN)
def test_every_algorithm_that_answers_prompts_has_samples(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    algorithm, log = made(name, LEARNABLE)
    metrics = algorithm.step(prompts([7, 7, 9, 9]))
    assert metrics.rows is not None and set(TEXTS) <= set(metrics.rows.columns)
    (first, *_) = metrics.rows.ragged("response_ids").unbind()
    generated = log.names.count("actor.generate_sequences")
    samples = SampleReader(SamplesConfig(train=9, train_every=1), tokenizer, seed=0).training(
        metrics, 1
    )
    assert [sample.uid for sample in samples] == [7, 9] and generated >= 1
    assert samples[0].response == tokenizer.decode(first, skip_special_tokens=True)
    scored = {"reward", "judge"} & set(ALGORITHMS[name].roles)
    assert ("reward" in samples[0].scores) == bool(scored)
    assert ("cost" in samples[0].scores) == ("cost" in ALGORITHMS[name].roles)
