"""The recipes as Python functions: what `from hybridflow import open_session, run, ...` gives.

    settings = ["model.path=Qwen/Qwen2.5-0.5B", "data.train=train.parquet"]     # or {"model.path": ..., ...}
    outcome = run("grpo", settings, reward=my_function)
    numbers = evaluate({"model.path": "out", "data.validation": "test.parquet"}, reward=my_function)
    with open_session("grpo", settings, reward=my_function) as session: ...

Settings are those of the command line, under the same names and with the same checks; every mistake
is a ValueError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controllers.loop import Outcome
from hybridflow.tracing import to_mermaid
from recipes.config import RunConfig
from recipes.evaluate import evaluate as evaluate_run
from recipes.generate import generate as generate_run
from recipes.placing import place
from recipes.preparation import check_dataflow, dry_run_report, prepare
from recipes.python_settings import Scorer, Settings, make_settings
from recipes.run import run as run_recipe
from recipes.session import Session

QUIET = ("metrics.console=false",)
"""In front of a session's settings: whoever calls step() shows its numbers."""


def open_session(
    recipe: str,
    settings: Settings = (),
    *,
    reward: Scorer | None = None,
    cost: Scorer | None = None,
    gold: Scorer | None = None,
    environment: Any = None,
) -> Session:
    """Starts the recipe's models and returns when they stand; `with` or close() ends them.

    It goes on from the latest checkpoint in output_dir, if there is one (loop.resume). reward, cost
    and gold are functions or "package.module:name"; a lambda or a function of a notebook's cell
    will do. So is environment, or a class (docs/agents.md).
    """
    return Session(
        prepare(make_settings(recipe, settings, reward, cost, gold, environment, first=QUIET))
    )


def run(
    recipe: str,
    settings: Settings = (),
    *,
    reward: Scorer | None = None,
    cost: Scorer | None = None,
    gold: Scorer | None = None,
    environment: Any = None,
) -> Outcome:
    """The whole run, as `python -m recipes.<recipe>` does it."""
    outcome = run_recipe(
        _starting(make_settings(recipe, settings, reward, cost, gold, environment))
    )
    assert outcome is not None, "only graph and dry_run start nothing"
    return outcome


def evaluate(
    settings: Settings = (), *, reward: Scorer | None = None, environment: Any = None
) -> dict[str, float]:
    """Answers every prompt of data.validation and scores the answers: mean reward, pass@k,
    lengths. Leaves evaluation.json and samples.parquet in output_dir."""
    numbers = evaluate_run(
        _starting(make_settings("evaluate", settings, reward, environment=environment))
    )
    assert numbers is not None, "only graph and dry_run start nothing"
    return numbers


def generate(settings: Settings = ()) -> Path:
    """Answers every prompt of data.train and returns the parquet file of the responses."""
    path = generate_run(_starting(make_settings("generate", settings)))
    assert path is not None, "only graph and dry_run start nothing"
    return path


def dry_run(
    recipe: str,
    settings: Settings = (),
    *,
    reward: Scorer | None = None,
    cost: Scorer | None = None,
    gold: Scorer | None = None,
    environment: Any = None,
) -> str:
    """Checks everything that can be checked without a process, and says what would run where
    and in how many seconds."""
    return dry_run_report(prepare(make_settings(recipe, settings, reward, cost, gold, environment)))


def graph(recipe: str, settings: Settings = (), *, reward: Scorer | None = None) -> str:
    """The algorithm's dataflow as Mermaid text."""
    return to_mermaid(check_dataflow(place(make_settings(recipe, settings, reward))))


def _starting(config: RunConfig) -> RunConfig:
    for name, value in (("dry_run", config.dry_run), ("graph", config.graph)):
        if value:
            raise ValueError(f"{name}=true starts nothing; call hybridflow.{name}(...) instead")
    return config
