"""settings_page(): what can be set in a recipe: name, default and meaning of what its own roles
read.

The meanings are the docstrings below the fields of the settings' dataclasses. Settings of models
that the recipe does not have are left out.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from textwrap import dedent, fill
from typing import cast, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from controllers import QUESTIONS, AlgorithmEntry, algorithm_entry
from recipes.composing import RecipeFile, compose
from recipes.overrides import near_names
from recipes.roles import ROLES, section_of

WIDTH = 110
FROZEN = ("reference", "teacher", "judge", "reward", "gold", "cost")
"""Roles that are never trained: nothing reads their optimizer."""
TRAINING = (
    "train",
    "loss",
    "num_epochs",
    "critic_warmup_steps",
    "report_entropy",
    "probe_tolerance",
)
"""Fields of an actor that only training reads, and not evaluation; consistency.* too."""
ROW_FIELDS = {
    "max_prompt_tokens": ("prompts",),
    "max_tokens": ("demonstrations", "pairs", "safety_pairs"),
    "answer_column": ("prompts",),
    "columns": ("prompts",),
    "response_column": ("demonstrations",),
    "messages_column": ("demonstrations",),
    "chosen_column": ("pairs", "safety_pairs"),
    "rejected_column": ("pairs", "safety_pairs"),
    "chosen_safe_column": ("safety_pairs",),
    "rejected_safe_column": ("safety_pairs",),
}
"""Field of `data` -> the kinds of rows (controllers.data.DATASETS) that it is about; all others
are about every kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Setting(group="actor.train", name="actor.train.tp", default="1", meaning="Tensor-parallel
    size.")"""

    group: str
    name: str
    default: str
    meaning: str


def settings_page(recipe: RecipeFile, overrides: Sequence[str], rest: Sequence[str]) -> str:
    """The text that `python -m recipes.NAME name=value ... --settings [PREFIX] name=value ...` prints; a
    prefix that fits nothing is a ValueError with names that are near."""
    prefixes, changes = [], []
    for argument in rest:
        if "=" in argument:
            changes.append(argument)
        else:
            prefixes.append(argument)
    if len(prefixes) > 1:
        raise ValueError(f"--settings {' '.join(prefixes)}: give one prefix, such as actor.train")
    prefix = "".join(prefixes).rstrip(".")
    config = compose(recipe, [*overrides, *changes])
    entry = algorithm_entry(config.algorithm.name)
    settings = list(read_settings(config, entry))
    chosen = choose(settings, prefix)
    if not chosen:
        raise ValueError(
            no_such_settings(prefix, settings, config.algorithm.name, used_roles(entry))
        )
    lines = [
        f"{recipe.command}: {len(chosen)} of its {len(settings)} settings, each set by name=value"
    ]
    group = None
    for setting in chosen:
        if setting.group != group:
            group = setting.group
            lines += ["", f"[{group or 'the run'}]"]
        lines += [f"{setting.name} = {setting.default}", *indented(setting.meaning)]
    return "\n".join(lines)


def indented(text: str) -> list[str]:
    return [fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ")] if text else []


def choose(settings: Sequence[Setting], prefix: str) -> list[Setting]:
    """Those whose name begins with the prefix, whole words first; or whose last word is the
    prefix."""
    words, starts, ends = [], [], []
    for setting in settings:
        if f"{setting.name}.".startswith(f"{prefix}."):
            words.append(setting)
        if setting.name.startswith(prefix):
            starts.append(setting)
        if setting.name.rpartition(".")[2] == prefix:
            ends.append(setting)
    return words or starts or ends


def no_such_settings(
    prefix: str, settings: Sequence[Setting], algorithm: str, roles: Sequence[str]
) -> str:
    role = prefix.partition(".")[0]
    if role in ROLES and role not in roles:
        return f"--settings {prefix}: {algorithm} has no {role} (its models: {', '.join(roles)})"
    groups = {setting.group: None for setting in settings if setting.group}
    near = near_names(prefix, [*groups, *(setting.name for setting in settings)])
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(groups)}"
    return f"--settings {prefix}: no setting begins with it; {advice}"


def used_roles(entry: AlgorithmEntry) -> list[str]:
    """The fields of RunConfig that hold settings of the recipe's models, validation's rewards
    included."""
    names = [section_of(name) for name in entry.roles]
    if entry.answers_prompts and entry not in QUESTIONS.values():
        names += ["reward", "gold"]
    return list(dict.fromkeys(names))


def read_settings(config: DictConfig, entry: AlgorithmEntry) -> Iterator[Setting]:
    """The settings that this algorithm's run reads."""
    unread = unread_names(entry)
    for setting in all_settings(config, ""):
        if not any(f"{setting.name}.".startswith(f"{name}.") for name in unread):
            yield setting


def unread_names(entry: AlgorithmEntry) -> list[str]:
    """Settings and groups of settings that this algorithm's run does not read."""
    roles = used_roles(entry)
    return [*(role for role in ROLES if role not in roles), *unread_fields(entry)]


def unread_fields(entry: AlgorithmEntry) -> Iterator[str]:
    """Names and groups of names that roles and loop of this algorithm do not look at."""
    for role in FROZEN:
        yield f"{role}.train.optimizer"
        yield f"{role}.train.offload_optimizer"
    for field, rows in ROW_FIELDS.items():
        if entry.rows not in rows:
            yield f"data.{field}"
    if "pretraining" not in entry.streams:
        yield "actor.loss.pretraining_coefficient"
        for field in (
            "pretraining",
            "pretraining_column",
            "pretraining_batch_size",
            "pretraining_tokens",
        ):
            yield f"data.{field}"
    if not entry.answers_prompts:
        yield from ("plan", "loop.validation_sampling", "loop.stop_at_reward")
        yield from ("environment", "episode")
    if "critic" not in entry.roles:
        yield "actor.critic_warmup_steps"
    if entry in QUESTIONS.values():
        yield from ("loop", "metrics", "plan", "actor.consistency", "actor.consistency_tolerance")
        for field in TRAINING:
            yield f"actor.{field}"


def all_settings(config: DictConfig, group: str) -> Iterator[Setting]:
    """The leaves of a tree of dataclasses, each group's own ones before those of the groups in
    it."""
    kind = cast(type, OmegaConf.get_type(config))
    written = cast(dict[str, object], OmegaConf.to_container(config))
    hints, docs = get_type_hints(kind), field_docs(kind)
    inner = []
    for field, value in written.items():
        name = f"{group}.{field}" if group else field
        if is_group(config, field):
            inner.append((config[field], name))
        else:
            meaning = " ".join(filter(None, (docs.get(field, ""), choices(hints[field]))))
            yield Setting(group=group, name=name, default=default_text(value), meaning=meaning)
    for node, name in inner:
        yield from all_settings(node, name)


def is_group(config: DictConfig, field: str) -> bool:
    """Whether the field holds a dataclass of further settings."""
    if OmegaConf.is_missing(config, field) or OmegaConf.is_interpolation(config, field):
        return False
    return isinstance(config[field], DictConfig) and is_dataclass(OmegaConf.get_type(config, field))


def default_text(value: object) -> str:
    """As it would be written on the command line."""
    if value == MISSING:
        return "(must be set)"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | ListConfig):
        return f"[{','.join(map(default_text, value))}]"
    if isinstance(value, str) and (not value or value != value.strip() or "\n" in value):
        return repr(value)
    return str(value)


def choices(hint: object) -> str:
    """The values of a setting of an enumeration, each with its meaning where it has one."""
    kinds = []
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            kinds.append(kind)
    if not kinds:
        return ""
    docs = field_docs(kinds[0])
    described = []
    for member in kinds[0]:
        meaning = docs.get(member.name, "").rstrip(".")
        described.append(f"{member.name} ({meaning})" if meaning else member.name)
    return f"One of {', '.join(described)}."


@cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the string below it in the source of its class; a subclass's own strings come
    last and win."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__ in ("builtins", "enum", "abc"):
            continue
        (definition,) = ast.parse(dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        docs |= docs_of_body(definition.body)
    return docs


def docs_of_body(body: Sequence[ast.stmt]) -> dict[str, str]:
    """The strings that stand directly below assignments, in one line each."""
    docs = {}
    for statement, following in pairwise(body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs
