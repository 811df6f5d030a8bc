"""The pipeline's data: demonstrations, preference pairs that a known rule made, and prompts.
Everything a user would bring, in parquet.

Demonstrations are the quickstart's: most of the long ones are sorted the wrong way round. Pairs
compare two attempts at a question (right, reversed, shuffled, a digit lost or doubled), and the
rule says which is better; the reward model is shown nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.quickstart.task import Example, TaskConfig, make_examples, write_parquet
from recipes.rlhf.rule import rule
from workers.quiet import quiet

NUM_PAIRS = 8192
NUM_HELD_OUT_PAIRS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Where prepare() left things."""

    model: Path
    """A model with random weights, its tokenizer and chat template."""
    demonstrations: Path
    held_out_demonstrations: Path
    pairs: Path
    held_out_pairs: Path
    prompts: Path
    held_out_prompts: Path


def prepare(directory: Path, seed: int = 0) -> Prepared:
    """Takes a second."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{name}.parquet" for name in Prepared.__annotations__}
    paths = Prepared(**{**files, "model": directory / "model"})
    tokenizer = make_tokenizer()
    with quiet():
        make_model(tokenizer, ModelShape(), seed).save_pretrained(paths.model)
    tokenizer.save_pretrained(paths.model)
    train, test = make_examples(TaskConfig(), seed)
    for examples, demonstrations, prompts in (
        (train, paths.demonstrations, paths.prompts),
        (test, paths.held_out_demonstrations, paths.held_out_prompts),
    ):
        rows = []
        for example in examples:
            rows.append({"prompt": chat(example), "response": example.demonstration})
        write(demonstrations, rows)
        write_parquet(examples, prompts)
    rng = random.Random(seed)
    write(paths.pairs, make_pairs(train, NUM_PAIRS, rng))
    write(paths.held_out_pairs, make_pairs(test, NUM_HELD_OUT_PAIRS, rng))
    return paths


def make_pairs(
    examples: Sequence[Example], number: int, rng: random.Random
) -> list[dict[str, Any]]:
    """prompt, chosen, rejected: two attempts at one question that the rule does not find
    equally good."""
    pairs: list[dict[str, Any]] = []
    while len(pairs) < number:
        example = rng.choice(examples)
        scores = {}
        for _ in range(2):
            attempt = rng.choice(ATTEMPTS)(example.answer, rng)
            scores[attempt] = rule(example.answer, attempt)
        worse, better = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
        if scores[worse] < scores[better]:
            pairs.append({"prompt": chat(example), "chosen": better, "rejected": worse})
    return pairs


def _swapped(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer) - 1)
    return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]


def _shuffled(answer: str, rng: random.Random) -> str:
    return "".join(rng.sample(answer, len(answer)))


def _lost(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place + 1 :]


def _doubled(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    return answer[:place] + answer[place] + answer[place:]


ATTEMPTS: list[Callable[[str, random.Random], str]] = [
    lambda answer, rng: answer,
    lambda answer, rng: answer[::-1],
    _swapped,
    _shuffled,
    _lost,
    _doubled,
]


def chat(example: Example) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.question}]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)
