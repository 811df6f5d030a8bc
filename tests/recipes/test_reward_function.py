"""Reward functions at their edges: what a bad one does is an error with its name and the row,
never a reward of 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from hybridflow.errors import UserCodeError
from workers.reward_function import resolve, score_rows

HERE = "tests.recipes.rewards"


def row(response: str = "good", **columns: Any) -> dict[str, Any]:
    return {
        "prompt": "2 + 2 =",
        "response": response,
        "finish_reason": "stop",
        "answer": "4",
        **columns,
    }


def test_a_number_or_a_dict_is_taken() -> None:
    assert score_rows(f"{HERE}:plain", [row("four"), row("4")]) == [(4.0, {}), (1.0, {})]
    assert score_rows(f"{HERE}:with_numbers", [row("four")]) == [(0.5, {"length": 4.0})]
    assert score_rows(f"{HERE}:named", [row("4"), row("5")]) == [(1.0, {}), (0.0, {})]
    assert score_rows(f"{HERE}:plain", []) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.recipes.rewards.plain", "write it as package.module:name"),
        (f"{HERE}:", "write it as package.module:name"),
        (
            "no.such.module:f",
            "module 'no.such.module' can't be imported .* importable on every node",
        ),
        (f"{HERE}:mistyped", "tests.recipes.rewards has no 'mistyped'; name what the"),
        (f"{HERE}:plian", "has no 'plian'; did you mean tests.recipes.rewards:plain?"),
        (f"{HERE}:not_callable", "is an int, not a function; give one"),
        (f"{HERE}:no_columns", r"takes no finish_reason; let it end in \*\*columns"),
    ],
)
def test_a_wrong_path_is_found_before_any_row(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward.function='{path}'.*{message}"):
        resolve(path)


def test_what_it_raises_comes_with_the_row() -> None:
    with pytest.raises(
        RuntimeError, match=r"raises' raised TypeError: .* on prompt '2 \+ 2 =', response 'good'"
    ) as caught:
        score_rows(f"{HERE}:raises", [row()])
    assert isinstance(caught.value.__cause__, TypeError)


async def leaves(**columns: object) -> float:
    sys.exit(0)


@pytest.mark.parametrize("function", [lambda **columns: sys.exit(0), leaves])
def test_a_function_that_exits_ends_no_run_as_if_it_were_done(
    function: Callable[..., Any],
) -> None:
    with pytest.raises(UserCodeError, match=r"raised SystemExit: 0 on prompt '2 \+ 2 ='"):
        score_rows(function, [row(), row()])


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [
        (
            "not_a_number",
            "bad",
            "returned reward=nan on prompt .*response 'bad'; return finite numbers",
        ),
        ("infinite_detail", "x", "returned ratio=inf"),
        ("nothing", "x", "returned reward=None"),
        ("text", "x", "returned reward='1.0'"),
        ("without_reward", "x", r"returned a dict without 'reward' \(\['score'\]\)"),
    ],
)
def test_what_is_no_finite_number_stops_the_run(name: str, response: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_rows(
            f"{HERE}:{name}",
            [row("good") if name == "not_a_number" else row(response), row(response)],
        )


@pytest.mark.parametrize("name", ["\ud800", "a\nb", 3])
def test_a_number_of_no_printable_name_stops_the_run(name: Any) -> None:
    """Metrics are written by it."""
    with pytest.raises(
        ValueError, match=r"returned .*=1.0 on prompt .* names that are text"
    ) as error:
        score_rows(lambda **columns: {"reward": 0.0, name: 1.0}, [row()])
    assert str(error.value).isprintable()


def test_a_long_response_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError) as caught:
        score_rows(f"{HERE}:nothing", [row("x" * 10_000)])
    assert len(str(caught.value)) < 500
