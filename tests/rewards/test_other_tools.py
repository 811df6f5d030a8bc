"""Reward functions with the signatures of verl, TRL and OpenRLHF: refused in one line, whose function
gives what the original gives when it is called as its own tool calls it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.reward_function import check_columns, resolve, score_rows
from workers.rewards.combined import CombinedReward

ROW: dict[str, Any] = {
    "prompt": "2 + 2 =",
    "response": "it is 4",
    "finish_reason": "stop",
    "answer": "4",
    "data_source": "openai/gsm8k",
    "extra_info": {"index": 3},
    "level": 5,
}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> float:
    assert data_source == "openai/gsm8k" and extra_info == {"index": 3}
    return float(solution_str.endswith(ground_truth)) / 2


def compute_score_of_two(solution_str: str, ground_truth: str, method: str = "strict") -> float:
    assert method == "strict"
    return float(solution_str.endswith(ground_truth)) / 4


def compute_score_with_rest(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> float:
    assert not kwargs
    return compute_score(data_source, solution_str, ground_truth, extra_info)


def compute_batch(
    data_sources: list[str], solution_strs: list[str], ground_truths: list[str], extra_infos: Any
) -> list[float]:
    return list(map(compute_score, data_sources, solution_strs, ground_truths, extra_infos))


def of_trl(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    assert prompts == ["2 + 2 ="]
    assert kwargs["level"] == [5]
    return [
        0.0 + text.endswith(end) for text, end in zip(completions, kwargs["answer"], strict=True)
    ]


def of_trl_by_name(completions: list[str], level: list[int], **kwargs: Any) -> list[float]:
    return [len(text) / number for text, number in zip(completions, level, strict=True)]


def of_openrlhf(queries: list[str], prompts: list[str], labels: list[str]) -> list[float]:
    texts = [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]
    return [len(text) * float(label) for text, label in zip(texts, labels, strict=True)]


def of_trl_in_one_piece(**kwargs: Any) -> list[float]:
    return [float(len(text)) for text in kwargs["completions"]]


def of_verl_in_one_piece(**kwargs: Any) -> float:
    return kwargs["solution_str"].endswith(kwargs["ground_truth"]) / 8


FUNCTIONS: list[tuple[Callable[..., Any], str, float]] = [
    (compute_score, "verl", 0.5),
    (compute_score_of_two, "verl", 0.25),
    (compute_score_with_rest, "verl", 0.5),
    (compute_batch, "verl", 0.5),
    (of_trl, "TRL", 1.0),
    (of_trl_by_name, "TRL", 7 / 5),
    (of_openrlhf, "OpenRLHF", 28.0),
    (of_trl_in_one_piece, "TRL", 7.0),
    (of_verl_in_one_piece, "verl", 0.125),
]


@pytest.mark.parametrize(("function", "owner", "score"), FUNCTIONS)
def test_the_line_has_a_function_that_calls_it(
    function: Callable[..., Any], owner: str, score: float
) -> None:
    columns = ROW.keys() - {"prompt", "response", "finish_reason"}
    path = f"{function.__module__}:{function.__name__}"
    with pytest.raises(ValueError, match=f"^reward.function='{path}' has {owner}'s") as error:
        check_columns(path, columns, "reward")
    names: dict[str, Any] = {function.__name__: function}
    written = str(error.value).partition("calls it: ")[2]
    exec(written, names)  # what a user would paste
    assert score_rows(resolve(names["reward"]), [ROW]) == [(score, {})]
    parts = CombinedReward({"old": (function, 1.0, {})})
    with pytest.raises(
        ValueError, match=rf"^reward.parts.old.function has .*{re.escape(written)}$"
    ):
        check_columns(parts, columns, "reward")


def test_the_functions_of_the_page() -> None:
    """docs/coming_from.md: the same scores, also of verl's dictionaries."""
    page = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {
        "compute_score": compute_score,
        "accuracy_reward": of_trl,
        "reward_func": of_openrlhf,
    }
    exec(block, names)
    scores = {name: score_rows(names[name], [ROW])[0][0] for name in WRITTEN}
    assert scores == WRITTEN
    names["compute_score"] = lambda *values: {"score": compute_score(*values), "acc": True}
    assert score_rows(names["of_verl"], [ROW]) == [(0.5, {})]


WRITTEN = {"of_verl": 0.5, "of_trl": 1.0, "of_openrlhf": 28.0}


def test_columns_of_the_data_are_nobody_elses() -> None:
    def own(completions: int, **columns: Any) -> float:
        return float(completions)

    check_columns(own, ["completions"], "reward")
    assert score_rows(own, [ROW | {"completions": 2}]) == [(2.0, {})]


def test_a_function_of_several_tools_is_left_alone() -> None:
    def asks(**columns: Any) -> float:
        if "completions" in columns:
            return float(len(columns["completions"][0]))
        return float(len(columns.get("queries") or columns["response"]))

    check_columns(asks, ["answer"], "reward")
    assert score_rows(asks, [ROW]) == [(float(len(ROW["response"])), {})]
