"""Settings that do not exist, are missing, are read by nothing, or have a value of the wrong type."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from recipes.composing import RecipeFile, compose, own_settings, to_settings
from recipes.config import RunConfig
from recipes.main import main, unused_settings
from recipes.overrides import check_names, unknown_setting

pytestmark = pytest.mark.usefixtures("nothing_starts")


def test_evaluation_asks_for_the_data_that_it_is_named_after(
    composed: Callable[..., DictConfig],
) -> None:
    with pytest.raises(ValueError, match=r"^not set: data\.validation; give each as name=value$"):
        to_settings(composed("evaluate", ["model.path=x"]))


def test_settings_of_a_model_that_the_recipe_has_not_are_told(
    settings: Callable[..., RunConfig],
) -> None:
    arguments = ["actor.train.tp=1", "policy.train.tp=1", "seed=1", "critic.seed=3"]
    told = list(unused_settings(arguments, settings("sft")))
    assert told == [
        f"{name}: nothing reads it, sft has no {name.partition('.')[0]} (its models: policy)"
        for name in (arguments[0], arguments[3])
    ]
    assert (
        list(unused_settings(["actor.generation.tp=1", "reward.function=x"], settings("evaluate")))
        == []
    )


def test_settings_of_another_kind_of_run_are_told(settings: Callable[..., RunConfig]) -> None:
    arguments = ["loop.num_steps=5", "data.columns=[a]", "seed=1"]
    told = list(unused_settings(arguments, settings("evaluate")))
    assert told == [f"{arguments[0]}: nothing reads it in evaluate; --settings lists what it reads"]
    told = list(unused_settings(["data.max_tokens=5", "loop.num_steps=5"], settings("grpo")))
    assert told == ["data.max_tokens=5: nothing reads it in grpo; --settings lists what it reads"]


def test_a_part_of_a_reward_has_settings_of_its_own() -> None:
    assert unknown_setting("reward.parts.a.wieght", []).startswith(
        "there is no setting 'reward.parts.a.wieght'; did you mean reward.parts.a.weight or "
    )


def test_everything_mandatory_that_is_missing_is_named_at_once(
    composed: Callable[..., DictConfig],
) -> None:
    with pytest.raises(
        ValueError, match=r"^not set: data\.train, model\.path; give each as name=value$"
    ):
        to_settings(composed("ppo", []))


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ("actor.train.learning_rate=1e-5", "did you mean actor.train.optimizer.learning_rate"),
        ("num_device=2", "did you mean num_devices"),
        ("loop.epochs=2", "did you mean loop.num_epochs"),
        ("algorithm.lambda=0.9", "did you mean algorithm.lam"),
        ("actor.train.optimizer.lr=1e-5", "did you mean actor.train.optimizer.learning_rate"),
        (
            "actor.generation.sampling.max_tokens=8",
            "did you mean actor.generation.sampling.max_response_tokens",
        ),
        ("actor.loss.kl_coef=0.1", "did you mean actor.loss.kl_coefficient"),
        ("data.epochs=2", "did you mean .*loop.num_epochs"),
        ("episode.timeout_s=5", r"did you mean episode.step_timeout_s\?"),
        ("xyzzy=1", "--settings lists them all"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(argument: str, advice: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"^{argument}: there is no setting '{argument.partition('=')[0]}'; {advice}",
    ):
        check_names(["seed=1", argument])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "algorithm.kl.coefficient=0.1",
            "algorithm.kl.coefficient: recipe grpo has no such setting; the coefficient of the KL in "
            "its loss is actor.loss.kl_coefficient",
        ),
        (
            "algorithm.lam=0.9",
            "algorithm.lam: recipe grpo has no such setting; --settings algorithm lists those that "
            "it has",
        ),
        ("actor.loss={clip: 0.2}", "actor.loss: there is no setting 'actor.loss.clip'; did you"),
    ],
)
def test_a_setting_of_another_recipe_is_not_its_own_suggestion(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        compose(RecipeFile("grpo"), [argument])


def test_what_is_a_setting_passes() -> None:
    check_names(
        [
            "--cfg",
            "job",
            "algorithm=grpo",
            "hydra.verbose=true",
            "data.chat_template_options.x=1",
            "model.path=a=b",
            "-m",
        ]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_devices=two", "Value 'two' of type 'str' could not be converted to Integer"),
        ("runtime=lokal", "Invalid value 'lokal', expected one of .*ray, local"),
        ("actor.train.precision=fp16", "Invalid value 'fp16', expected one of .*fp32, bf16"),
        ("pools.a.size=2", "Key 'size' not in 'PoolConfig'"),
    ],
)
def test_a_value_of_the_wrong_type_is_told(
    argument: str, message: str, composed: Callable[..., DictConfig]
) -> None:
    """Hydra prints the cause below its own line."""
    with pytest.raises(HydraException) as caught:
        composed("ppo", [argument])
    with pytest.raises(Exception, match=message):
        assert caught.value.__cause__ is not None
        raise caught.value.__cause__


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("grpo", ["--batch_size=4"], "--batch_size=4: settings are name=value; did you mean data"),
        (
            "grpo",
            ["seed=1", "--learning_rate", "1e-5"],
            "--learning_rate 1e-5: settings are name=value; did you mean "
            "actor.train.optimizer.learning_rate=1e-5",
        ),
        (
            "sft",
            ["--learning-rate=1e-5"],
            "--learning-rate=1e-5: settings are name=value; did you mean "
            "policy.train.optimizer.learning_rate=1e-5",
        ),
        (
            "dpo",
            ["--model_name_or_path", "gpt2"],
            "--model_name_or_path gpt2: settings are name=value; did you mean model.path=gpt2",
        ),
        ("ppo", ["--data.train=a"], "--data.train=a: settings have no dashes; write data.train=a"),
        ("ppo", ["--bf16"], "--bf16: settings are name=value; --settings lists them all"),
        ("grpo", ["--multirun"], "--multirun: recipes do not take it; one command is one run"),
        ("evaluate", ["seed=1,2", "-m"], "-m: recipes do not take it; one command is one run"),
        ("grpo", ["--cfg"], "--cfg: say what to show, one of job, hydra, all"),
        ("grpo", ["--resolve"], "--resolve: shows nothing by itself; add --cfg job"),
        ("grpo", ["--cfg", "job", "sead=1"], "sead=1: there is no setting 'sead'; did you mean se"),
    ],
)
def test_flags_are_answered_in_one_line(
    recipe: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(lambda: RecipeFile(recipe), arguments)
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_hydras_flags_may_stand_between_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["recipes.grpo"])
    main(lambda: RecipeFile("grpo"), ["model.path=~/m (1)", "--cfg", "job", "data.batch_size=3"])
    shown = capsys.readouterr().out
    assert "batch_size: 3\n" in shown and "path: ~/m (1)\n" in shown


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_devices=many", "num_devices=many: 'many' is not a whole number; write one"),
        ("seed=1.5", "seed=1.5: '1.5' is not a whole number; write one"),
        ("actor.loss.clip_low=low", "actor.loss.clip_low=low: 'low' is not a number; write one"),
        ("dry_run=perhaps", "dry_run=perhaps: 'perhaps' is neither true nor false; write one"),
        ("runtime=lokal", "runtime=lokal: 'lokal' is none of its values; choose one of ray, local"),
        ("seed=null", "seed=null: it can't be null; leave it out for its default"),
        ("data.pass_rate=3", "data.pass_rate=3: it takes a list; write it in brackets, as [a, b]"),
        ("actor.train=3", "actor.train=3: '3' stands for a group of settings; set them one by one"),
        ("pools.a.num_devices=x", "pools={a: {num_devices: x}}: 'x' is not a whole number"),
        ("~data.train", "~data.train: a setting can't be taken out; leave it out for its default"),
        (
            "generator.generation.engine=hf",
            "generator.generation.engine=hf: there is no setting 'generator.generation.engine'; did "
            "you mean actor.generation.engine",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_to_write(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        compose(RecipeFile("grpo"), [argument])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "argument"),
    [
        ("grpo", "x.engine=hf"),
        ("evaluate", "generator.generation.engine=hf"),
        ("sft", "actor.learning_rate=1"),
    ],
)
def test_only_the_recipes_own_settings_are_suggested(recipe: str, argument: str) -> None:
    with pytest.raises(ValueError, match="did you mean") as caught:
        compose(RecipeFile(recipe), [argument])
    suggested = str(caught.value).partition("did you mean ")[2].rstrip("?").split(" or ")
    own = own_settings(RecipeFile(recipe))
    assert suggested and set(suggested) <= set(own)
