"""Settings that do not exist, are missing, are read by nothing, or have a value of the wrong type."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from recipes.composing import RecipeFile, compose
from recipes.config import RunConfig
from recipes.main import check_names, to_settings, unused_settings

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
