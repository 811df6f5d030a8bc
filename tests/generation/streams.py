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
from workers.generation.rows import FinishedRow, GrowingRow, StopRule

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


def disturbed(engine: GenerationEngine) -> dict[str, Rows]:
    """The same rows again and again, under every disturbance."""
    result = {}
    for limit in (1, 7):
        submit_mixed(engine)
        assert len(list(sliced(engine, limit))) > 1
        result[f"limit {limit}"] = engine.finished()
    for every in (1, 3):
        submit_mixed(engine)
        for _ in sliced(engine, every):
            engine.preempt()
        result[f"preempted {every}"] = engine.finished()
    keys, others = submit_mixed(engine), []
    for step in sliced(engine, 2):
        if step < 20:
            others += submit_mixed(engine, first=100 + step)
        engine.cancel(others[-3:] + others[:1])
    result["mates"] = engine.finished(keys)
    assert 0 < len(engine.finished()) < len(others)
    prompts, seeds = prompts_and_seeds(4, first=50)
    keys = submit_mixed(engine)
    engine.run(4)
    before = set(engine.finished_keys)
    engine.generate(prompts, seeds, PLAIN)
    engine.score(prompts[1].tolist())
    assert before and before <= set(engine.finished_keys)
    result["generate and score"] = all_rows(engine)
    assert sorted(result["generate and score"]) == keys
    return result


def updated(
    engine: GenerationEngine, paths: Sequence[Path], in_flight: InFlight, count: int = 8
) -> tuple[list[int], Rows]:
    """Rows of which as many as may run have five tokens when the weights of paths[0] are replaced
    by those of paths[1], versions 1 and 2; then rows with the same prompts."""
    update(engine, paths[0], 1)
    prompts, seeds = prompts_and_seeds(count)
    sampling = replace(PLAIN, max_response_tokens=12)
    keys = engine.submit(prompts, seeds, sampling)
    engine.run(5)
    update(engine, paths[1], 2, in_flight)
    keys += engine.submit(prompts, seeds, sampling)
    return keys, all_rows(engine)


def slept(engine: GenerationEngine, path: Path) -> Rows:
    """The mixed rows, with a sleep after three steps."""
    submit_mixed(engine)
    engine.run(3)
    engine.sleep()
    engine.wake()
    update(engine, path, 1)
    return all_rows(engine)


@torch.no_grad()
def gaps(paths: Sequence[Path], rows: Sequence[FinishedRow]) -> list[float]:
    """The largest difference of each row's log-probs from those of the weights that drew its tokens
    (of version 1 in paths[0], 2 in paths[1]) over the whole prefix, by transformers."""
    models = [Qwen2ForCausalLM.from_pretrained(path) for path in paths]
    prompts, _ = prompts_and_seeds(len(rows) // 2)
    result = []
    for prompt, row in zip(2 * prompts, rows, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, row.token_ids]))
        scores = []
        for model in models:
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            scores.append(logits.gather(-1, ids[len(prompt) :, None])[:, 0].numpy())
        expected = np.where(row.weight_versions == 1, *scores)
        result.append(float(np.abs(expected - row.log_probs).max()))
    return result


def growing_row(key: int, prompt_length: int) -> GrowingRow:
    """A row of the engine hf that has not begun."""
    prompt, stop = np.zeros(prompt_length, dtype=np.int64), StopRule([], PLAIN, None)
    return GrowingRow(key, prompt, key, 0, PLAIN, stop, PLAIN.max_response_tokens)


def submit(engine: GenerationEngine, prompt_length: int) -> None:
    """One row of this length."""
    engine.submit([np.full(prompt_length, 5)], np.array([7]), PLAIN)
