"""B81, B82: a run goes on with the checkpoint of the same run only, and says when it is finished."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hybridflow.metrics import read_jsonl
from hybridflow.snapshots.memory import MemoryPlace
from recipes.python_api import dry_run, open_session, run
from recipes.settings_history import settings_of_step, write_settings
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


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file with its time and bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def other(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return settings | {name.replace("__", "."): value for name, value in changes.items()}


def test_b81_the_same_run_is_finished(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(settings["output_dir"])
    with caplog.at_level(logging.INFO):
        outcome = run("grpo", other(settings, actor__train__optimizer__learning_rate=3e-5))
    assert contents(settings["output_dir"]) == before, "nothing to do changes nothing"
    saved = json.loads((settings["output_dir"] / "summary.json").read_text())
    assert outcome.num_steps == 1 and outcome.train_s == saved["train_s"] > 0
    assert outcome.tokens == pytest.approx(saved["tokens"]) and outcome.phase_s == saved["phase_s"]
    assert outcome.largest == saved["largest"] and "actor/log_prob_gap_max" in outcome.largest
    model = settings["output_dir"] / "checkpoints" / "step-00000001" / "huggingface"
    assert caplog.messages[-1] == f"model: {model}" and (model / "model.safetensors").is_file()
    (other_settings,) = [text for text in caplog.messages if "other settings" in text]
    assert other_settings.endswith(
        ": actor.train.optimizer.learning_rate is 3e-05 now and was 1e-06"
    )
    (line,) = [text for text in caplog.messages if text.startswith("nothing to do")]
    assert "is finished after 1 steps; raise loop.num_steps" in line


def test_a_session_on_a_finished_run_keeps_its_files(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Until it trains a step more, with its own settings."""
    output = tmp_path / "out"
    shutil.copytree(settings["output_dir"], output)
    before = {path: text for path, (_, text) in contents(output).items()}
    changed = other(settings, output_dir=output, actor__train__optimizer__learning_rate=3e-5)
    with open_session("grpo", changed) as session:
        assert session.num_steps == 1
    after = {path: text for path, (_, text) in contents(output).items() if path in before}
    assert after == before
    with open_session("grpo", changed) as session:
        session.step()
    path, begin = settings_of_step(output, 2)
    assert begin == 1 and "learning_rate: 3.0e-05" in path.read_text()
    assert "learning_rate: 1.0e-06" in settings_of_step(output, 1)[0].read_text()


def test_a_summary_that_is_missing_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    """The process was killed after its last checkpoint; the memory and the files that it left go."""
    shutil.copytree(settings["output_dir"], tmp_path / "out")
    memory = MemoryPlace.of(tmp_path / "out")
    assert memory is not None
    memory.target(1).mkdir(parents=True)
    left = tmp_path / "out" / "checkpoints" / ".saving-1-step-00000001"
    left.mkdir()
    summary = tmp_path / "out" / "summary.json"
    whole = summary.read_text()
    summary.unlink()
    run("grpo", other(settings, output_dir=tmp_path / "out"))
    written, before = json.loads(summary.read_text()), json.loads(whole)
    assert written.pop("tokens") == pytest.approx(before.pop("tokens")) and written == before
    assert not memory.directory.exists() and not left.exists()


def test_b81_what_may_change_goes_on(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says once what is new of what steps depend on, and that a file lost its lines."""
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
    metrics = tmp_path / "out" / "metrics.jsonl"
    of_first = metrics.read_text()
    metrics.write_text(of_first[:-9])
    with caplog.at_level(logging.WARNING):
        open_session("grpo", changed).close()
    assert caplog.messages == [
        "steps after 1 are trained with other settings: actor.train.micro_batch_tokens is 64 now and "
        "was 0; actor.train.optimizer.learning_rate is 1e-05 now and was 1e-06; data.batch_size is 3 "
        "now and was 2",
        f"{metrics}: 1 of the 1 steps so far are missing",
    ]
    metrics.write_text(of_first)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        outcome = run("grpo", changed)
    assert not caplog.messages
    assert outcome.num_steps == 2
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert outcome.train_s == pytest.approx(sum(row["seconds/step"] for row in rows))
    assert outcome.phase_s["actor.update_actor"] == pytest.approx(
        sum(row["seconds/actor.update_actor"] for row in rows)
    )
    first, begin = settings_of_step(tmp_path / "out", 1)
    assert begin == 0 and "learning_rate: 1.0e-06" in first.read_text()
    second, begin = settings_of_step(tmp_path / "out", 2)
    assert begin == 1 and "learning_rate: 1.0e-05" in second.read_text()


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


def test_b81_other_rows_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """In a dry run too."""
    rows = settings["data.train"].read_text().splitlines(keepends=True)
    for changed in (rows[::-1], rows[:-1]):
        (tmp_path / "rows.jsonl").write_text("".join(changed))
        more = other(settings, loop__num_steps=3, data__train=tmp_path / "rows.jsonl")
        with pytest.raises(ValueError, match=rf"had 8 rows and .* this one has {len(changed)} and"):
            dry_run("grpo", more)
    with pytest.raises(ValueError, match=r"data.seed is 5, the checkpoint was written with 0"):
        dry_run("grpo", other(settings, loop__num_steps=3, data__seed=5))


def test_a_config_yaml_that_is_damaged_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(settings["output_dir"], tmp_path / "out")
    (tmp_path / "out" / "config.yaml").write_text("a: [b\n")
    with pytest.raises(ValueError, match=r"config.yaml can't be read .*remove it to go on"):
        run("grpo", other(settings, output_dir=tmp_path / "out", loop__num_steps=2))


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


def test_settings_of_the_steps_before_a_resume_are_kept(tmp_path: Path) -> None:
    """Resumed after step 3 with another learning rate, after step 5 with another log, and then back at
    step 2, whose later steps are trained again."""

    def rate_of(step: int) -> tuple[float, int]:
        path, begin = settings_of_step(tmp_path, step)
        return OmegaConf.load(path).rate, begin

    write_settings(tmp_path, {"rate": 1.0, "metrics": {"jsonl": True}}, 0)
    write_settings(tmp_path, {"rate": 2.0, "metrics": {"jsonl": True}}, 3)
    write_settings(tmp_path, {"rate": 2.0, "metrics": {"jsonl": False}}, 5)
    assert [rate_of(step) for step in (3, 4, 6)] == [(1.0, 0), (2.0, 3), (2.0, 3)]
    write_settings(tmp_path, {"rate": 3.0, "metrics": {"jsonl": True}}, 2)
    assert [rate_of(step) for step in (2, 3, 4)] == [(1.0, 0), (3.0, 2), (3.0, 2)]
    write_settings(tmp_path, {"rate": 4.0}, 0)
    assert rate_of(9) == (4.0, 0)


def test_a_finished_run_without_its_model_exports_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(settings["output_dir"], output)
    (saved,) = (output / "checkpoints").glob("step-*")
    shutil.rmtree(saved / "huggingface")
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["checksum"]
    kept = {name: at for name, at in manifest["files"].items() if "huggingface" not in name}
    (saved / "manifest.json").write_text(json.dumps(manifest | {"files": kept}))
    assert run("grpo", other(settings, output_dir=output)).num_steps == 1
    (model,) = (output / "checkpoints").glob("step-*/huggingface")
    (before,) = settings["output_dir"].glob("checkpoints/step-*/huggingface")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == {
        path.name: path.read_bytes() for path in before.iterdir()
    }
    lines = (output / "ledger.jsonl").read_text()
    assert lines == (settings["output_dir"] / "ledger.jsonl").read_text()
