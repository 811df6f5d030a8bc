"""Whether data, models and functions fit each other: columns, lengths, vocabularies. Known once the
data is read, before anything starts.

Every problem is a ValueError with field, value and fix. Leaves out what can be told from settings
alone (checks.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set

from transformers import PreTrainedTokenizerBase

from controllers import algorithm_entry
from controllers.data import PromptDataset, RowDataset, load_tokenizer
from recipes.config import RunConfig
from recipes.generation_checks import check_token_ids
from recipes.model_checks import most_tokens
from recipes.roles import SCORERS, Role, role_kind, role_names
from workers.config import ModelConfig
from workers.engines.base import Head
from workers.engines.model.loading import model_config, position_limit
from workers.reward_function import check_columns, resolve
from workers.rewards.answers import check_answers
from workers.role_config import ActorConfig, JudgeConfig

LOGGER = logging.getLogger(__name__)


def check_columns_of(config: RunConfig, name: str, field: str, rows: PromptDataset) -> None:
    """Whether whoever scores the responses to data.<name> finds there what it asks for, and can read
    it."""
    columns = rows.column_names
    trained = algorithm_entry(config.algorithm.name).roles
    for role in role_names(config) if name == "validation" else trained:
        if role == "judge" and name == "train":
            check_template(config.judge, columns)
        elif (
            role in SCORERS and (function := role_kind(role).settings(config).function) is not None
        ):
            check_columns(function, columns, role)
            places = ((rows.place(i), rows.column_values(i)) for i in range(len(rows)))
            check_answers(resolve(function, role), places, field)


def check_validation_stops(config: RunConfig, roles: Sequence[Role]) -> None:
    """Validation's own stop tokens are tokens of the policy."""
    stops = config.loop.validation_sampling.stop_token_ids
    if stops and any(role.name == "actor" for role in roles):
        size = int(model_config(config.model, Head.lm).get_text_config().vocab_size)
        check_token_ids("loop.validation_sampling.stop_token_ids", stops, size)


def check_template(config: JudgeConfig, names: Set[str]) -> None:
    """Whether judge.template asks for what a row has: `names` are the data's columns as a
    reward sees them."""
    present = {"prompt", "response", *names}
    missing = [name for name in config.template_fields if name not in present]
    if missing:
        raise ValueError(
            f"judge.template asks for {', '.join(missing)}, and a row has "
            f"{', '.join(['prompt', 'response', *sorted(names)])}; correct the "
            "template, or data.answer_column and data.columns, which say what is kept"
        )


def check_prompts(field: str, longest_prompt_tokens: int, config: ActorConfig) -> None:
    """Whether the longest prompt of `field` (data.train, data.validation) fits the engine
    together with its response."""
    limit, source = most_tokens(config.model, config.generation, "actor")
    most = limit - config.generation.sampling.max_response_tokens
    if longest_prompt_tokens > most:
        raise ValueError(
            f"{field}: its longest prompt has {longest_prompt_tokens} tokens, and beside "
            f"actor.generation.sampling.max_response_tokens={config.generation.sampling.max_response_tokens} "
            f"there is room for {most} in {limit} tokens ({source}); lower it, raise the limit, "
            f"or set data.max_prompt_tokens={most} to drop longer prompts"
        )


def check_text(field: str, longest_tokens: int, model: ModelConfig, setting: str) -> None:
    """Whether the longest row of `field` (data.train, data.validation, data.pretraining) fits
    the model; `setting` limits it."""
    limit = position_limit(model, Head.lm)
    if longest_tokens > limit:
        raise ValueError(
            f"{field}: its longest row has {longest_tokens} tokens, and the model's limit is "
            f"{limit}; set {setting}={limit} or lower"
        )


def log_overlap(train: RowDataset, held_out: RowDataset) -> None:
    """Says how many of the validation's prompts are trained on."""
    prompts = {train.part(row, 0).tobytes() for row in range(len(train))}
    shared = [row for row in range(len(held_out)) if held_out.part(row, 0).tobytes() in prompts]
    if shared:
        LOGGER.warning(
            "data.validation: %d of %d prompts are in data.train too (the first: %s); the validation's "
            "reward is partly that of rows that are trained on",
            len(shared),
            len(held_out),
            held_out.place(shared[0]),
        )


def readers(config: RunConfig, roles: Sequence[Role]) -> list[Role]:
    """Models of their own that read the policy's tokens: all but the judge, who reads text."""
    models = []
    for role in roles:
        model = role.config.model
        if role.name != "judge" and model is not None and model.path != config.model.path:
            models.append(role)
    return models


def check_context_lengths(
    config: RunConfig, roles: Sequence[Role], longest_prompt_tokens: int
) -> None:
    """The same models read prompts with their responses."""
    for role in readers(config, roles):
        check_room(
            role.name,
            role.config.model,
            role_kind(role.name).head,
            longest_prompt_tokens,
            config.actor,
        )


def check_vocabularies(
    config: RunConfig, roles: Sequence[Role], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks the vocabulary of every model that reads the policy's tokens."""
    for role in readers(config, roles):
        check_vocabulary(role.name, role.config.model, config.model, tokenizer)


def check_vocabulary(
    role: str, model: ModelConfig, policy: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whether a model that reads the policy's tokens means the same by each of them; it may
    know further ones."""
    try:
        other = load_tokenizer(model).get_vocab()
    except ValueError as error:
        LOGGER.warning("%s: its vocabulary can't be held against the policy's: %s", role, error)
        return
    for token, number in tokenizer.get_vocab().items():
        if other.get(token) != number:
            there = f"token {other[token]}" if token in other else "no token"
            raise ValueError(
                f"{role}.model.path is {model.path!r}, of another vocabulary than "
                f"model.path={policy.path!r}: {token!r} is {there} there and token {number} here, "
                f"and {role} reads the policy's tokens; use a model of its family"
            )


def check_room(
    role: str, model: ModelConfig, head: Head, longest_prompt_tokens: int, config: ActorConfig
) -> None:
    """Whether the longest prompt with the longest response fits a model that reads both, beside
    the policy's own."""
    limit = position_limit(model, head)
    response = config.generation.sampling.max_response_tokens
    if longest_prompt_tokens + response > limit:
        raise ValueError(
            f"{role}.model.path is {model.path!r}, whose limit is {limit} tokens; the longest "
            f"prompt of data.train has {longest_prompt_tokens} beside "
            f"actor.generation.sampling.max_response_tokens={response}; lower that or "
            "data.max_prompt_tokens, or use another model"
        )
