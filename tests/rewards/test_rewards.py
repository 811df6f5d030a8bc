"""Ready-made rewards: responses as models write them, each with the value that a reader gives
it."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridflow.errors import UserCodeError
from workers.reward_function import check_columns, score_rows
from workers.rewards import exact_match, length_penalty, matches, math, multiple_choice, number
from workers.rewards.combined import CombinedReward, RewardPart, combined
from workers.rewards.numbers import numbers_in


def value(reward: Any, response: str, **columns: Any) -> float:
    return float(reward(prompt="", response=response, finish_reason="stop", **columns))


NUMBERS = [
    # B76: written otherwise, and right
    (18, "$18.00", 1.0),
    (18, "18.0", 1.0),
    (18, "20-18", 1.0),
    (-18, "\u221218", 1.0),
    (18, "20 \u2212 2 = 18.", 1.0),
    ("steps #### 1,234", "So 1234.", 1.0),
    (0.5, "that is 1/2", 1.0),
    (-3, "x=-3", 1.0),
    (-3, "x = -3", 1.0),
    (18, "18 %", 1.0),
    (1000, "1e3", 1.0),
    (1234567, "1,234,567", 1.0),
    (18, "20 - 18", 1.0),
    (-7, "it fell from 5 to -7", 1.0),
    ("3/4", "The answer is 3/4.", 1.0),
    (4, "The answer is 3/4.", 0.0),
    (5.5, "5 1/2", 1.0),
    (0.5, "5 1/2", 0.0),
    (9, "20 18/2", 1.0),
    (2.5, "about 2\u00bd cups", 1.0),
    (0.75, r"$\frac{3}{4}$", 1.0),
    (-0.75, r"$\frac{-3}{4}$", 1.0),
    (4, r"$\dfrac{3}{4}$", 0.0),
    (3.5, r"3\frac{1}{2}", 1.0),
    (1234, r"1{,}234 and 1\,234", 1.0),
    (1234567, "12,34,567", 1.0),
    (1000, "1_000", 1.0),
    (1500, r"$1.5 \times 10^{3}$", 1.0),
    (3, "1.5 x 10^3", 0.0),
    (0.015, "1.5 * 10^-2", 1.0),
    (18, "The result:\n- 18", 1.0),
    (-18, "\u2212\u20b918", 1.0),
    (-18, r"-\$18", 1.0),
    (0.5, "9/18,000 or 500/1,000", 1.0),
    # exponents: a power is one number, a unit's exponent is none
    (100, "10^2", 1.0),
    (2, "10^2", 0.0),
    (1024, "$2^{10}$.", 1.0),
    (0.01, "10^{-2}", 1.0),
    (30000, "3\u00d710\u2074", 1.0),
    (12, "12 cm^2", 1.0),
    (12, r"\boxed{12\ \mathrm{m}^{2}}", 1.0),
    (12, r"12 \text{ cm}^2.", 1.0),
    ("18 m/s^2", "18", 1.0),
    ("18 m/s^2", "2", 0.0),
    (4, "x^2 = 4", 1.0),
    (0.5, r"\frac12", 1.0),
    # B76: another number, although digits agree
    (5, "18.5", 0.0),
    (18, "3/18", 0.0),
    (234, "1,234", 0.0),
    (18, "v18", 0.0),
    (18, "no number", 0.0),
    (18, "-18", 0.0),
    (18, "", 0.0),
]


@pytest.mark.parametrize(("answer", "response", "expected"), NUMBERS)
def test_numbers_are_read_as_a_person_reads_them(
    answer: object, response: str, expected: float
) -> None:
    assert value(number, response, answer=answer) == expected


@pytest.mark.parametrize("form", ["{}", "0.{}", "3/{}", "{}^9", "2^{}", "{} 1/2"])
def test_a_response_of_many_digits_is_a_wrong_answer_and_no_error(form: str) -> None:
    """What a policy that repeats itself writes: Python's int() refuses 4,301 digits."""
    assert value(number, form.format("7" * 5000), answer=18) == 0.0


def test_a_power_without_a_value_is_no_number() -> None:
    assert numbers_in("0^{-1}") == []


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_every_way_to_write_a_number_is_the_same_number(whole: int, decimals: int) -> None:
    for text in (f"{whole}", f"{whole:,}", f"{whole}." + "0" * decimals + "0"):
        assert numbers_in(f"= {text}.") == [Fraction(whole)]


def test_an_answer_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="answer is 'blue', which has no number"):
        value(number, "18", answer="blue")


def test_tolerance() -> None:
    assert value(number, "3.14", answer="3.14159", tolerance=0.01) == 1.0
    assert value(number, "3.14", answer="3.14159") == 0.0
    assert value(number, "1.3", answer=1, tolerance=0.3) == 1.0


