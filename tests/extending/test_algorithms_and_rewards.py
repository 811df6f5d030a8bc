"""An algorithm, a role, a reward and a recipe from outside the repository, built from
docs/recipes.md as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import controllers
from controllers import (
    AlgorithmEntry,
    algorithm_entry,
    register_algorithm,
    usable_algorithms,
)
from hybridflow import dry_run
from recipes import roles
from recipes.composing import RecipeFile, compose, to_settings
from recipes.main import main
from recipes.run import run
from tests.extending.outside import write_package
from tests.tiny import make_data, make_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install` would leave of the page's package, and the page's two
    YAMLs."""
    directory = tmp_path_factory.mktemp("outside")
    (module,) = [text for text in blocks("python") if "AlgorithmEntry" in text]
    (names,) = [text for text in blocks("toml") if "hybridflow.algorithms" in text]
    (directory / "brevity").mkdir()
    (directory / "brevity" / "__init__.py").write_text(module)
    installed = directory / "brevity-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: brevity\nVersion: 1.0\n")
    entry_points = re.sub(r'project\.entry-points\."([\w.]+)"', r"\1", names).replace('"', "")
    (installed / "entry_points.txt").write_text(entry_points)
    for text in blocks("yaml"):
        if name := re.match(r"# (\w+\.yaml)\n", text):
            (directory / name[1]).write_text(text)
    return directory


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    return [
        f"model.path={make_model(directory / 'model')}",
        f"data.train={make_data(directory / 'prompts.jsonl')}",
        "data.batch_size=4",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.train.precision=fp32",
        "actor.generation.sampling.max_response_tokens=6",
        "loop.num_steps=2",
        "metrics.console=false",
    ]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run_recipe(
    package: Path, name: str, arguments: list[str], output: Path, *others: Path
) -> subprocess.CompletedProcess[str]:
    """Somewhere else, with the package, those of `others` and the project on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (package, *others, ROOT)))}
    command = [
        sys.executable,
        "-m",
        "recipes",
        str(package / name),
        *arguments,
        f"output_dir={output}",
    ]
    return subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=800
    )


def rewards(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row["reward/mean"] for row in map(json.loads, lines) if row["split"] == "train"]


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(package))
    yield
    ConfigStore.instance().repo["algorithm"].pop("brevity.yaml", None)


@pytest.fixture(scope="module")
def alone(
    package: Path, arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The run in one process, and its output."""
    output = tmp_path_factory.mktemp("alone")
    return run_recipe(package, "brevity.yaml", ["runtime=local", *arguments], output), output


def test_it_runs_in_one_process(alone: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    finished, output = alone
    assert finished.returncode == 0, finished.stderr
    assert len(rewards(output)) == 2
    assert (output / "checkpoints" / "step-00000002" / "huggingface" / "config.json").is_file()


@pytest.mark.slow
def test_it_runs_on_ray(
    package: Path,
    arguments: list[str],
    alone: tuple[subprocess.CompletedProcess[str], Path],
    tmp_path: Path,
) -> None:
    """And draws and scores what one process does, with engines and a loss of a second package,
    which Ray's workers find by module and name."""
    site = write_package(tmp_path / "site")
    outside = [
        "actor.train.engine=outside.engine:WholeEngine",
        "actor.generation.engine=outside.generation:LoudEngine",
        "actor.generation.prefix_caching=false",
        "actor.loss.name=outside.losses:one_sided",
    ]
    output = tmp_path / "ray"
    on_ray = ["num_devices=2", *arguments, *outside]
    finished = run_recipe(package, "brevity.yaml", on_ray, output, site)
    assert finished.returncode == 0, finished.stderr
    assert rewards(output)[0] == rewards(alone[1])[0]
    assert "actor/below_fraction" in (output / "metrics.jsonl").read_text(), "the loss's metric"


@pytest.mark.usefixtures("importable")
def test_a_dry_run_says_what_would_run(
    package: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RecipeFile.of(str(package / "brevity.yaml"))
    output = f"output_dir={tmp_path / 'out'}"
    run(to_settings(compose(recipe, ["dry_run=true", *arguments, output])))
    printed = capsys.readouterr().out
    assert "brevity: 5 calls a step" in printed and "shortness" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("importable")
def test_its_settings_are_told_and_checked(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe() -> RecipeFile:
        return RecipeFile.of(str(package / "brevity.yaml"))

    main(recipe, ["--settings", "algorithm.bonus_weight"])
    expected = "algorithm.bonus_weight = 0.1\n    How much a short answer counts"
    assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as ending:
        main(recipe, ["algorithm.bonus=1"])
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: algorithm.bonus=1: there is no setting 'algorithm.bonus'"
    )


def test_a_yaml_may_begin_with_a_recipe_of_the_project(package: Path) -> None:
    config = to_settings(
        compose(
            RecipeFile.of(str(package / "mine.yaml")), ["model.path=x", "data.train=y", "seed=3"]
        )
    )
    assert (config.algorithm.name, config.algorithm.samples_per_prompt) == ("grpo", 4)
    assert (config.output_dir, config.actor.seed) == ("outputs/mine", 3)


def test_mistakes_in_a_yaml_are_told_in_one_line(tmp_path: Path) -> None:
    for text, message in (
        (
            "defaults: [grpo, _self_]\npolicy: {num_epochs: 3}",
            "policy.num_epochs is now policy.passes_per_batch",
        ),
        (
            "defaults: [grpo, _self_]\nactor: {trian: {tp: 2}}",
            "there is no setting 'actor.trian'; did you mean actor.train",
        ),
        (
            "defaults: [grpo, _self_]\nseed: two",
            "seed: 'two' is not a whole number; write one",
        ),
        ("defaults: [gpro, _self_]", "defaults: there is no recipe 'gpro'"),
        (
            "defaults: [schema, algorithm: mine, _self_]",
            "defaults: there is no algorithm 'mine'; known: cispo, ",
        ),
        ("seed: : 3", r"mapping values are not allowed here \(line 1\)"),
    ):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}") as caught:
            compose(RecipeFile.of(str(path)), [])
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError, match=r"there is no recipe 'gpro'; give the path of a YAML, or one of cispo"
    ):
        RecipeFile.of("gpro")
    with pytest.raises(ValueError, match=r"recipe no\.yaml: there is no such file"):
        RecipeFile.of("no.yaml")


