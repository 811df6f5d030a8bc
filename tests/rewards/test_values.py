"""B70, B73, B74 and their kind: what a reward function may return."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from workers.reward_function import score_rows
from workers.rewards.combined import RewardPart, combined

ROW = {"prompt": "the prompt", "response": "the response", "finish_reason": "stop"}


def returns(value: Any) -> Any:
    return score_rows(lambda **columns: value, [ROW])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (np.bool_(False), 0.0),
        (np.float16(0.5), 0.5),
        (np.float16(2), 2.0),
        (np.int64(3), 3.0),
        (np.array(2.5), 2.5),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(True), 1.0),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 4), 0.25),
        (3.4e38, 3.4e38),
        (10**38, 1e38),
    ],
)
def test_b73_numbers_of_every_kind(value: Any, expected: float) -> None:
    assert returns(value) == [(expected, {})]
    assert returns({"reward": 0, "further": value}) == [(0.0, {"further": expected})]


@pytest.mark.parametrize(
    "value",
    [
        *(1e39, -1e39, 10**400, float("inf"), float("nan"), Decimal("nan"), Decimal("1e400")),
        *("1.0", None, 1j, [1.0], (1.0,), np.array([1.0]), torch.tensor([1.0]), object()),
        *(np.float16("inf"), np.float16("-inf"), np.float32("inf")),
        *(np.float64("nan"), torch.tensor(float("inf")), Fraction(10**60), b"1"),
    ],
)
def test_b70_everything_else_is_one_line_that_names_the_row(value: Any) -> None:
    for result in (value, {"reward": 1.0, "further": value}):
        with pytest.raises(ValueError, match=r"returned (reward|further)=.* 'the prompt'") as error:
            returns(result)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["mean", "std", "max", "min", "unreadable"])
def test_b74_names_of_the_rewards_own_statistics(name: str) -> None:
    with pytest.raises(ValueError, match=f"returned '{name}', the name of one of the reward's own"):
        returns({"reward": 1.0, name: 7.0})
    with pytest.raises(ValueError, match=rf"^reward\.parts\.{name}: .*another name"):
        combined({name: RewardPart(function="workers.rewards:number")}, "reward")


def test_a_dictionarys_keys() -> None:
    with pytest.raises(ValueError, match=r"without 'reward' \(\['score', 3\]\)"):
        returns({"score": 1.0, 3: 1.0})
    with pytest.raises(ValueError, match="names that are text"):
        returns({"reward": 1.0, 3: 1.0})


def test_parts_of_every_role() -> None:
    part = RewardPart(function="workers.rewards:matches", weight=2.0, options={"pattern": ".*"})
    assert score_rows(combined({"form": part}, "cost"), [ROW], "cost") == [(2.0, {"form": 1.0})]
    assert score_rows(combined({"form": part}, "gold"), [ROW]) == [(2.0, {"form": 1.0})]
    with pytest.raises(ValueError, match=r"^gold\.parts\.reward: .*another name"):
        combined({"reward": part}, "gold")
    with pytest.raises(ValueError, match=r"weight is nan"):
        combined({"a": RewardPart(function="workers.rewards:number", weight=float("nan"))}, "gold")
    nothing = RewardPart(function="tests.rewards.test_values:nothing")
    with pytest.raises(RuntimeError, match=r"reward\.parts\.a returned None; .*'the prompt'"):
        score_rows(combined({"a": nothing}, "reward"), [ROW])


def nothing(**columns: object) -> None:
    return None
