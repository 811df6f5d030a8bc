"""What a command says: --settings, --help, Hydra's own options, and errors in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from controllers import ENTRIES
from hybridflow.errors import Where, WorkerDied, WorkerError
from recipes.composing import RecipeFile
from recipes.errors import ERROR_FILE, plain_errors
from recipes.overrides import RENAMED, check_names, setting_names
from recipes.settings_page import WIDTH, field_docs, settings_page
from recipes.usage import recipe_list, usage
from tests.recipes.conftest import yaml_files
from workers.config import Precision
from workers.role_config import ActorConfig

SETTING = re.compile(r"^([\w.]+) = (.*)$", re.MULTILINE)


@pytest.mark.parametrize("recipe", yaml_files())
def test_settings_are_those_of_the_recipes_models_with_their_defaults(
    recipe: str, composed: Callable[..., DictConfig]
) -> None:
    page = settings_page(RecipeFile(recipe), [], [])
    listed = dict(SETTING.findall(page))
    check_names([f"{name}=" for name in listed])
    models = {"actor" if role == "generator" else role for role in ENTRIES[recipe].roles}
    for name in ("actor", "critic", "cost_critic", "teacher", "judge", "policy", "reward_model"):
        assert any(setting.startswith(f"{name}.") for setting in listed) == (name in models), name
    config = composed(recipe, [])
    for name, default in listed.items():
        if re.fullmatch(r"-?\d+", default):
            assert OmegaConf.select(config, name) == int(default), name
    without = re.findall(r"^([\w.]+) = .*\n(?! {4}\S)", f"{page}\n", re.MULTILINE)
    assert not without, "settings without a meaning"
    assert all(len(line) <= WIDTH for line in page.splitlines() if " = " not in line)


def test_a_prefix_selects() -> None:
    page = settings_page(RecipeFile("grpo"), [], ["actor.train"])
    names = [name for name, _ in SETTING.findall(page)]
    assert names and all(name.startswith("actor.train.") for name in names)
    assert "actor.train.tp = 1\n    Tensor-parallel size.\n" in page
    assert (
        "fp32 elsewhere; the run says which), fp32 (Weights, activations and gradients in" in page
    )
    (last_word,) = SETTING.findall(settings_page(RecipeFile("grpo"), [], ["zero_stage", "seed=3"]))[
        :1
    ]
    assert last_word == ("actor.train.zero_stage", "2")
    assert "seed = 3\n" in settings_page(RecipeFile("grpo"), ["seed=3"], ["seed"])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("actr.train", "no setting begins with it; did you mean actor.train"),
        ("critic.train", r"grpo has no critic \(its models: actor, reference, reward, gold\)"),
    ],
)
def test_an_unknown_prefix_is_answered(prefix: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--settings {prefix}: {message}"):
        settings_page(RecipeFile("grpo"), [], [prefix])


def test_meanings_are_the_strings_below_the_fields() -> None:
    assert field_docs(ActorConfig)["report_entropy"].startswith(
        "Log the policy's entropy even where"
    )
    assert field_docs(Precision)["fp32"] == "Weights, activations and gradients in float32."
    assert "model" not in field_docs(ActorConfig)


@pytest.mark.parametrize("recipe", yaml_files())
def test_help_is_a_few_lines(recipe: str) -> None:
    text = usage(RecipeFile(recipe))
    assert len(text.splitlines()) <= 20
    needed = "data.validation=..." if recipe == "evaluate" else "data.train=..."
    assert f"python -m recipes.{recipe} {needed} model.path=..." in text
    assert f"recipes.{recipe} " in recipe_list()
    (prefix,) = re.findall(r"--settings (\S+) +only those", text)
    assert f"[{prefix}]" in settings_page(RecipeFile(recipe), [], [prefix])


def test_renamed_settings_name_settings_that_exist() -> None:
    known = setting_names()
    for old, new in RENAMED.items():
        assert old not in known and new.split()[0] in known
        with pytest.raises(ValueError, match=f"^{old}=3: {old} is now {re.escape(new)}$"):
            check_names([f"{old}=3"])
    assert "loop.num_epochs" in RENAMED["policy.num_epochs"], "both meanings"


@pytest.mark.parametrize(
    "error",
    [
        WorkerError(
            Where(role="actor", rank=1, method="update_actor"), "out of memory", "Traceback ..."
        ),
        WorkerDied("actor rank 1 died\nin update_actor"),
    ],
)
def test_a_workers_error_is_one_line_and_a_file(
    error: Exception,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit) as exit, plain_errors(lambda: tmp_path / "run"):
        raise error
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: actor rank 1") and line.endswith(
        f"details: {tmp_path / 'run' / ERROR_FILE}"
    )
    details = (tmp_path / "run" / ERROR_FILE).read_text()
    assert str(error) in details and "test_command_line.py" in details
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(type(error)), plain_errors():
        raise error


def test_a_bug_keeps_its_stack() -> None:
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("ours")


COMMAND = """
import atexit
import runpy
import sys


class Noisy:
    def __del__(self) -> None:
        sys.__stderr__.write("leaked!\\n")


import recipes  # as python -m does

sys.noisy = Noisy()
atexit.register(lambda: print("closed", file=sys.stderr))
sys.argv = ["recipes.plan", *sys.argv[1:]]
runpy.run_module("recipes.plan", run_name="__main__", alter_sys=True)
"""


def test_the_line_is_the_last_thing_that_a_failed_command_says() -> None:
    """Also where something talks while Python takes itself apart, as nanobind does."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, "model=nothing", "cluster=8xA100-80GB"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert lines[-2].startswith("error: model") and lines[-1] == "closed"


def test_quoted_line_breaks_are_no_further_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), plain_errors():
        raise ValueError("model.path is wrong (a\n  b\n); correct it")
    assert capsys.readouterr().err == "error: model.path is wrong (a b ); correct it\n"
