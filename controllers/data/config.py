"""Settings of the data: where prompts come from, which columns they are in, how they become
tokens and batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import Any

from controllers.data.sources import sources


class EqualPairs(StrEnum):
    """What happens to a pair that prefers nothing: two equal responses, or dialogues that part
    before their last turn."""

    drop = "drop"
    """Leave it out; how many were is logged."""
    error = "error"


class Overlong(StrEnum):
    """What happens to a row over the limit (max_prompt_tokens, max_tokens). Cutting it is not
    offered: it would be another one."""

    drop = "drop"
    """Leave it out; how many were is logged."""
    error = "error"


@dataclass(kw_only=True)
class DataConfig:
    """The data of a run: files or hub names, how a row becomes tokens, and in which order.

    DataConfig(train="data/train.parquet", validation=["openai/gsm8k:main:test"],
    prompt_column="question", batch_size=128)
    """

    train: Any = "???"
    """A file, directory, glob or hub name, or a list of them, each also as {path: ..., weight:
    ...}. Files are .jsonl, .json, .parquet or .csv, compressed or not; a hub name is owner/name,
    owner/name:split or owner/name:config:split (the split is "train" where it is not named, and may
    be cut: train[:10]). What exists on disk is taken as a file. docs/data.md has a row of each."""
    validation: Any = None
    """The same for held-out prompts, without weights; null for none."""
    prompt_column: str = "prompt"
    """Text, or chat messages: a list of {role, content}, or that list as JSON text."""
    answer_column: str | None = "answer"
    """Given to the reward function as `answer`; null if there is none."""
    response_column: str = "response"
    """Demonstrations: the text that answers the prompt."""
    messages_column: str | None = None
    """Demonstrations: the column of whole conversations, in place of prompt and response; every
    assistant turn is learned."""
    chosen_column: str = "chosen"
    """Preference pairs: the better response to the prompt, as text or as a list of one
    assistant message."""
    rejected_column: str = "rejected"
    """Preference pairs: the worse response, in the same form."""
    chosen_safe_column: str = "chosen_safe"
    """Pairs of a cost model: whether the chosen response is safe (true or false)."""
    rejected_safe_column: str = "rejected_safe"
    """Pairs of a cost model: whether the rejected response is safe (true or false)."""
    images_column: str | None = "images"
    """Images of a row, one or a list, for models that see them: paths, or {bytes, path} as the hub has
    them. They take the places of {type: image} and <image> in the messages; null for none."""
    columns: list[str] | None = None
    """Further columns for the reward function, under their own names; null for all the others
    that the data has."""
    batch_size: int = 128
    """Prompts of one step, over all ranks. It need not divide anything: a batch goes on into the
    next epoch.
   """
    shuffle: bool = True
    """A new order in every epoch; false keeps the order of the files."""
    seed: int = 0
    """Decides the order of the rows, which depends on (seed, epoch) only."""
    max_prompt_tokens: int = 1024
    """Most tokens of a prompt; `overlong` says what becomes of longer ones."""
    max_tokens: int = 4096
    """Demonstrations and preference pairs: most tokens of a prompt with its (longer) response."""
    overlong: Overlong = Overlong.drop
    equal_pairs: EqualPairs = EqualPairs.drop
    remove_duplicates: bool = False
    """Leave out a row whose tokens and columns equal an earlier one's; how many were is logged."""
    pass_rate: list[float] | None = None
    """Keep the prompts of data.train that the policy passes with a rate from the first to the
    second number, such as [0.1, 0.9], as data.pass_rates says; null keeps all."""
    pass_rates: str | None = None
    """The pass_rates.jsonl that recipes.evaluate left of the same data."""
    text_as_user_message: bool = False
    """Make a text prompt the message of a user, for chat models; false continues the text as it
    stands."""
    chat_template: str | None = None
    """File with a Jinja chat template, for a tokenizer that has none or another one; the trained
    model is saved with it."""
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking: false; the trained model is saved
    with a template that has them as defaults."""
    date: str | None = None
    """Day, as 2026-11-27, that a chat template writes where it writes the day's date (Llama 3.2's);
    null: the day on which the run began."""
    tools_column: str | None = "tools"
    """Tools (JSON schemas, as a list or as JSON text) that the chat template is given, where the
    data has such a column; null for none."""

    pretraining: Any = None
    """Text of the pretraining distribution for PPO-ptx, places as in `train`; null for none."""
    pretraining_column: str = "text"
    """The column of `pretraining` that holds its text."""
    pretraining_batch_size: int = 64
    """Pieces of text in every step's update."""
    pretraining_tokens: int = 512
    """Longer texts are cut into pieces of at most this many tokens."""

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "max_prompt_tokens": 1,
            "max_tokens": 1,
            "pretraining_batch_size": 1,
            "pretraining_tokens": 4,
        }
        for name, value in vars(self).items():
            if value is not None and name in least and value < least[name]:
                raise ValueError(f"data.{name} is {value}; use at least {least[name]}")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"data.date is {self.date!r}; use a day as 2026-11-27") from None
        if isinstance(self.seed, int) and self.seed < 0:  # a text refers to the run's seed
            raise ValueError(f"data.seed is {self.seed}, its own or the run's seed; use 0 or more")
        for name in ("train", "validation", "pretraining"):
            if vars(self)[name] is not None or name == "train":
                places = sources(f"data.{name}", vars(self)[name])
                if name == "validation" and any(place.weight is not None for place in places):
                    raise ValueError(
                        f"data.validation is {self.validation}: every held-out row is used once, so that "
                        "nothing reads a weight; leave it out"
                    )
        self._check_pass_rate()
        taken = [
            name
            for name in (self.prompt_column, self.answer_column)
            if name in (self.columns or [])
        ]
        if taken:
            raise ValueError(
                f"data.columns has {taken[0]!r}, which is the prompt or the answer already; leave "
                "it out"
            )

    def _check_pass_rate(self) -> None:
        bounds = self.pass_rate
        if (bounds is None) != (self.pass_rates is None):
            raise ValueError(
                f"data.pass_rate is {bounds} and data.pass_rates is {self.pass_rates!r}; set both, "
                "the range and the file of recipes.evaluate, or neither"
            )
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1):
            raise ValueError(
                f"data.pass_rate is {bounds}; give the lowest and the highest rate, such as "
                "[0.1, 0.9]"
            )
