"""with_text(): what the run settles about text before anything starts, for every role alike: the
chat template, the tokens that end a response, stop strings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from controllers import QUESTIONS
from controllers.data.tokenize import settled_template
from recipes.config import NO_MODEL, RunConfig
from recipes.roles import Role
from recipes.settings_history import CONFIG
from workers.config import ModelConfig
from workers.generation.config import SamplingConfig
from workers.generation.sampling import with_special_stops
from workers.role_config import ActorConfig, JudgeConfig, RewardConfig
from workers.text import ResponseReader, end_token_ids, writes_the_date
from workers.tokenizer import load_tokenizer

LOGGER = logging.getLogger(__name__)

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "num_beams",
    "repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "max_length", "max_new_tokens",
)  # fmt: skip
"""Settings of transformers' generation that change what is drawn."""
ROLES_OF_THE_MODEL = ("actor", "critic", "cost_critic", "reference", "policy", "reward_model")
"""Roles that start from the run's model unless they name their own."""


def with_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunConfig:
    """The settings with model.chat_template and model.end_token_ids filled in for every role of
    the run's model, and special tokens among stop strings as ids. The tokenizer gets the template
    too."""
    template = settled_template(tokenizer, config.data)
    if template != tokenizer.chat_template:
        tokenizer.chat_template = template
        config = replace(config, model=replace(config.model, chat_template=template))
    ends = end_token_ids(config.model, tokenizer=tokenizer)
    _log_ends(config.model, tokenizer, ends)
    settled = replace(config.model, end_token_ids=list(ends))
    changes: dict[str, Any] = {"model": settled}
    for name in ROLES_OF_THE_MODEL:
        role = vars(config)[name]
        if same_tokens(role.model, config.model):
            model = replace(
                role.model,
                chat_template=settled.chat_template,
                end_token_ids=settled.end_token_ids,
            )
            changes[name] = replace(role, model=model)
    config = replace(config, **changes)
    return _with_stops(config, tokenizer)


def with_date(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunConfig:
    """The settings with data.date filled in where the chat template (or the judge's) writes the day's
    date: the day of the run that goes on, else today."""
    templates = [settled_template(tokenizer, config.data)]
    if config.judge.model.path != NO_MODEL:
        templates.append(load_tokenizer(config.judge.model).chat_template)
    if not any(map(writes_the_date, templates)):
        if config.data.date is not None:
            raise ValueError(
                f"data.date is {config.data.date!r}, which nothing reads: no chat template of this run "
                "writes the day's date; leave it out"
            )
        return config
    if config.data.date is not None:
        return config
    day, settings = None, Path(config.output_dir) / CONFIG
    goes_on = config.algorithm.name not in QUESTIONS and config.loop.resume != "never"
    if goes_on and settings.is_file():
        day = yaml.safe_load(settings.read_text(encoding="utf-8"))["data"].get("date")
    day = day or date.today().isoformat()
    LOGGER.info("the chat template writes the day's date; data.date is %s for all of the run", day)
    return replace(config, data=replace(config.data, date=str(day)))


def same_tokens(model: ModelConfig, other: ModelConfig) -> bool:
    """Whether both are one model with one tokenizer."""
    return (model.path, model.tokenizer, model.revision) == (
        other.path,
        other.tokenizer,
        other.revision,
    )


def _log_ends(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
    names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(ends)))) or "nothing"
    LOGGER.info("a response of %s ends with any of: %s", model.path, names)


def _with_stops(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RunConfig:
    actor, loop, judge = config.actor, config.loop, config.judge
    sampling = special_stops(actor.generation.sampling, tokenizer, "actor.generation.sampling")
    validation = special_stops(loop.validation_sampling, tokenizer, "loop.validation_sampling")
    written = judge.generation.sampling
    if written.stop_strings and judge.model.path != NO_MODEL:
        judge_tokenizer = load_tokenizer(judge.model)
        written = special_stops(written, judge_tokenizer, "judge.generation.sampling")
    return replace(
        config,
        actor=replace(actor, generation=replace(actor.generation, sampling=sampling)),
        loop=replace(loop, validation_sampling=validation),
        judge=replace(judge, generation=replace(judge.generation, sampling=written)),
    )


def special_stops(
    sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase, field: str
) -> SamplingConfig:
    if not sampling.stop_strings:
        return sampling
    return with_special_stops(sampling, tokenizer, field)


def log_left_out(roles: Sequence[Role], config: RunConfig) -> None:
    """Says which tokens the text of a response lacks, where a function or a judge reads it."""
    tokenizer = None
    for role in roles:
        reads = isinstance(role.config, JudgeConfig) or (
            isinstance(role.config, RewardConfig) and role.config.function is not None
        )
        if not reads:
            continue
        tokenizer = tokenizer or load_tokenizer(config.model)
        reader = ResponseReader(
            tokenizer,
            config.model.end_token_ids or (),
            special_tokens=role.config.special_tokens,
        )
        LOGGER.info("%s: the text of a response leaves out %s", role.name, reader.describe())


def log_other_sampling(roles: Sequence[Role]) -> None:
    """Says which settings of a generating model's generation_config.json, which transformers' own
    generate() takes over, a run does not."""
    for role in roles:
        if not isinstance(role.config, ActorConfig):
            continue
        model = role.config.model
        try:
            published = GenerationConfig.from_pretrained(model.path, revision=model.revision)
        except OSError:
            continue  # the model has none
        settings = published.to_diff_dict()
        named = [f"{name}={settings[name]}" for name in SAMPLING if name in settings]
        if named:
            LOGGER.info(
                "%s: generation_config.json of %s has %s, which are not taken over; responses are "
                "drawn as generation.sampling says",
                role.name,
                model.path,
                ", ".join(named),
            )
            return


def smallest_vocabulary(roles: Sequence[Role]) -> tuple[str, int] | None:
    """The role whose model knows the fewest tokens, of those that read the policy's, and how many
    it knows."""
    sizes = []
    for role in roles:
        model = role.config.model
        if isinstance(role.config, JudgeConfig) or model is None:
            continue
        if isinstance(role.config, RewardConfig) and role.config.function is not None:
            continue
        hf_config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        sizes.append((int(hf_config.get_text_config().vocab_size), role.name))
    if not sizes:
        return None
    size, name = min(sizes)
    return name, size
