"""Rows in flight, for the tests of every engine: one tiny model, prompts, and transformers row by row
as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from hybridflow.context import RankContext
from tests.generation import cases
from workers.config import ModelConfig
from workers.generation.base import GenerationEngine
from workers.generation.config import InFlight, SamplingConfig
from workers.generation.draws import sample_tokens
from workers.generation.hf import HfEngine
from workers.generation.rows import FinishedRow

PLAIN = replace(cases.PLAIN, max_response_tokens=20, ignore_eos=True)
CONFIG = replace(cases.CONFIG, max_num_seqs=6)
MIXED = (
    PLAIN,
    replace(PLAIN, temperature=0.6, top_p=0.8, top_k=40),
    replace(PLAIN, greedy=True),
    replace(PLAIN, stop_token_ids=list(range(100, 200))),
)
Rows = dict[int, FinishedRow]


def hf_engine(path: Path) -> HfEngine:
    context = RankContext(rank=0, world_size=1, local_rank=0)
    return HfEngine(model=ModelConfig(path=str(path)), config=CONFIG, context=context)


def prompts_and_seeds(count: int = 10, first: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts of 1 to 45 tokens: some share a beginning that fills a block of the cache."""
    generator = np.random.default_rng(3)
    common = generator.integers(2, cases.VOCAB, 40)
    prompts = []
    for row in range(count):
        own = generator.integers(2, cases.VOCAB, 1 + row % 5)
        prompts.append(np.concatenate([common, own]) if row % 2 else own)
    return prompts, np.arange(first, first + count, dtype=np.int64) * 977


def limits(count: int = 10) -> np.ndarray:
    """A long tail: most responses are short."""
    return np.array([3 + row * row % 17 for row in range(count)])


def all_rows(engine: GenerationEngine) -> Rows:
    """Every row, when nothing is unfinished."""
    engine.run()
    return engine.finished()


def sliced(engine: GenerationEngine, limit: int) -> Iterator[int]:
    """Runs the engine dry in slices; yields the number of steps so far after each."""
    steps = 0
    while ran := engine.run(limit):
        steps += ran
        yield steps


@torch.no_grad()
def naive(
    models: Sequence[Qwen2ForCausalLM],
    prompt: np.ndarray,
    seed: int,
    sampling: SamplingConfig,
    num_tokens: int,
    position: int = 0,
) -> tuple[list[int], list[float]]:
    """Ids and log-probs of a response whose token i is drawn by models[i] (the last one from there
    on), each over the whole prefix, without a cache."""
    ids, log_probs = prompt.tolist(), []
    for index in range(num_tokens):
        model = models[min(index, len(models) - 1)]
        logits = model(torch.tensor([ids])).logits[:, -1]
        place = torch.tensor([position + index])
        token, log_prob = sample_tokens(logits, torch.tensor([seed]), place, sampling)
        ids.append(int(token))
        log_probs.append(float(log_prob))
    return ids[len(prompt) :], log_probs


def assert_same(got: FinishedRow, expected: FinishedRow, tolerance: float = 1e-5) -> None:
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    assert got.finish_reason == expected.finish_reason
    assert got.weight_versions.tolist() == expected.weight_versions.tolist()
    np.testing.assert_allclose(got.log_probs, expected.log_probs, rtol=0, atol=tolerance)


def assert_equals(got: Rows, expected: Rows, tolerance: float = 1e-5) -> None:
    """The same rows in the order of their keys, whatever the keys are."""
    assert len(got) == len(expected)
    for one, other in zip(sorted(got), sorted(expected), strict=True):
        assert_same(got[one], expected[other], tolerance)


def submit_mixed(engine: GenerationEngine, first: int = 0) -> list[int]:
    """Ten rows of four settings."""
    prompts, seeds = prompts_and_seeds(first=first)
    keys = []
    for place, sampling in enumerate(MIXED):
        part = slice(place, None, len(MIXED))
        keys += engine.submit(prompts[part], seeds[part], sampling, limits()[part])
    return keys


def update(
    engine: GenerationEngine, path: Path, version: int, in_flight: InFlight = InFlight.recompute
) -> None:
    engine.load_weights(cases.weights(path), version=version, in_flight=in_flight)
