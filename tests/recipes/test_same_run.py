"""B81, B82: a run goes on with the checkpoint of the same run only, and says when it is finished."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.python_api import run
from tests.tiny import make_data, make_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of a run that was trained for one step."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("same")
    settings = {
        "runtime": "local",
        "model.path": make_model(directory / "model", layers=1),
        "data.train": make_data(directory / "prompts.jsonl", rows=8),
        "data.batch_size": 2,
        "actor.generation.engine": "hf",
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 3,
        "actor.train.precision": "fp32",
        "algorithm.samples_per_prompt": 2,
        "loop.num_steps": 1,
        "loop.validate_every": 0,
        "metrics.console": False,
        "output_dir": directory / "out",
        "reward.parts": {
            "short": {"function": "workers.rewards:length_penalty", "options": {"free_words": 1}}
        },
    }
    make_model(directory / "other", layers=1, seed=1)
    make_model(directory / "deeper", layers=2)
    assert run("grpo", settings).num_steps == 1
    return settings


def other(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return settings | {name.replace("__", "."): value for name, value in changes.items()}


def test_b81_the_same_run_is_finished(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        outcome = run("grpo", settings)
    assert outcome.num_steps == 1 and outcome.train_s == 0
    (line,) = [text for text in caplog.messages if text.startswith("nothing to do")]
    assert "is finished after 1 steps; raise loop.num_steps" in line


def test_b81_what_may_change_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(settings["output_dir"], tmp_path / "out")
    changed = other(
        settings,
        output_dir=tmp_path / "out",
        loop__num_steps=2,
        loop__checkpoint_every=1,
        metrics__tensorboard=True,
        actor__train__micro_batch_tokens=64,
        actor__train__optimizer__learning_rate=1e-5,
        data__batch_size=3,
    )
    assert run("grpo", changed).num_steps == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__path": "other"}, "actor.model.path is '{}/other' now and was '{}/model'"),
        ({"model__path": "deeper"}, "actor.model (its config.json) is "),
        ({"actor__train__precision": "bf16"}, "actor.train.precision is 'bf16' now and was 'fp32'"),
        ({"actor__train__engine": "threed"}, "actor.train.engine is 'threed' now and was 'fsdp'"),
        ({"reward__parts": {"short": {"function": "workers.rewards:number"}}}, "reward.function"),
        ({"model__tokenizer": "other"}, "model.tokenizer is '{}/other' now and was '{}/model'"),
    ],
)
def test_b81_another_run_is_refused(
    settings: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    directory = settings["model.path"].parent
    for name in ("model__path", "model__tokenizer"):
        if name in changes:
            changes = changes | {name: directory / changes[name]}
    with pytest.raises(ValueError, match=r"is the checkpoint of another run") as error:
        run("grpo", other(settings, **changes))
    message = str(error.value)
    assert named.replace("{}", str(directory)) in message and "\n" not in message
    assert "another output_dir (or loop.resume=never) to start anew" in message


def test_b82_another_recipe_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"algorithm.name is 'rloo' now and was 'grpo'"):
        run("rloo", settings)


def test_b81_a_checkpoint_that_is_named_is_compared_too(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    (checkpoint,) = (settings["output_dir"] / "checkpoints").glob("step-*")
    changes = other(settings, output_dir=tmp_path, loop__resume=checkpoint)
    with pytest.raises(ValueError, match=r"step-00000001 is the checkpoint of another run: alg"):
        run("rloo", changes)


def test_b81_never_starts_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(settings["output_dir"], tmp_path / "out")
    anew = other(settings, output_dir=tmp_path / "out", loop__resume="never")
    anew["model.path"] = settings["model.path"].parent / "other"
    assert run("grpo", anew).train_s > 0
