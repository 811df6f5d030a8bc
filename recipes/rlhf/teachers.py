"""A teacher and a judge for the quickstart's task, each trained in seconds: what a larger model is
in real life.

    python -m recipes.rlhf.teachers --directory outputs/teachers

The teacher sorts. The judge reads `Sort 40821=01248` as a user's message and answers y or n; it was
shown the attempts that the preference pairs of data.py are made of.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.quickstart.task import Example, TaskConfig, make_examples
from recipes.quickstart.warm_start import WarmStartConfig, greedy_accuracy, warm_start
from recipes.rlhf.data import ATTEMPTS
from workers.quiet import quiet

JUDGEMENT = "{question}={attempt}"
JUDGE_SETTINGS = [
    "judge.template='{prompt}={response}'",
    "judge.yes=y",
    "judge.no=n",
    "judge.train.precision=fp32",
]
"""How a recipe asks this judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teachers:
    teacher: Path
    teacher_accuracy: float
    """Greedy, on held-out questions."""
    judge: Path
    judge_accuracy: float
    """The share of right verdicts on held-out attempts, half of which are right answers."""


def prepare_teachers(directory: Path, seed: int = 0) -> Teachers:
    """Half a minute on one core."""
    train, test = make_examples(TaskConfig(), seed)
    rng = random.Random(seed)
    to_train, to_test = _judgements(train, rng), _judgements(test, rng)
    teacher = _train(directory / "teacher", _direct(train), _direct(test), WarmStartConfig(), seed)
    judge = _train(directory / "judge", to_train, to_test, WarmStartConfig(num_steps=400), seed)
    return Teachers(
        teacher=directory / "teacher",
        teacher_accuracy=teacher,
        judge=directory / "judge",
        judge_accuracy=judge,
    )


def _direct(examples: Sequence[Example]) -> list[Example]:
    """The questions, demonstrated by their answers alone."""
    return [replace(example, demonstration=example.answer) for example in examples]


def _judgements(examples: Sequence[Example], rng: random.Random) -> list[Example]:
    """Four attempts at each question to judge."""
    judgements = []
    for example in examples:
        judgements += [judgement(example, rng) for _ in range(4)]
    return judgements


def judgement(example: Example, rng: random.Random) -> Example:
    """A question about an attempt, right ones and others equally often; its answer is y or n."""
    attempt = example.answer if rng.random() < 0.5 else rng.choice(ATTEMPTS)(example.answer, rng)
    verdict = "y" if attempt == example.answer else "n"
    return Example(JUDGEMENT.format(question=example.question, attempt=attempt), verdict, verdict)


def _train(
    directory: Path,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    config: WarmStartConfig,
    seed: int,
) -> float:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, ModelShape(), seed)
    warm_start(model, tokenizer, examples, config, seed)
    with quiet():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return greedy_accuracy(model, tokenizer, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("outputs/teachers"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    teachers = prepare_teachers(arguments.directory, arguments.seed)
    print(
        f"teacher {teachers.teacher}: {teachers.teacher_accuracy:.1%} right; judge {teachers.judge}: "
        f"{teachers.judge_accuracy:.1%} of verdicts right"
    )


if __name__ == "__main__":
    main()