MATHEMATICS = [
    ("1/2", r"so \boxed{\frac{1}{2}}", 1.0),
    (r"\frac{1}{2}", "0.5", 1.0),
    ("18", r"first \boxed{17}, no, \boxed{18}", 1.0),
    ("(1,2]", r"\boxed{(1,2]}", 1.0),
    (r"\sqrt{2}", r"$\frac{2}{\sqrt{2}}$", 1.0),
    ("10 cm", r"\boxed{10\text{ cm}}", 1.0),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
    ("x=3", r"\boxed{3}", 1.0),
    ("7", r"\boxed{8}", 0.0),
    ("(1,2]", r"\boxed{[1,2]}", 0.0),
    ("3", "", 0.0),
    # A reference answer is read as a whole.
    ("1, 2", r"\boxed{1,2}", 1.0),
    ("1, 2", r"\boxed{2}", 0.0),
    ("5:30", r"\boxed{5:30}", 1.0),
    ("5:30", r"\boxed{5}", 0.0),
    (r"3 \frac{1}{2}", r"\boxed{3\frac12}", 1.0),
    (r"3 \frac{1}{2}", r"\boxed{1/2}", 0.0),
    (r"0.\overline{3}", r"\boxed{0}", 0.0),
    ("1.5e3", r"\boxed{1500}", 1.0),
    ("1e-05", r"\boxed{1e-5}", 1.0),
    ("sqrt(2)", r"\boxed{\sqrt2}", 1.0),
    ("yes", r"\boxed{yes}", 1.0),
    ("yes", r"\boxed{no}", 0.0),
    (r"\$12.50", r"\boxed{12.5}", 1.0),
    ("$12.50", r"\boxed{\$12.50}", 1.0),
    ("so $x=2$", r"\boxed{2}", 1.0),
    (r"thus \boxed{2}", r"\boxed{2}", 1.0),
    (r"50\%", r"\boxed{50\%}", 1.0),
    ("50%", r"\boxed{50\%}", 1.0),
    ("50%", r"\boxed{0.5}", 1.0),
    ("50%", r"\boxed{0.5\%}", 0.0),
    ("0.5", r"\boxed{50%}", 1.0),
    ("50%", "50%", 1.0),
]


