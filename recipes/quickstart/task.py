"""The quickstart's task: sort digits, smallest first. `Sort 40821` -> `01248`.

Every answer can be checked. The demonstrations are what makes it a task for reinforcement learning:
they are sorted well, but most of the long ones the wrong way round, as a preference that nobody
told the demonstrators. A model that imitates them *can* do what is wanted and mostly does not; a
reward tells it to. Leaves out anything that a model of a million parameters could not learn in
seconds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MOST_DIGITS = 8
MAX_RESPONSE_TOKENS = MOST_DIGITS + 2
"""A digit is a token; one for the end, one to see that a response is too long."""


@dataclass(kw_only=True)
class TaskConfig:
    num_train: int = 4096
    num_test: int = 256
    fewest_digits: int = 3
    longest_sure: int = 4
    """Demonstrations of up to this many digits are all in the wanted order."""
    wanted_fraction: float = 0.15
    """The share of the longer demonstrations that are in the wanted order."""


@dataclass(frozen=True, slots=True)
class Example:
    """Example(question="Sort 40821", answer="01248", demonstration="84210")"""

    question: str
    answer: str
    demonstration: str


def make_examples(config: TaskConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out), all questions different: distinct digits in any order, all numbers
    of digits equally often as far as there are enough questions."""
    random_ = random.Random(seed)
    examples: dict[str, Example] = {}
    while len(examples) < config.num_train + config.num_test:
        digits = random_.sample("0123456789", random_.randint(config.fewest_digits, MOST_DIGITS))
        answer = "".join(sorted(digits))
        ascending = len(digits) <= config.longest_sure or random_.random() < config.wanted_fraction
        question = "Sort " + "".join(digits)
        examples.setdefault(
            question, Example(question, answer, answer if ascending else answer[::-1])
        )
    ordered = list(examples.values())
    return ordered[: config.num_train], ordered[config.num_train :]


def write_parquet(examples: Sequence[Example], path: Path | str) -> None:
    """The columns that data.prompt_column and data.answer_column mean by default: `prompt`
    (chat messages) and `answer`."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    prompts, answers = [], []
    for example in examples:
        prompts.append([{"role": "user", "content": example.question}])
        answers.append(example.answer)
    rows = {"prompt": pa.array(prompts, pa.list_(message)), "answer": pa.array(answers)}
    pq.write_table(pa.table(rows), path)
