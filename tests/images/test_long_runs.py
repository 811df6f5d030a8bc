"""Runs with images that stop and go on, draw ahead, or train an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hybridflow import open_session
from recipes.preparation import prepare
from recipes.python_api import make_settings
from recipes.session import Session
from tests.asynchrony.runs import TRUNCATE, StreamingSession
from tests.images.rewards import by_length
from tests.images.runs import settings
from tests.images.tiny import make_data

PIECES = {"loop.num_steps": 3, "loop.checkpoint_every": 2, "loop.keep_last": 2}
TOWER = r"model\.visual\.blocks\.\d+\.attn\..*"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = settings(tmp_path_factory.mktemp("long"))
    return given | {"metrics.console": False, "data.batch_size": 4}


def run(given: dict[str, Any], output: Path) -> dict[str, Tensor]:
    """The weights after the third step."""
    with open_session("grpo", given | {"output_dir": output}, reward=by_length) as session:
        session.run()
    return load_file(weights_of(output))


def weights_of(output: Path) -> Path:
    (found,) = (output / "checkpoints" / "step-00000003").rglob("model.safetensors")
    return found


def cut(output: Path, into: Path) -> Path:
    """The run as it was after the second step."""
    shutil.copytree(output, into)
    shutil.rmtree(into / "checkpoints" / "step-00000003")
    return into


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["trained", "frozen"])
def test_a_resumed_run_is_the_undisturbed_one(
    tiny: dict[str, Any], tmp_path: Path, vision: str
) -> None:
    given = tiny | PIECES | {"actor.train.vision": vision}
    whole = run(given, tmp_path / "whole")
    resumed = run(given, cut(tmp_path / "whole", tmp_path / "cut"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_on_another_number_of_ranks(
    ray_cluster: None, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint of one process is read by two ranks, and the third step is the same."""
    given = tiny | PIECES | {"data.train": make_data(tmp_path / "few.jsonl", rows=4)}
    # The bias of keys has no gradient but rounding, which a small epsilon would make steps of.
    given |= {"actor.train.optimizer.epsilon": 1e-3}
    whole = run(given, tmp_path / "whole")
    two = {"runtime": "ray", "num_devices": 2, "cluster.address": "local"}
    resumed = run(given | two, cut(tmp_path / "whole", tmp_path / "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0.0, atol=2e-5, msg=name)


def streamed(given: dict[str, Any], output: Path, session_class: type[Session]) -> list[Any]:
    settings = make_settings("grpo", given | {"output_dir": output}, reward=by_length)
    with session_class(prepare(settings)) as session:
        return [session.step() for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_responses_drawn_ahead(tiny: dict[str, Any], tmp_path: Path, engine: str) -> None:
    """Slices of rows that come and go draw what whole calls draw, and rows in flight read their images
    again after a weight sync, with the tower of that moment."""
    given = tiny | {"actor.generation.engine": engine, "asynchrony.slice_steps": 2}
    plain = streamed(given, tmp_path / "plain", Session)
    sliced = streamed(given, tmp_path / "sliced", StreamingSession)
    for one, other in zip(plain, sliced, strict=True):
        for name in ("reward/mean", "actor/loss", "actor/grad_norm"):
            assert other[name] == pytest.approx(one[name], abs=1e-6), name
        assert other["actor/log_prob_gap_max"] < 1e-5
    ahead = streamed(given | TRUNCATE | {"asynchrony.staleness": 1}, tmp_path / "ahead", Session)
    assert max(step["staleness/max"] for step in ahead) == 1.0
    assert ahead[0]["actor/log_prob_gap_max"] < 1e-5
    assert ahead[2]["actor/grad_norm"] > 0


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("targets", ["all-linear", pytest.param(TOWER, marks=pytest.mark.slow)])
def test_adapters(tiny: dict[str, Any], tmp_path: Path, targets: str, engine: str) -> None:
    """On the decoder's layers, and on the tower's where an expression names them; all else stays as it
    was, and the generator has what is trained after every sync."""
    changes = {
        "actor.train.lora.rank": 4,
        "actor.train.lora.target_modules": targets,
        "actor.generation.engine": engine,
        "output_dir": tmp_path / "out",
    }
    with open_session("grpo", tiny | changes, reward=by_length) as session:
        for _ in range(3):
            metrics = session.step()
            assert metrics["actor/log_prob_gap_max"] < 1e-5
            assert metrics["actor/grad_norm"] > 0
        session.save(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    in_tower = {"visual" in name for name in names}
    assert in_tower == {targets == TOWER}