def test_an_algorithm_can_be_registered_by_a_call() -> None:
    entry = AlgorithmEntry("controllers.opo", "OPO", "OPOConfig", ("actor", "reference", "reward"))
    register_algorithm("opo_again", entry)
    assert algorithm_entry("opo_again") is entry
    with pytest.raises(
        ValueError, match="algorithm 'ppo' is built in; register yours under another name"
    ):
        register_algorithm("ppo", entry)
    register_algorithm("opo_again", replace(entry))  # a cell that is run again
    other = AlgorithmEntry("controllers.grpo", "GRPO", "GRPOConfig", entry.roles)
    with pytest.raises(ValueError, match=r"'opo_again' is registered as controllers\.opo:OPO"):
        register_algorithm("opo_again", other)
    with pytest.raises(ValueError, match=r"algorithm 'text' is a str \('controllers.opo:OPO'\)"):
        register_algorithm("text", "controllers.opo:OPO")  # type: ignore[arg-type]
    broken = AlgorithmEntry("controllers.nowhere", "OPO", "OPOConfig", entry.roles)
    with pytest.raises(ValueError, match=r"controllers\.nowhere"):
        register_algorithm("broken", broken)
    assert "text" not in usable_algorithms() and "broken" not in usable_algorithms()


def test_a_script_registers_algorithm_and_role(
    package: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's module and YAML without a package, registered as the page does it."""
    shutil.copytree(package / "brevity", tmp_path / "brevity")
    shutil.copy(package / "brevity.yaml", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (script,) = [text for text in blocks("python") if "register_role(" in text]
    try:
        exec(script)  # as a notebook's cell
        exec(script)  # and again
        report = dry_run(
            str(tmp_path / "brevity.yaml"),
            ["runtime=local", f"output_dir={tmp_path / 'out'}", *arguments],
        )
    finally:
        ConfigStore.instance().repo["algorithm"].pop("brevity.yaml", None)
        controllers.REGISTERED.pop("brevity", None)
        shortness = roles.REGISTERED.pop("shortness", None)
    assert "brevity: 5 calls a step" in report
    assert "shortness  pool main (1 device)" in report
    assert shortness is not None


def test_mistakes_in_a_registered_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "REGISTERED", {})
    kind = roles.ROLES["teacher"]
    with pytest.raises(ValueError, match="role 'critic' is built in; register yours under another"):
        roles.register_role("critic", kind)
    with pytest.raises(ValueError, match=r"role 'third' is an int \('3'\); register a RoleKind"):
        roles.register_role("third", 3)  # type: ignore[arg-type]
    roles.register_role("third", kind)
    with pytest.raises(ValueError, match=r"role 'third' is registered with .*; register yours"):
        roles.register_role("third", roles.ROLES["judge"])
    assert roles.role_kind("third") is kind
    with pytest.raises(ValueError, match=r"role 'fourth' .*third; .*recipes\.roles\.register_role"):
        roles.role_kind("fourth")
