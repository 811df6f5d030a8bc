"""Samples: what a model answered and how that was scored, as text for people.

Chosen and decoded elsewhere (controllers/samples.py); here is their form, which every sink shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

TEXT_FIELDS = ("prompt", "response")


@dataclass(kw_only=True)
class SamplesConfig:
    """How many of the model's responses are shown, with prompt and reward: all of them in
    samples.jsonl, Weights & Biases and TensorBoard, one in the console. The same seed shows the
    same prompts."""

    validation: int = 4
    """Responses of each validation; 0: none."""
    train: int = 2
    """Responses of a training step that shows any."""
    train_every: int = 10
    """Training steps between those that show responses; 0: none does."""

    def __post_init__(self) -> None:
        values = {
            "validation": self.validation,
            "train": self.train,
            "train_every": self.train_every,
        }
        for name, value in values.items():
            if value < 0:
                raise ValueError(f"metrics.samples.{name} is {value}; use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Sample(prompt="2+3=", response="5", finish_reason="stop", weight_version=4, uid=17,
    scores={"reward": 1.0, "reward/format": 1.0})"""

    prompt: str
    response: str
    finish_reason: str
    weight_version: int
    """Version of the weights that answered."""
    uid: int
    """Number of the prompt's use: dataset row + epoch * rows."""
    scores: Mapping[str, float] = field(default_factory=dict)
    turns: Sequence[Mapping[str, object]] = ()
    """The response of an episode in its parts: {"role": "policy" or "environment", "text": ...} and
    what is known of each (reward, num_tokens, calls, seconds); empty for a single response."""

    def fields(self) -> dict[str, object]:
        """Flat, texts first, every score under its own name."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            **self.scores,
            "finish_reason": self.finish_reason,
            "weight_version": self.weight_version,
            "uid": self.uid,
        }

    def record(self) -> dict[str, object]:
        """The fields and, of an episode, its turns."""
        if not self.turns:
            return self.fields()
        return self.fields() | {"turns": list(self.turns)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRows:
    """The samples of one validation or training step."""

    step: int
    split: str
    time_s: float
    """Seconds since the epoch."""
    samples: Sequence[Sample]

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Column names and rows; None where a sample lacks a score that another one has."""
        rows = [sample.fields() for sample in self.samples]
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        return names, [list(map(row.get, names)) for row in rows]


def shorten(text: str, num_characters: int) -> str:
    """`text` without surrounding blanks; of a longer one its beginning and its end."""
    text = text.strip()
    if len(text) <= num_characters:
        return text
    half = (num_characters - 5) // 2
    return f"{text[:half].rstrip()} [...] {text[-half:].lstrip()}"
