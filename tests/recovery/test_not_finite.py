"""on_nonfinite: what becomes of a step whose gradient overflows, over real engines in one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from controllers.ledger import LEDGER, read_ledger
from controllers.not_finite import BadSteps, StepGivenUp, is_spike
from hybridflow import open_session, run
from hybridflow.errors import NotFiniteError
from hybridflow.failures import EVENTS
from tests.tiny import tiny_grpo
from workers.config import OnNonfinite, OptimizerConfig
from workers.not_finite import NotFinite


def overflows(*, response: str, answer: str, **columns: object) -> float:
    """Of the sixth prompt, too large for the square of its gradient."""
    reward = float(crc32(response.encode()) % 7)
    return reward * 1e37 if answer == "5" else reward


def always_overflows(*, response: str, **columns: object) -> float:
    return crc32(response.encode()) % 7 * 1e37


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    """Four steps of two of eight prompts, in order; under `overflows` it is the third one."""
    directory = tmp_path_factory.mktemp("inputs")
    inputs = tiny_grpo(directory)

    def make(output: Path, **more: object) -> dict[str, object]:
        return inputs | {
            "output_dir": output,
            "data.batch_size": 2,
            "data.shuffle": False,
            "algorithm.samples_per_prompt": 4,
            "loop.num_epochs": 1,
            **more,
        }

    return make


def final_weights(directory: Path) -> dict[str, Tensor]:
    checkpoints = directory / "checkpoints"
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    return load_file(latest / "huggingface" / "model.safetensors")


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., dict[str, object]]
) -> dict[str, Tensor]:
    """Weights after the steps on the other six prompts, taken by hand."""
    directory = tmp_path_factory.mktemp("by-hand")
    with open_session("rloo", settings(directory), reward=overflows) as session:
        session.step()
        session.step()
        next(session.prompts)
        session.step()
        session.save(directory / "expected")
    return load_file(directory / "expected" / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_the_weights_are_those_without_the_step(
    policy: str,
    tmp_path: Path,
    settings: Callable[..., dict[str, object]],
    expected: dict[str, Tensor],
) -> None:
    """FAULTS C10: skip leaves out the optimizer step; rewind goes back to the snapshot and passes
    over the rows, which the ledger says. The rows are saved with their tokens."""
    output = tmp_path / policy
    more = {"actor.train.optimizer.on_nonfinite": policy}
    outcome = run("rloo", settings(output, **more), reward=overflows)
    assert same(final_weights(output), expected)
    ledger = read_ledger(output / LEDGER)
    assert outcome.num_steps == (4 if policy == "skip" else 3) == ledger[-1]["step"]
    bad = output / "bad" / "step-00000003"
    rows = list(map(json.loads, (bad / "rows.jsonl").read_text().splitlines()))
    assert [row["uid"] for row in rows] == [4] * 4 + [5] * 4
    columns = load_file(bad / "columns.safetensors")
    assert len(columns["response_ids"]) == int(columns["response_ids.lengths"].sum())
    counts = [line["rows"].get("passed_over", {}).get("count", 0) for line in ledger]
    assert sum(counts) == (0 if policy == "skip" else 2)
    named = [json.loads(line)["event"] for line in (output / EVENTS).read_text().splitlines()]
    assert named == (["started"] if policy == "skip" else ["started", "not_finite", "rewound"])


def overflows_late(*, response: str, answer: str, **columns: object) -> float:
    """Of the last four of eight prompts."""
    reward = float(crc32(response.encode()) % 7)
    return reward * 1e37 if int(answer) >= 4 else reward


def test_steps_that_follow_each_other_are_all_passed_over(
    tmp_path: Path, settings: Callable[..., dict[str, object]]
) -> None:
    """The run goes back twice to step 2, and ends there: the two steps behind it are left out."""
    shorter = settings(tmp_path / "shorter") | {"loop.num_epochs": None, "loop.num_steps": 2}
    run("rloo", shorter, reward=overflows_late)
    more = {"actor.train.optimizer.on_nonfinite": "rewind"}
    outcome = run("rloo", settings(tmp_path / "whole", **more), reward=overflows_late)
    assert outcome.num_steps == 2
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "shorter"))


def test_stop_ends_the_run_and_saves_the_prompts(
    tmp_path: Path, settings: Callable[..., dict[str, object]]
) -> None:
    with pytest.raises(NotFiniteError, match=r"grad_norm is .*mini-batch 0, on_nonfinite=stop"):
        run("rloo", settings(tmp_path), reward=always_overflows)
    rows = (tmp_path / "bad" / "step-00000001" / "rows.jsonl").read_text()
    assert {json.loads(row)["uid"] for row in rows.splitlines()} == {0, 1}


def test_a_session_does_not_go_back(
    tmp_path: Path, settings: Callable[..., dict[str, object]]
) -> None:
    more = {"actor.train.optimizer.on_nonfinite": "rewind"}
    with open_session("rloo", settings(tmp_path, **more), reward=always_overflows) as session:
        with pytest.raises(StepGivenUp, match="step 1: the gradient of actor is not finite"):
            session.step()
        assert session.num_steps == 0


def test_steps_in_a_row_are_counted() -> None:
    config = OptimizerConfig(on_nonfinite=OnNonfinite.skip, max_nonfinite=2)
    not_finite, error = NotFinite(config), NotFiniteError("grad_norm is inf")
    for _ in range(3):
        not_finite.left_out(error, 0)
        assert not_finite.left_out(error, 1)["not_finite/mini_batch_1"] == 1.0
        not_finite.succeeded()
    not_finite.left_out(error, 0)
    not_finite.left_out(error, 0)
    with pytest.raises(NotFiniteError, match=r"3 steps in a row, and optimizer.max_nonfinite is 2"):
        not_finite.left_out(error, 0)


def test_a_loss_that_is_zero_by_nature_does_not_jump(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GRPO with one mini-batch: 0 where the rewards of every group are equal, else rounding or noise
    around 0. Its norm is 0 at the same steps."""
    generator = torch.Generator().manual_seed(0)
    noise = (0.01 * torch.randn(200, generator=generator)).tolist()
    bad = BadSteps(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate(noise, 1):
            loss = (0.0, 3e-8, value, 0.0, value / 5)[step % 5]
            bad.watch(step, {"actor/loss": loss, "actor/grad_norm": 50 * abs(loss)})
        assert not caplog.records
        bad.watch(201, {"actor/loss": 1.0})
    assert len(caplog.records) == 1


def test_a_loss_that_jumps_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty steps are needed; a replayed step replaces the lost one's value."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(30, generator=generator).tolist()
    assert not is_spike(noise[:19], 1e6) and is_spike(noise, 20.0) and not is_spike(noise, 3.0)
    bad = BadSteps(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step, value in enumerate(noise, 1):
            bad.watch(step, {"actor/loss": value, "reward/mean": 1e9 * value})
        assert not caplog.records
        bad.watch(31, {"actor/loss": 50.0})
        bad.watch(31, {"actor/loss": 50.0})
    assert [record.getMessage().partition(" jumps")[0] for record in caplog.records] == [
        "step 31: actor/loss",
        "step 31: actor/loss",
    ]
