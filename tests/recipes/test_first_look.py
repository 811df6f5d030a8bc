"""What a newcomer sees first: --help, the list of recipes, a seed that is too large (issue 10, tried
by a stranger, C, D and E)."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

import cluster.__main__
import recipes.quickstart.__main__
import recipes.rlhf.__main__
from controllers import algorithm_entry
from hybridflow.metrics.console import ConsoleSink
from recipes.composing import packaged_recipes
from recipes.python_settings import make_settings
from recipes.usage import summary

MAINS: dict[str, Callable[[], None]] = {
    "cluster": cluster.__main__.main,
    "recipes.quickstart": recipes.quickstart.__main__.main,
    "recipes.rlhf": recipes.rlhf.__main__.main,
}


@pytest.mark.parametrize("name", MAINS)
def test_help_names_the_command_and_starts_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        MAINS[name]()
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")


def test_no_two_recipes_have_the_same_summary() -> None:
    recipes_of: dict[str, str] = {}
    for name in packaged_recipes():
        text = summary(algorithm_entry(name))
        assert text not in recipes_of, f"{name} and {recipes_of[text]}"
        recipes_of[text] = name


@pytest.mark.parametrize(("name", "value"), [("seed", 2**70), ("actor.seed", 2**63), ("seed", -1)])
def test_a_seed_that_no_library_takes(name: str, value: int) -> None:
    settings = {
        "model.path": "m",
        "data.train": "t.jsonl",
        "reward.function": "tests.tiny:by_length",
    }
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        make_settings("grpo", {**settings, name: value})


def test_a_summary_leaves_out_what_the_run_does_not_have() -> None:
    """I: a run without validation has no reward before and after."""
    out = io.StringIO()
    console = ConsoleSink([], 1, 0, Console(file=out, width=60))
    console.summary({"num_steps": 1, "reward_before": None})
    assert "num_steps" in out.getvalue() and "reward_before" not in out.getvalue()
