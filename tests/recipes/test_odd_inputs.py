"""Odd inputs of every kind, as users write them: each is one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.composing import RecipeFile
from recipes.config import RunConfig
from recipes.errors import plain_errors
from recipes.main import main
from recipes.preparation import prepare


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("foo", "'foo' is not of the form name=value"),
        ("=3", "'=3' is not of the form name=value"),
        ("seed = 3", "'seed = 3' is not of the form name=value"),
        ("--seed=3", "--seed=3: settings have no dashes; write seed=3"),
        ("--output-dir", "--output-dir: settings have no dashes; write output_dir="),
        ("call_timeout_s=0", "call_timeout_s is 0.0; use more than 0"),
        ("cpus_per_device=-1", "cpus_per_device is -1.0 and threads_per_device 0; use 0 or more"),
        ("reward.retries=-1", "reward.retries (or cost.retries) is -1; use 0"),
        ("reward.timeout_s=0", "reward.timeout_s (or cost.timeout_s) is 0.0; use more than 0"),
        ("loop.stop_at_reward=nan", "loop.stop_at_reward is nan; use a finite number, or null"),
    ],
)
def test_a_wrong_argument_is_one_line(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(lambda: RecipeFile("grpo"), ["model.path=m", "data.train=d", argument])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["num_devices=0"], "^num_devices is 0; use at least 1$"),
        (["num_devices=0", "runtime=local"], "^num_devices is 0; use at least 1$"),
        (
            ["actor.train.optimizer.learning_rate=nan"],
            "^actor.train.optimizer.learning_rate is nan; use a finite number$",
        ),
        (["output_dir="], "^output_dir is empty; name a directory"),
        (["reward.function=builtins:max"], "max' does not say what it takes"),
        (["reward.function=collections:OrderedDict"], "OrderedDict' is a class; give an instance"),
    ],
)
def test_a_run_that_cannot_start_is_one_line(
    arguments: list[str],
    message: str,
    settings: Callable[..., RunConfig],
    nothing_starts: None,
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(settings("grpo", *arguments))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "it has no list `defaults`"),
        (b"", "it has no list `defaults`"),
        (b"defaults: [grpo]\noutput_dir: \xe9\n", "not UTF-8 text"),
        (b"defaults:\n\t- grpo\n", "(line 2)"),
    ],
)
def test_a_yaml_that_is_no_recipe_is_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(lambda: RecipeFile.of(str(path)), [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ") and message in line


def test_a_full_or_foreign_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), plain_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "/data/out/metrics.jsonl")
    with pytest.raises(SystemExit), plain_errors():
        raise OSError(errno.ENOSPC, "No space left on device")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: /data/out/metrics.jsonl: Permission denied; ")
    assert second.startswith("error: a file of output_dir: No space left on device; ")
    with pytest.raises(FileNotFoundError), plain_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file", "ours")
