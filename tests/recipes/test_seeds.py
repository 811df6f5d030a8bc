"""Everything random follows a seed: equal seeds give equal draws, other seeds give others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from controllers.covariance import select_for_clip_cov
from hybridflow import open_session
from hybridflow.layout import Layout
from recipes.python_settings import make_settings
from tests.tiny import by_length, tiny_grpo
from workers.judge import _seeds
from workers.losses.aggregation import Aggregation
from workers.mini_batches import MiniBatches
from workers.sequences import Sequences


def test_the_runs_seed_reaches_the_judge_and_can_be_set_apart() -> None:
    needed = {"model.path": "m", "data.train": "d", "judge.model.path": "j"}
    assert make_settings("generative_reward", {**needed, "seed": 5}).judge.seed == 5
    apart = make_settings("generative_reward", {**needed, "seed": 5, "judge.seed": 7})
    assert (apart.judge.seed, apart.actor.seed) == (7, 5)


def test_a_judges_draw_follows_its_seed_and_the_question_alone() -> None:
    questions = [np.array([5, 6, 7]), np.array([5, 6]), np.array([5, 6, 7])]
    first = _seeds(questions, 3)
    assert first[0] == first[2] != first[1]
    assert np.array_equal(_seeds(questions[::-1], 3), first[::-1])
    assert not np.isin(_seeds(questions, 4), first).any()
    assert (first >= 0).all(), "engines take seeds from 0 on"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A world of one, or the one that a pool of this process has left."""
    makes_world = not torch.distributed.is_initialized()
    if makes_world:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
        )
    yield
    if makes_world:
        torch.distributed.destroy_process_group()


def order_of_labels(seed: int, num_epochs: int, num_labels: int = 6) -> list[list[int]]:
    """The mini-batch of every step of each epoch; each has one row, whose tokens are its label."""
    labels = torch.arange(num_labels)
    sequences = Sequences(
        token_ids=labels.repeat_interleave(2),
        lengths=torch.full((num_labels,), 2),
        scored_lengths=torch.ones(num_labels, dtype=torch.int64),
    )
    mini_batches = MiniBatches(sequences, labels, Layout.of(), "cpu")
    steps = mini_batches.steps(num_epochs, seed, Aggregation.token_mean)
    seen = [int(rows.token_ids[0]) for rows in steps]
    return [seen[start : start + num_labels] for start in range(0, len(seen), num_labels)]


@pytest.mark.usefixtures("one_process")
def test_later_passes_take_the_mini_batches_in_an_order_of_the_seed() -> None:
    first, second, third = order_of_labels(seed=1, num_epochs=3)
    assert first == [0, 1, 2, 3, 4, 5], "the first pass is in order"
    assert sorted(second) == sorted(third) == first
    assert second != third
    assert order_of_labels(seed=1, num_epochs=3) == [first, second, third]
    others = [order_of_labels(seed, num_epochs=2) for seed in (2, 3, 4)]
    assert all(other[0] == first for other in others)
    assert len({tuple(second), *(tuple(other[1]) for other in others)}) > 1


def test_clip_cov_draws_among_the_candidates_by_its_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(400, generator=generator)
    log_probs = torch.randn(400, generator=generator)
    covariance = (log_probs - log_probs.mean()) * (advantages - advantages.mean())
    candidates = (covariance > 0.5) & (covariance < 2.0)

    def draw(seed: int) -> torch.Tensor:
        return select_for_clip_cov(
            advantages, log_probs, fraction=0.05, low=0.5, high=2.0, seed=seed
        )

    selected = draw(1)
    assert int(selected.sum()) == 20 < int(candidates.sum())
    assert not (selected & ~candidates).any()
    assert torch.equal(selected, draw(1))
    assert not torch.equal(selected, draw(2))
    drawn = torch.stack([draw(seed) for seed in range(200)]).double().mean(dim=0)
    expected = 20 / int(candidates.sum())
    assert drawn[candidates].max() < expected + 0.2, "every candidate is drawn about as often"
    assert drawn[candidates].min() > max(0.0, expected - 0.2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return tiny_grpo(tmp_path_factory.mktemp("seeds"))


def weights_after(settings: dict[str, object], output: Path) -> dict[str, torch.Tensor]:
    """The weights after two steps of two mini-batches and two epochs."""
    passes = {"algorithm.num_mini_batches": 4, "actor.num_epochs": 2}
    with open_session(
        "grpo", {**settings, **passes, "output_dir": output}, reward=by_length
    ) as session:
        session.step()
        session.save(output / "saved")
    return load_file(output / "saved" / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_equal_seeds_give_equal_weights_and_dropout_is_off(
    tiny: dict[str, object], tmp_path: Path
) -> None:
    """A model with dropout trains as the same one without: models stay in eval mode
    (docs/training.md). Samples and the order of later passes are the seed's."""
    first = weights_after({**tiny, "seed": 1}, tmp_path / "first")
    assert equal(first, weights_after({**tiny, "seed": 1}, tmp_path / "again"))
    assert not equal(first, weights_after({**tiny, "seed": 2}, tmp_path / "other"))
    path = tmp_path / "model"
    path.mkdir()
    for file in Path(str(tiny["model.path"])).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    dropped = weights_after({**tiny, "seed": 1, "model.path": path}, tmp_path / "dropped")
    assert equal(first, dropped)


def all_alike(*, response: str, **columns: object) -> float:
    return 1.0


def test_dapo_ends_when_every_row_was_used(tiny: dict[str, object], tmp_path: Path) -> None:
    """No prompt has a signal, so that a step asks for further rows: of the 8 rows the first step
    takes 4 and refills 4, and the epoch is over."""
    settings = {
        **tiny,
        "output_dir": tmp_path,
        "algorithm.max_rounds": 2,
        "loop.num_epochs": 1,
    }
    with open_session("dapo", settings, reward=all_alike) as session:
        numbers = session.step()
        assert numbers["dynamic_sampling/rounds"] == 2
        assert numbers["dynamic_sampling/prompts_filtered"] == 8
        assert numbers["dynamic_sampling/prompts_kept"] == 0
        with pytest.raises(ValueError, match=r"loop\.num_epochs=1: every row was used"):
            session.step()
