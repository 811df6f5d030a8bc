"""Every recipe composes to plain dataclasses of the right types, and one setting reaches every
role that depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from controllers import ENTRIES
from recipes.composing import to_settings
from recipes.config import RunConfig
from recipes.overrides import check_names, join_tables
from recipes.placing import place
from recipes.preparation import check_dataflow
from recipes.quickstart.settings import SETTINGS, devices
from recipes.schedules import with_schedules
from recipes.unread import check_unread
from tests.recipes.conftest import yaml_files
from workers.actor import ActorWorker
from workers.reward import FunctionRewardWorker, ModelRewardWorker

PLAIN = (str, int, float, bool, type(None), Enum)


def check_plain(value: Any, name: str) -> None:
    """No DictConfig, no dict in the place of a dataclass, no reference left unresolved."""
    if is_dataclass(value):
        assert "__dict__" not in vars(type(value)) or not set(vars(value)) - {
            field.name for field in fields(value)
        }, name
        for field in fields(value):
            check_plain(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, list):
        for number, element in enumerate(value):
            check_plain(element, f"{name}[{number}]")
    elif type(value) is dict:
        for key, element in value.items():
            check_plain(element, f"{name}.{key}")
    else:
        assert isinstance(value, PLAIN) and "${" not in str(value) and value != "???", (
            f"{name} is {value!r}"
        )


@pytest.mark.parametrize("recipe", yaml_files())
def test_every_recipe_becomes_plain_dataclasses_and_passes_its_own_checks(
    recipe: str, settings: Callable[..., RunConfig]
) -> None:
    kl = ["actor.loss.kl_coefficient=0.1"] if "reference" in ENTRIES[recipe].roles else []
    config = settings(recipe, *kl)
    check_plain(config, recipe)
    check_unread(config)
    assert type(config) is RunConfig
    assert type(config.algorithm) is ENTRIES[recipe].load_config(), (
        "the algorithm's own class, not its base"
    )
    for field in fields(RunConfig):
        assert (
            type(getattr(config, field.name)) is type(getattr(RunConfig(), field.name))
            or field.name == "algorithm"
        ), field.name
    placement = place(config)
    assert set(placement.pool_of) == set(ENTRIES[config.algorithm.name].roles)
    assert set(placement.pool_of.values()) == {"main"}
    assert placement.roles[0].worker is ActorWorker or placement.roles[0].name != "actor"
    assert set(check_dataflow(placement).roles) == set(placement.pool_of)


@pytest.mark.parametrize("recipe", sorted(SETTINGS))
def test_the_quickstarts_settings_are_settings(
    recipe: str, composed: Callable[..., DictConfig], required: list[str]
) -> None:
    quickstart = [*SETTINGS[recipe], devices()]
    check_names(quickstart)
    config = to_settings(composed(recipe, [*required, *quickstart]))
    assert config.num_devices == 2 and config.actor.generation.max_model_len == 64


def test_the_algorithms_own_fields_can_be_set(settings: Callable[..., RunConfig]) -> None:
    """A schema's defaults list in the wrong order would give the base class and drop them
    silently."""
    config = settings(
        "ppo", "algorithm.lam=0.9", "algorithm.kl.coefficient=0.2", "algorithm.num_mini_batches=4"
    )
    assert (
        config.algorithm.lam,
        config.algorithm.kl.coefficient,
        config.algorithm.num_mini_batches,
    ) == (
        0.9,
        0.2,
        4,
    )
    assert settings("grpo", "algorithm.scale_by_std=false").algorithm.scale_by_std is False


def test_another_algorithm_in_the_same_recipe(settings: Callable[..., RunConfig]) -> None:
    assert settings("ppo", "algorithm=grpo").algorithm.samples_per_prompt == 8


def test_one_setting_reaches_every_role(settings: Callable[..., RunConfig]) -> None:
    config = settings(
        "ppo",
        "seed=5",
        "model.tokenizer=elsewhere",
        "actor.generation.sampling.temperature=0.7",
        "critic.model.path=other",
    )
    assert config.actor.model == config.reference.model == config.model
    assert (config.critic.model.path, config.critic.model.tokenizer) == ("other", "elsewhere"), (
        "one field of one role is its own"
    )
    assert (config.actor.seed, config.critic.seed) == (5, 5)
    assert config.reference.temperature == 0.7, "the reference scores as the actor samples"


def test_a_schedule_ends_with_the_run(settings: Callable[..., RunConfig]) -> None:
    """Optimizer steps: steps x passes x mini-batches, without the updates that a critic's
    warm-up leaves out."""
    cosine = [f"{role}.train.optimizer.schedule=cosine" for role in ("actor", "critic", "policy")]
    config = settings(
        "ppo",
        *cosine,
        "algorithm.num_mini_batches=4",
        "actor.num_epochs=2",
        "actor.critic_warmup_steps=3",
        "policy.passes_per_batch=5",
        "policy.train.optimizer.total_steps=9",
    )
    settled = with_schedules(config, 10)
    assert settled.actor.train.optimizer.total_steps == (10 - 3) * 2 * 4
    assert settled.critic.train.optimizer.total_steps == 10 * 4
    assert settled.policy.train.optimizer.total_steps == 9, "its own"
    assert settled.cost_critic.train.optimizer.total_steps == 0, "constant"


def test_one_seed_reaches_everything_random(settings: Callable[..., RunConfig]) -> None:
    config = settings("ppo", "seed=5")
    followers = (
        "actor",
        "critic",
        "cost_critic",
        "reward_model",
        "policy",
        "judge",
        "algorithm",
        "data",
    )
    assert {name: vars(config)[name].seed for name in followers} == dict.fromkeys(followers, 5)
    for name in followers:
        apart = settings("ppo", "seed=5", f"{name}.seed=7")
        assert {other: vars(apart)[other].seed for other in followers} == {
            **dict.fromkeys(followers, 5),
            name: 7,
        }


def test_settings_survive_being_written_beside_the_run(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """config.yaml of the output directory loads as the same settings."""
    config = settings(
        "ppo", "data.validation=[a.parquet,b.parquet]", "placement=custom", "pools.a.roles=[actor]"
    )
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    written = OmegaConf.load(tmp_path / "config.yaml")
    assert OmegaConf.to_container(written) == OmegaConf.to_container(
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    )
    assert written.pools.a.roles == ["actor"] and written.data.validation == [
        "a.parquet",
        "b.parquet",
    ]


def test_pools_by_command_line(settings: Callable[..., RunConfig]) -> None:
    pools = [
        "pools.policy.num_devices=2",
        "pools.policy.roles=[actor,reference]",
        "pools.values.roles=[critic,reward]",
    ]
    config = settings("ppo", "placement=custom", *pools)
    assert place(config).pool_sizes == {"policy": 2, "values": 1}
    assert place(config).pool_of == {
        "actor": "policy",
        "reference": "policy",
        "critic": "values",
        "reward": "values",
    }
    assert place(settings("ppo", "runtime=local", "placement=custom", *pools)).pool_sizes == {
        "main": 1
    }, "one process has one pool"


def test_generation_in_a_pool_of_its_own(settings: Callable[..., RunConfig]) -> None:
    pools = [
        "pools.train.num_devices=2",
        "pools.train.roles=[actor,critic,reference,reward]",
        "pools.samples.num_devices=4",
    ]
    config = settings(
        "ppo",
        "placement=custom",
        *pools,
        "pools.samples.roles=[generation]",
        "actor.generation.tp=2",
    )
    placement = place(config)
    roles = {role.name: role for role in placement.roles}
    assert (roles["actor"].pool, roles["generation"].pool) == ("train", "samples")
    assert str(roles["generation"].worker.layouts(config.actor, 4)["generation"]) == "dp2 x tp2"
    together = settings("ppo")
    assert check_dataflow(placement) == check_dataflow(place(together)), "the page does not change"
    for wrong, message in (
        ("[actor,critic,reference,reward,generation]", "names both actor and generation"),
        ("[generation]", "must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            place(settings("ppo", "placement=custom", f"pools.train.roles={wrong}"))
    with pytest.raises(ValueError, match="does not divide the 4 devices of generation's pool"):
        place(
            settings(
                "ppo",
                "placement=custom",
                *pools,
                "pools.samples.roles=[generation]",
                "actor.generation.tp=3",
            )
        )


def test_a_tables_fields_may_be_groups() -> None:
    arguments = [
        "reward.parts.form.function=m:g",
        "reward.parts.form.options.pattern=x",
        "reward.parts.form.options.whole=true",
        "reward.parts.right={function: m:f}",
    ]
    form = "{function: m:g, options: {pattern: x, whole: true}}"
    joined = f"+reward.parts={{form: {form}, right: {{function: m:f}}}}"
    assert join_tables(arguments) == [joined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reward.parts.a.options={p: x}", "reward.parts.a.options.q=y"],
            r"reward.parts.a.options.q=y: options=\{p: x\} is set as well; write one of the two",
        ),
        (
            ["reward.parts.a.options.q=y", "reward.parts.a.options={p: x}"],
            r"options=\{p: x\}: options is set field by field as well; write one of the two",
        ),
    ],
)
def test_a_group_is_set_whole_or_field_by_field(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_tables(arguments)


def test_join_tables_leaves_everything_else_alone() -> None:
    arguments = ["seed=1", "+pools={a: {roles: [actor]}}", "data.train=pools.parquet"]
    assert join_tables(arguments) == arguments


def test_the_reward_is_a_function_or_a_model(
    composed: Callable[..., DictConfig], required: list[str]
) -> None:
    model = required[0].removeprefix("model.path=")
    assert settings_worker(composed, required) is FunctionRewardWorker
    without = [argument for argument in required if not argument.startswith("reward.")]
    assert settings_worker(composed, [*without, f"reward.model.path={model}"]) is ModelRewardWorker


def settings_worker(composed: Callable[..., DictConfig], arguments: list[str]) -> type:
    return next(
        role.worker
        for role in place(to_settings(composed("ppo", arguments))).roles
        if role.name == "reward"
    )


@pytest.mark.parametrize(
    ("arguments", "roles"),
    [
        (["algorithm.kl.coefficient=0"], {"actor", "critic", "reward"}),
        (
            ["algorithm.kl.coefficient=0", "actor.loss.kl_coefficient=0.1"],
            {"actor", "critic", "reward", "reference"},
        ),
    ],
)
def test_a_reference_that_nothing_reads_is_not_loaded(
    arguments: list[str], roles: set[str], settings: Callable[..., RunConfig]
) -> None:
    config = settings("ppo", *arguments)
    placed = place(config)
    assert set(placed.pool_of) == roles == set(check_dataflow(placed).roles)