def test_an_expression_without_end_is_a_wrong_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the run nor the next response waits for it."""
    with caplog.at_level("WARNING"):
        assert value(math, r"\boxed{9^{9^{9^9}}}", answer="2") == 0.0
    assert "takes over 3 s of processor time" in caplog.text
    assert value(math, r"\boxed{2}", answer="2") == 1.0


def test_an_answer_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="whose value takes over 3 s of processor time"):
        value(math, r"\boxed{2}", answer="9^{9^{9^9}}")


@pytest.mark.parametrize(("answer", "response", "expected"), MATHEMATICS)
def test_mathematics(answer: str, response: str, expected: float) -> None:
    assert value(math, response, answer=answer) == expected


CHOICES = [
    ("B", "The answer is (B).", 1.0),
    (1, "B", 1.0),
    ("b", r"\boxed{B}", 1.0),
    ("(D)", "D", 1.0),
    ("C", "Answer: **C**", 1.0),
    ("B", "A looks right, but option b is", 1.0),
    ("A", "A cat is B", 0.0),
    ("B", "<answer>B</answer>", 1.0),
    ("B", "<answer> b </answer>", 1.0),
    ("B", "**Answer**: B. I hope it helps.", 1.0),
    ("B", r"\boxed{\textbf{(B)}\ 12}", 1.0),
    ("B", r"\boxed{\mathrm{B}}", 1.0),
    ("B", r"\boxed{B. Paris}", 1.0),
    ("B", "The answer is $B$.", 1.0),
    ("B", "B. I am confident.", 1.0),
    ("B", "B. A cat is an animal", 1.0),
    ("B", "The answer is a bit hard to see: B", 1.0),
    ("B", "The answer is B, but option C is good as well", 1.0),
    ("B", "The answer is not A but B", 1.0),
    ("A", "B is wrong, so A is right", 1.0),
    ("I", "The answer is (I)", 1.0),
    ("B", "b", 1.0),
    ("B", "b) Paris", 1.0),
    ("B", "it is (b)", 1.0),
    ("B", "'B'", 1.0),
    ("B", "Plan B's goal", 0.0),
    ("B", "P(B) is 3", 0.0),
    ("A", "none of them", 0.0),
]


@pytest.mark.parametrize(("answer", "response", "expected"), CHOICES)
def test_choices(answer: object, response: str, expected: float) -> None:
    assert value(multiple_choice, response, answer=answer) == expected


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        (1, ["4", "5", "6", "7"], "B"),  # MMLU
        (3, ["a cat", "a dog", "an ant", "a bee"], "D"),
        ("C", {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "C"),  # ARC
        ("b", "ABC", "B"),
        (1, None, "B"),
        (1.0, None, "B"),
    ],
)
def test_choices_of_a_column(answer: object, choices: Any, right: str) -> None:
    for letter in "ABCD":
        scored = score_rows(
            "workers.rewards:multiple_choice",
            [row(response=f"The answer is ({letter}).", answer=answer, choices=choices)],
        )
        assert scored == [(float(letter == right), {})]


@pytest.mark.parametrize("choices", [[], {"label": ["1", "2"]}, {"text": ["x"]}, "", ["x"] * 27])
def test_choices_without_letters_are_refused(choices: Any) -> None:
    with pytest.raises(UserCodeError, match=r"choices is .*; give capital letters, a list of"):
        score_rows("workers.rewards:multiple_choice", [row(answer=0, choices=choices)])


def test_a_column_called_self() -> None:
    reward = CombinedReward({"correct": (number, 1.0, {})})
    assert score_rows(reward, [row(answer=4, response="4") | {"self": 1}]) == [
        (1.0, {"correct": 1.0})
    ]


def test_a_choice_that_is_none_is_an_error() -> None:
    for answer in ("yes", 10, "AB"):
        with pytest.raises(ValueError, match="answer is"):
            value(multiple_choice, "A", answer=answer)


def test_texts() -> None:
    assert value(exact_match, " Paris\n", answer="paris") == 1.0
    assert value(exact_match, "Paris", answer="paris", ignore_case=False) == 0.0
    assert value(exact_match, "18", answer=18.0) == value(exact_match, "18.0", answer=18.0) == 1.0
    assert value(exact_match, "Paris!", answer=["Rome", "Paris"], ignore_punctuation=True) == 1.0
    pattern = "<think>.*</think><answer>.*</answer>"
    assert value(matches, "<think>a\nb</think><answer>c</answer>\n", pattern=pattern) == 1.0
    assert value(matches, "x <answer>c</answer>", pattern="<answer>.*</answer>") == 0.0
    assert value(matches, "x <answer>c</answer>", pattern="<answer>.*</answer>", whole=False) == 1.0
    with pytest.raises(ValueError, match="no regular expression"):
        value(matches, "x", pattern="(")
    lengths = [
        value(length_penalty, "w " * count, free_words=2, most_words=4) for count in (1, 2, 3, 4, 9)
    ]
    assert lengths == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert length_penalty("", "w", finish_reason="length") == -1.0


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p", "response": "4", "finish_reason": "stop", **columns}


async def slow(*, response: str, **columns: Any) -> float:
    await asyncio.sleep(0.01)
    return float(response)


def detailed(*, response: str, **columns: Any) -> dict[str, float]:
    return {"reward": 2.0, "detail": 5.0}


def test_parts_are_weighed_and_logged_by_their_names() -> None:
    parts = {
        "correct": RewardPart(function="workers.rewards:number"),
        "form": RewardPart(
            function="workers.rewards:matches", weight=0.5, options={"pattern": "[0-9]"}
        ),
        "slow": RewardPart(function="tests.rewards.test_rewards:slow", weight=0.25),
        "deep": RewardPart(function="tests.rewards.test_rewards:detailed", weight=-1.0),
    }
    ((total, numbers),) = score_rows(combined(parts, "reward"), [row(answer=4)])
    assert total == 1.0 + 0.5 + 0.25 * 4.0 - 2.0
    assert numbers == {"correct": 1.0, "form": 1.0, "slow": 4.0, "deep": 2.0, "deep_detail": 5.0}


def test_parts_that_do_not_fit_are_named() -> None:
    reward = CombinedReward({"correct": (number, 1.0, {})})
    check_columns(reward, ["answer"], "reward")
    with pytest.raises(ValueError, match=r"reward.parts.correct does not fit the data .*'answer'"):
        check_columns(reward, ["question"], "reward")
    with pytest.raises(ValueError, match=r"reward.parts.x.function=.*mistyped"):
        combined({"x": RewardPart(function="workers.rewards:mistyped")}, "reward")


def test_coroutines_run_side_by_side_and_name_their_row() -> None:
    """B73: async def is awaited, also where a loop runs already."""
    assert score_rows(slow, [row(), row(response="5")]) == [(4.0, {}), (5.0, {})]

    async def inside() -> Any:
        return score_rows(slow, [row()])

    assert asyncio.run(inside()) == [(4.0, {})]

    async def fails(**columns: Any) -> float:
        raise KeyError("gone")

    with pytest.raises(RuntimeError, match="raised KeyError: 'gone' on prompt 'p'"):
        score_rows(fails, [row()])


def test_truth_values_and_numpy_numbers_are_numbers() -> None:
    """B73: np.bool_ where bool is taken."""
    for result in (True, np.bool_(True), np.float32(1.0), np.int64(1), Fraction(1)):
        assert score_rows(lambda result=result, **_: result, [row()]) == [(1.0, {})]


@pytest.mark.parametrize(
    "result", [1e39, -1e39, 10**400, float("inf"), float("nan"), "1.0", None, [1.0]]
)
def test_what_float32_can_not_hold_is_refused(result: object) -> None:
    """B70: 1e39 became inf on its way, 10**400 an OverflowError."""
    with pytest.raises(ValueError, match=r"returned reward=.* return finite numbers"):
        score_rows(lambda **_: result, [row()])


def test_the_names_of_the_rewards_own_statistics_are_taken() -> None:
    """B74: reward/mean was logged as the function's `mean`."""
    with pytest.raises(ValueError, match=r"returned 'mean'.*reward/mean.*another name"):
        score_rows(lambda **_: {"reward": 1.0, "mean": 7.0}, [row()])
