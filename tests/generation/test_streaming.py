"""Rows in flight on the engine hf: the same tokens however they are cut into slices, preempted,
joined by others, and what weight updates make of them (docs/generation.md, streaming)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.generation import cases, streams
from tests.generation.streams import PLAIN, all_rows, assert_equals, hf_engine, naive, sliced
from workers.generation.config import InFlight
from workers.generation.hf import HfEngine


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("old", "new")):
        cases.make_model(root / name, tied=True, seed=seed)
    return {name: root / name for name in ("old", "new")}


@pytest.fixture
def engine(paths: dict[str, Path]) -> HfEngine:
    engine = hf_engine(paths["old"])
    engine.weight_version = 1
    return engine


@pytest.fixture
def expected(engine: HfEngine) -> streams.Rows:
    """The undisturbed run: all rows at once, to the end."""
    streams.submit_mixed(engine)
    return all_rows(engine)


def test_rows_of_several_settings_are_those_of_transformers(
    engine: HfEngine, paths: dict[str, Path]
) -> None:
    """Every row alone, without a cache, by the same draws."""
    keys, rows = streams.submit_mixed(engine), all_rows(engine)
    model = Qwen2ForCausalLM.from_pretrained(paths["old"])
    prompts, seeds = streams.prompts_and_seeds()
    order = [row for place in range(4) for row in range(place, 10, 4)]
    for key, row in zip(keys, order, strict=True):
        got = rows[key]
        sampling = streams.MIXED[row % 4]
        ids, log_probs = naive([model], prompts[row], int(seeds[row]), sampling, len(got.token_ids))
        assert got.token_ids.tolist() == ids
        np.testing.assert_allclose(got.log_probs, log_probs, rtol=0, atol=1e-5)
        assert got.weight_versions.tolist() == [1] * len(ids)
        if got.finish_reason == "length":
            assert len(ids) == streams.limits()[row]
        else:
            assert ids[-1] in sampling.stop_token_ids


@pytest.mark.parametrize("limit", [1, 7])
def test_slices_change_nothing(engine: HfEngine, expected: streams.Rows, limit: int) -> None:
    """F12 test 9: bit for bit, because the batches are the same."""
    streams.submit_mixed(engine)
    assert len(list(sliced(engine, limit))) > 1
    assert engine.num_unfinished == 0 and engine.run() == 0
    assert_equals(engine.finished(), expected, tolerance=0)


@pytest.mark.parametrize("every", [1, 3])
def test_preemption_changes_nothing(engine: HfEngine, expected: streams.Rows, every: int) -> None:
    """F12 test 9."""
    streams.submit_mixed(engine)
    for _ in sliced(engine, every):
        engine.preempt()
    assert_equals(engine.finished(), expected)


def test_batch_mates_change_nothing(engine: HfEngine, expected: streams.Rows) -> None:
    """F12 test 9: others come and go while the rows run, and some are cancelled half-way."""
    keys = streams.submit_mixed(engine)
    others: list[int] = []
    for step in sliced(engine, 2):
        if step < 20:
            others += streams.submit_mixed(engine, first=100 + step)
        engine.cancel(others[-3:] + others[:1])
    rows = engine.finished(keys)
    assert_equals(rows, expected)
    assert 0 < len(engine.finished()) < len(others)
    assert not engine.finished()


def test_generate_and_score_leave_the_stream_alone(
    engine: HfEngine, expected: streams.Rows
) -> None:
    """F12 test 13, trap 39: validation and the probe of a sync do not drain what streams, nor take
    its finished rows."""
    prompts, seeds = streams.prompts_and_seeds(4, first=50)
    alone = engine.generate(prompts, seeds, PLAIN)
    keys = streams.submit_mixed(engine)
    engine.run(4)
    waiting = engine.finished_keys
    before = set(waiting)
    assert before
    between = engine.generate(prompts, seeds, replace(PLAIN, max_response_tokens=2))
    scored = engine.score(prompts[1].tolist())
    assert before <= set(waiting) and engine.num_unfinished
    assert between.lengths.tolist() == [2] * 4
    first_two = [row[:2] for row in np.split(alone.response_ids, np.cumsum(alone.lengths)[:-1])]
    assert between.response_ids.tolist() == np.concatenate(first_two).tolist()
    engine.run()
    assert_equals(engine.finished(keys), expected)
    np.testing.assert_array_equal(scored, engine.score(prompts[1].tolist()))


def test_an_error_in_generate_leaves_nothing_behind(engine: HfEngine) -> None:
    prompts, seeds = streams.prompts_and_seeds(3)
    with pytest.raises(ValueError, match="row 2 has token id 999"):
        engine.generate([*prompts[:2], np.array([999])], seeds, PLAIN)
    with pytest.raises(ValueError, match="positions: -1 in row 1"):
        engine.submit(prompts, seeds, PLAIN, positions=np.array([0, -1, 2]))
    with pytest.raises(ValueError, match="positions: 1 for 3 prompts"):
        engine.submit(prompts, seeds, PLAIN, positions=np.array([0]))
    assert engine.num_unfinished == 0


def test_a_resubmitted_prefix_goes_on_with_the_same_draws(
    engine: HfEngine, expected: streams.Rows
) -> None:
    """Trap 47: with positions a prefix that comes back as a prompt continues the row; without them
    it would draw the first turn's noise again."""
    prompts, seeds = streams.prompts_and_seeds(1)
    whole = engine.generate(prompts, seeds, PLAIN).response_ids
    prefix = [np.concatenate([prompts[0], whole[:8]])]
    for positions, same in ((np.array([8]), True), (None, False)):
        (key,) = engine.submit(prefix, seeds, PLAIN, np.array([12]), positions)
        rest = all_rows(engine)[key].token_ids
        assert (rest.tolist() == whole[8:].tolist()) is same


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_the_next_tokens_after_an_update(
    engine: HfEngine, paths: dict[str, Path], in_flight: str
) -> None:
    """F12 tests 10 and 11: with recompute every token's log-prob is that of its version's weights
    over the whole prefix; with keep it is not, for rows that ran, and the versions say which."""
    prompts, seeds = streams.prompts_and_seeds(5)
    sampling = replace(PLAIN, max_response_tokens=12)
    keys = engine.submit(prompts[:4], seeds[:4], sampling)
    engine.run(5)
    streams.update(engine, paths["new"], 2, InFlight(in_flight))
    keys += engine.submit(prompts[4:], seeds[4:], sampling)
    rows = all_rows(engine)
    old, new = (Qwen2ForCausalLM.from_pretrained(paths[name]) for name in ("old", "new"))
    gaps = []
    for place, key in enumerate(keys):
        models, versions = [old] * 5 + [new], [1] * 5 + [2] * 7
        if place == 4:
            models, versions = [new], [2] * 12
        got, seed = rows[key], int(seeds[place])
        assert got.weight_versions.tolist() == versions
        if in_flight == "recompute":
            assert got.token_ids.tolist() == naive(models, prompts[place], seed, sampling, 12)[0]
        scores = score_each(models, prompts[place], got.token_ids)
        gaps.append(np.abs(got.log_probs - scores).max())
    assert gaps[4] < 1e-5
    assert max(gaps) < 1e-5 if in_flight == "recompute" else min(gaps[:4]) > 1e-2


