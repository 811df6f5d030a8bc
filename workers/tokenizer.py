"""load_tokenizer(): the tokenizer of a model, loaded in one way for every role that reads or writes
its tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from workers.config import ModelConfig
from workers.hub import check_reachable
from workers.text.dates import dated


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or the one named beside it."""
    name = model.tokenizer or model.path
    if name == "???":
        raise ValueError("model.path is not set; give a Hugging Face directory or a hub name")
    revision = model.revision if model.tokenizer is None else None
    try:
        check_reachable(name, revision)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(
                f"the tokenizer at {name!r} is code of its own; set model.trust_remote_code=true "
                "(of the role whose model it is) if you trust it"
            ) from error
        if Path(name).is_absolute() and not Path(name).exists():
            reason = "there is no such directory"
        raise ValueError(
            f"no tokenizer at {name!r} ({reason}); set model.path or model.tokenizer to a "
            "directory or hub name"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # transformers makes an empty tokenizer from the model's type alone if none was saved.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(
            f"no tokenizer at {name!r}: it knows no tokens; set model.tokenizer to a directory or "
            "hub name that has one"
        )
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    return tokenizer


def dated_tokenizer(model: ModelConfig, day: str | None) -> PreTrainedTokenizerBase:
    """The same for rendering alone: its chat template writes `day` (data.date) as the date. What is
    saved is load_tokenizer()'s."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = dated(tokenizer.chat_template, day)
    return tokenizer
