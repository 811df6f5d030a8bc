"""Whether what reads rows with images can: models and generation engines. Known once the data is read,
before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from controllers.data import RowDataset
from recipes.roles import Role
from workers.config import ModelConfig
from workers.generation import ENGINES as GENERATION_ENGINES
from workers.generation import generation_engine_class
from workers.images import ImageProcessor, family_of
from workers.images.families import FAMILIES, published_config
from workers.role_config import ActorConfig, JudgeConfig, RewardConfig


def check_images(
    roles: Sequence[Role], datasets: Sequence[RowDataset | None], policy: ModelConfig
) -> None:
    """A ValueError for a role that reads rows with images and can't, or would see other tokens in them
    than `policy`, whose processor made the prompts."""
    if not any(rows is not None and rows.num_images for rows in datasets):
        return
    for role in roles:
        reads_text = isinstance(role.config, JudgeConfig) or (
            isinstance(role.config, RewardConfig) and role.config.function is not None
        )
        if not reads_text and role.config.model is not None:
            _check(role)
            if role.config.model.path != policy.path:
                _check_rules(role.section, role.config.model, policy)


def _check(role: Role) -> None:
    model = role.config.model
    assert model is not None
    published = published_config(model)
    family, kind = family_of(published), published.model_type
    if family is None:
        raise ValueError(
            f"{role.section}.model.path is {model.path!r}, whose family ({kind}) is given text alone, and "
            f"the data has images; use a model of one of {', '.join(FAMILIES)}"
        )
    if isinstance(role.config, ActorConfig):
        engine = role.config.generation.engine
        builtin = engine in GENERATION_ENGINES.builtin
        if builtin and engine in family.generators:
            return
        if builtin or not generation_engine_class(engine).sees_images:
            raise ValueError(
                f"{role.section}.generation.engine is {engine!r}, which is given no images of a model like "
                f"{model.path!r}, and the data has some; use {' or '.join(family.generators)}"
            )


def _check_rules(role: str, model: ModelConfig, policy: ModelConfig) -> None:
    """Whether a model takes as many tokens for each image as the prompts have."""
    policy_rules, rules = ImageProcessor(policy).rules(), ImageProcessor(model).rules()
    if rules == policy_rules:
        return
    raise ValueError(
        f"{role}.model.path is {model.path!r}, which has images of {_text_of(rules)}, and "
        f"model.path={policy.path!r} of {_text_of(policy_rules)}, so that an image's tokens would not be "
        "those of the prompts; use a model of the same family, and one preprocessor_config.json for both"
    )


def _text_of(rules: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in rules.items())
