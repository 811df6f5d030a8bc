"""Rows in flight on the engine hf: the same tokens however they are cut into slices, preempted,
joined by others, and what weight updates make of them (docs/generation.md, streaming)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.generation import cases, streams
from tests.generation.streams import PLAIN, all_rows, assert_equals, hf_engine, naive
from workers.generation.config import InFlight
from workers.generation.hf import HfEngine
from workers.generation.padded_batch import FREE_PADDING, of_like_length


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


def test_no_disturbance_changes_a_row(engine: HfEngine, expected: streams.Rows) -> None:
    """F12 tests 9 and 13, trap 39: slices of one and seven steps (bit for bit, because the batches
    are the same), preemption, rows that come, go and are cancelled, generate and score between."""
    rows = streams.disturbed(engine)
    for name, got in rows.items():
        assert_equals(got, expected, tolerance=0 if name.startswith("limit") else 1e-5)
    assert engine.num_unfinished == 0 and engine.run() == 0 and not engine.finished()


def test_generate_between_is_generate_alone(engine: HfEngine) -> None:
    """F12 test 13: validation's own rows, of other settings than those that stream."""
    prompts, seeds = streams.prompts_and_seeds(4, first=50)
    alone, scored = engine.generate(prompts, seeds, PLAIN), engine.score(prompts[1].tolist())
    streams.submit_mixed(engine)
    engine.run(4)
    between = engine.generate(prompts, seeds, PLAIN)
    assert between.response_ids.tolist() == alone.response_ids.tolist()
    np.testing.assert_allclose(between.log_probs, alone.log_probs, rtol=0, atol=1e-5)
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


def test_a_long_prompt_is_answered_as_far_as_its_own_limit_goes(engine: HfEngine) -> None:
    """A later turn of an episode: the model has fewer tokens left than max_response_tokens."""
    prompt, seeds = np.full(90, 7), np.array([3])
    with pytest.raises(ValueError, match="row 0 has 90 tokens, and with max_response_tokens=20"):
        engine.submit([prompt], seeds, PLAIN)
    (key,) = engine.submit([prompt], seeds, PLAIN, np.array([6]))
    assert len(all_rows(engine)[key].token_ids) == 6


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
    """F12 tests 10 and 11: every token's log-prob is that of its version's weights over the whole
    prefix; with keep it is not for the six rows that ran, whose keys and values are the old ones."""
    both = [paths["old"], paths["new"]]
    keys, rows = streams.updated(engine, both, InFlight(in_flight))
    for place, key in enumerate(keys):
        old_tokens = 5 if place < 6 else 0
        assert rows[key].weight_versions.tolist() == [1] * old_tokens + [2] * (12 - old_tokens)
    gaps = streams.gaps(both, [rows[key] for key in keys])
    assert max(gaps[6:]) < 1e-5
    assert max(gaps) < 1e-5 if in_flight == "recompute" else min(gaps[:6]) > 1e-2


def test_drain_refuses_rows_in_flight(engine: HfEngine, paths: dict[str, Path]) -> None:
    prompts, seeds = streams.prompts_and_seeds(2)
    engine.submit(prompts, seeds, PLAIN)
    engine.run(2)
    with pytest.raises(RuntimeError, match="2 rows are in flight at a weight update"):
        engine.weights_written(2, InFlight.drain)
    engine.run()
    engine.weights_written(2, InFlight.drain)
    assert engine.weight_version == 2


def test_sleep_with_rows_in_flight(
    engine: HfEngine, paths: dict[str, Path], expected: streams.Rows
) -> None:
    """Trap 48."""
    assert_equals(streams.slept(engine, paths["old"]), expected)


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


@pytest.mark.parametrize("seed", range(5))
def test_rows_read_together_are_of_like_length(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(3, 1.5, 40).astype(int) + 1
    rows = [streams.growing_row(key, length) for key, length in enumerate(lengths.tolist())]
    cut = of_like_length(rows)
    assert sorted(row.key for batch in cut for row in batch) == list(range(40))
    for batch in cut:
        inside = [len(row.prefix) for row in batch]
        assert max(inside) <= 1.5 * min(inside) + FREE_PADDING
    padded = sum(len(batch) * max(len(row.prefix) for row in batch) for batch in cut)
    assert padded <= 1.5 * lengths.sum() + FREE_PADDING * 40


def test_a_preempted_row_and_new_ones_are_not_padded_to_each_other(engine: HfEngine) -> None:
    streams.submit(engine, prompt_length=60)
    engine.run(1)
    engine.preempt()
    for _ in range(3):
        streams.submit(engine, prompt_length=3)
    read: list[tuple[int, ...]] = []
    engine._model.register_forward_pre_hook(
        lambda _module, _args, arguments: read.append(tuple(arguments["input_ids"].shape)),
        with_kwargs=True,
    )
    engine.run(2)
    assert read == [(3, 3), (1, 61), (4, 1)]
