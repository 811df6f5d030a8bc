"""The name=value arguments of a recipe: which names there are, what they were called before,
and tables whose entries the user names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType

from omegaconf import OmegaConf

from controllers import usable_algorithms
from recipes.config import PoolConfig, RunConfig
from workers.rewards.combined import RewardPart

Tree = dict[str, "str | Tree"]
"""Name -> value as it was written, or the names below it."""

TABLES = {
    "pools": PoolConfig,
    "reward.parts": RewardPart,
    "gold.parts": RewardPart,
    "cost.parts": RewardPart,
}
"""Settings whose entries the user names -> the class of an entry."""
OPTIONS = "data.chat_template_options"
"""A dictionary whose keys the user chooses, which Hydra adds only where it is told to."""
FREE = ("hydra.", f"{OPTIONS}.", *(f"{table}." for table in TABLES))
"""Below these the user chooses the names, or Hydra knows them."""

RENAMED = {
    **{
        f"{role}.tokenizer": "model.tokenizer (every reader of the policy's tokens loads it)"
        for role in ("reward", "gold", "cost", "judge")
    },
    "policy.num_epochs": (
        "policy.passes_per_batch (optimizer passes over the rows of every step); passes over the "
        "data are loop.num_epochs"
    ),
}
"""Old name of a setting -> its new one."""
ELSEWHERE = {
    "lr": "learning_rate",
    "kl_coef": "kl_coefficient",
    "kl_loss_coef": "kl_coefficient",
    "max_tokens": "max_response_tokens",
    "max_new_tokens": "max_response_tokens",
    "max_completion_length": "max_response_tokens",
    "response_length": "max_response_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "total_epochs": "num_epochs",
    "max_steps": "num_steps",
    "n": "samples_per_prompt",
    "num_generations": "samples_per_prompt",
    "rollout_n": "samples_per_prompt",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "model_name_or_path": "path",
    "model_path": "path",
    "dataset_name": "train",
    "beta": "kl_coefficient",
    "epsilon_high": "clip_high",
    "gradient_checkpointing": "activation_checkpointing",
    "max_grad_norm": "clip_grad_norm",
    "save_freq": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "test_freq": "validate_every",
    "eval_steps": "validate_every",
}
"""Name of a setting in other systems -> the last part of its name here."""


def check_form(arguments: Sequence[str]) -> None:
    """ValueError for what is not name=value, and for Hydra's ~name."""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if argument.startswith("~"):
            raise ValueError(
                f"{argument}: a setting can't be taken out; leave it out for its default, or set it "
                "to another value"
            )
        if not equals or not name or name != name.strip():
            raise ValueError(
                f"{argument!r} is not of the form name=value (without blanks around the =); "
                "--help shows an example"
            )


def check_names(arguments: Sequence[str], offer: Callable[[], Sequence[str]] | None = None) -> None:
    """ValueError for name=value with a name that no setting has; Hydra's own advice (+name)
    would not help. `offer` gives the settings that the recipe reads, which are suggested."""
    known = setting_names()
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        name = name.removeprefix("++").removeprefix("+")
        if not equals or not name.replace(".", "").isidentifier():
            continue
        if name in known or name.startswith(FREE):
            continue
        if offer is not None:
            known = list(offer())
        raise ValueError(f"{argument}: {unknown_setting(name, known)}")


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """The answer to a setting that does not exist: its new name, or those that look like it."""
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}"
    table = table_of(name)
    if table is not None:
        group = name.rpartition(".")[0]
        known = [f"{group}.{field.name}" for field in fields(TABLES[table])]
    near = near_names(name, known)
    advice = f"did you mean {' or '.join(near)}?" if near else "--settings lists them all"
    return f"there is no setting {name!r}; {advice}"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The setting that was most likely meant, or nothing."""
    if name in known:
        return name
    return next(iter(near_names(name, known)), "")


def near_names(name: str, known: Sequence[str]) -> list[str]:
    """Names of the same group whose last part holds the name's, or else those with the same last
    part, or else names that are written alike; at most three."""
    group, _, last = name.rpartition(".")
    last = ELSEWHERE.get(last, last)
    group_names = [
        other for other in known if other.startswith(f"{group}.") and other.endswith(f"_{last}")
    ]
    if group and group_names:
        return get_close_matches(name, group_names, n=3, cutoff=0.0)
    same = [other for other in known if other.rpartition(".")[2] == last]
    return get_close_matches(name, same, n=3, cutoff=0.0) or get_close_matches(name, known, n=3)


def join_tables(arguments: Sequence[str]) -> list[str]:
    """TABLE.NAME.FIELD=VALUE, which Hydra can't set because NAME is new, as one value:
    +TABLE={NAME: {FIELD: VALUE}}; and TABLE=VALUE as +TABLE=VALUE.

    >>> join_tables(["pools.a.num_devices=2", "pools.a.roles=[actor]", "seed=1"])
    ['seed=1', '+pools={a: {num_devices: 2, roles: [actor]}}']
    >>> join_tables(["reward.parts.form.options.pattern=x"])
    ['+reward.parts={form: {options: {pattern: x}}}']
    """
    tables: dict[str, Tree] = {}
    rest = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        table = table_of(name)
        if table is not None:
            insert(tables.setdefault(table, {}), name.removeprefix(f"{table}."), value, argument)
        else:
            if name in TABLES and argument.endswith("=null"):
                raise ValueError(f"{argument}: it can't be null; leave it out for its default")
            if name in TABLES:
                argument = f"+{argument}"
            elif name.startswith(OPTIONS):
                argument = f"++{argument}"
            rest.append(argument)
    for table, tree in tables.items():
        rest.append(f"+{table}={in_braces(tree)}")
    return rest


def table_of(name: str) -> str | None:
    """The table that a setting is in, if it is in one."""
    for table in TABLES:
        if name.startswith(f"{table}."):
            return table
    return None


def insert(tree: Tree, name: str, value: str, argument: str) -> None:
    """Sets a dotted name of the tree; ValueError where one argument sets a group as a whole and
    another sets something in it."""
    *groups, field = name.split(".")
    for group in groups:
        inner = tree.setdefault(group, {})
        if isinstance(inner, str):
            raise ValueError(f"{argument}: {group}={inner} is set as well; write one of the two")
        tree = inner
    if isinstance(tree.get(field), dict):
        raise ValueError(f"{argument}: {field} is set field by field as well; write one of the two")
    tree[field] = value


def in_braces(tree: Tree) -> str:
    """The tree as a dictionary of Hydra's command line."""
    entries = []
    for name, value in tree.items():
        entries.append(f"{name}: {value if isinstance(value, str) else in_braces(value)}")
    return f"{{{', '.join(entries)}}}"


def setting_names() -> list[str]:
    """Every setting's full name, of all algorithms."""
    names = dict.fromkeys(schema_values(RunConfig))
    for entry in usable_algorithms().values():
        schema: type = entry.load_config()
        names |= dict.fromkeys(schema_values(schema, "algorithm"))
    return list(names)


@cache
def schema_values(schema: type, group: str = "") -> Mapping[str, object]:
    """Full name -> default of every setting and group of settings of a dataclass."""
    config = OmegaConf.to_container(OmegaConf.structured(schema))
    return MappingProxyType(dict(nodes(config, group)))


def nodes(value: object, name: str) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of a tree's inner nodes and leaves."""
    if name:
        yield name, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from nodes(inner, f"{name}.{key}" if name else str(key))