@torch.no_grad()
def score_each(
    models: list[Qwen2ForCausalLM], prompt: np.ndarray, response: np.ndarray
) -> list[float]:
    """The log-prob of each token by its own model over the whole prefix."""
    ids, scores = torch.tensor([[*prompt, *response]]), []
    for index, token in enumerate(response):
        model = models[min(index, len(models) - 1)]
        logits = model(ids[:, : len(prompt) + index]).logits[0, -1]
        scores.append(float(logits.log_softmax(dim=-1)[token]))
    return scores


def test_drain_refuses_rows_in_flight(engine: HfEngine, paths: dict[str, Path]) -> None:
    prompts, seeds = streams.prompts_and_seeds(2)
    engine.submit(prompts, seeds, PLAIN)
    engine.run(2)
    with pytest.raises(RuntimeError, match="2 rows are in flight at a weight update"):
        engine.weights_written(2, InFlight.drain)
    engine.run()
    engine.weights_written(2, InFlight.drain)
    assert engine.weight_version == 2


def test_sleep_with_rows_in_flight(engine: HfEngine, expected: streams.Rows) -> None:
    """Trap 48."""
    streams.submit_mixed(engine)
    engine.run(3)
    engine.sleep()
    engine.wake()
    assert_equals(all_rows(engine), expected)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ],
    ids=["full", "windows", "both"],
)
def test_rows_join_and_leave_a_batch_in_every_kind_of_cache(
    tmp_path: Path, change: dict[str, object]
) -> None:
    """Keys and values of windows are cut and padded with those of whole rows."""
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=cases.VOCAB,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.2,
            **change,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    cases.save_tokenizer(tmp_path)
    engine = hf_engine(tmp_path)
    prompts, seeds = streams.prompts_and_seeds(8)
    keys = []
    for row in range(8):
        part = slice(row, row + 1)
        keys += engine.submit(prompts[part], seeds[part], PLAIN, streams.limits(8)[part])
        engine.run(1 + row % 3)
    rows = all_rows(engine)
    for row, key in enumerate(keys):
        expected = naive([model], prompts[row], int(seeds[row]), PLAIN, streams.limits(8)[row])
        assert rows[key].token_ids.tolist() == expected[0]
        np.testing.assert_allclose(rows[key].log_probs, expected[1], rtol=0, atol=1e-5)


def test_a_finished_row_leaves_nothing_in_the_engine(engine: HfEngine) -> None:
    """The batch shrinks as its rows end, and is gone with the last one."""
    prompts, seeds = streams.prompts_and_seeds(6)
    engine.submit(prompts, seeds, PLAIN, np.array([1, 20, 2, 3, 2, 1]))
    engine.run(5)
    (batch,) = engine._batches
    assert [row.key for row in batch.rows] == [1]
    assert batch._cache.get_seq_length() == len(prompts[1]) + 4
    engine.run()
    assert not engine._batches and not engine._waiting
