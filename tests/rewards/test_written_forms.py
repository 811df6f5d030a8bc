r"""Mathematics as people and models write it, each pair with the value that a reader gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.python_api import dry_run
from tests.rewards.test_rewards import value
from tests.tiny import tiny_grpo
from workers.rewards import math, multiple_choice, number
from workers.rewards.answers import check_answers
from workers.rewards.combined import CombinedReward

EQUAL = [
    # degrees, roots, powers and fractions as characters
    (r"30^\circ", "30\u00b0"),
    ("30\u00b0", r"30^{\circ}"),
    ("2\u221a2", r"2\sqrt{2}"),
    ("\u221a3/2", r"\frac{\sqrt3}{2}"),
    ("\u221a(2+1)", r"\sqrt3"),
    ("x\u00b2", "x^2"),
    ("3\u00d710\u00b2", "300"),
    ("\u00bd", "0.5"),
    ("3\u00bd", "3.5"),
    ("3 \u00bd", r"\frac{7}{2}"),
    ("-3", "\u22123"),
    ("1\u2264x\u22642", r"1 \le x \le 2"),
    ("\u03c0", r"\pi"),
    ("2 pi", r"2\pi"),
    # mixed numbers, groups of digits, repeating and scientific ones
    ("2 1/2", "5/2"),
    ("-2 1/2", "-2.5"),
    ("1234567", r"1\,234\,567"),
    ("1 000 000", "1000000"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"-2.\overline{3}", "-7/3"),
    (r"6.02\times 10^{23}", "6.02e23"),
    (r"2\times10^{-3}", "0.002"),
    ("10,20,300", "10, 20, 300"),
    ("1.5", "1,5"),
    ("0.25", "0,25"),
    ("1500", "1,500"),
    # units and currencies
    ("10 m^2", "10"),
    ("10 m^2", r"10\text{ m}^2"),
    ("10 cm", "10 centimeters"),
    ("60 km/h", r"60 \text{ km/h}"),
    ("$5.00", "5 dollars"),
    ("5 apples", "5"),
    ("\u20ac5", "5"),
    # words around the value
    ("3", r"\text{The answer is }3"),
    ("3", r"\boxed{3}"),
]
DIFFERENT = [
    ("10 cm", "10 m"),
    ("10 m^2", "10 m^3"),
    ("5 dollars", "5 cents"),
    ("5 apples", "6 apples"),
    ("2 x", "2"),
    ("3 a", "3"),
    ("2 pi", "2"),
    ("1,2", "1.2"),
    ("2", "1,2"),
    ("1.5", "1,500"),
    ("25", "0,25"),
    ("12", "1 2"),
    ("3 1/4", "3/4"),
    ("10,20,300", "1020300"),
    (r"2\times 10^3", r"2\times 10^4"),
    ("90\u00b0", r"\frac{\pi}{2}"),
    (r"\pm2", "2"),
    (r"\{1,2\}", r"\{1,3\}"),
]


@pytest.mark.parametrize(("answer", "boxed"), EQUAL)
def test_the_same_value(answer: str, boxed: str) -> None:
    assert value(math, rf"so \boxed{{{boxed}}}.", answer=answer) == 1.0


@pytest.mark.parametrize(("answer", "boxed"), DIFFERENT)
def test_another_value(answer: str, boxed: str) -> None:
    assert value(math, rf"so \boxed{{{boxed}}}.", answer=answer) == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>7?</think><answer> 5 </answer>", 1.0),
        ("<answer>7</answer> so 5", 0.0),
        (r"<answer>$\frac{10}{2}$</answer>", 1.0),
        (r"\fbox{5}", 1.0),
        ("The answer is \u22125.", 0.0),
    ],
)
def test_the_final_answer_is_found(response: str, expected: float) -> None:
    assert value(math, response, answer="5") == expected


def test_a_list_of_numbers_may_look_like_groups_of_digits() -> None:
    """10,20,300 is one number in India, and three elsewhere."""
    assert value(number, "so 10,20,300", answer=300) == 1.0
    assert value(number, "so 10,20,300", answer=1020300) == 1.0
    assert value(number, "so 10,20,300", answer=20) == 0.0
    assert value(number, "so 1,020,300", answer=300) == 0.0


def test_answers_that_a_reward_can_not_read_are_counted() -> None:
    rows = [
        ("a.jsonl, line 1", {"answer": "3/4"}),
        ("a.jsonl, line 2", {"answer": "???"}),
        ("a.jsonl, line 3", {"answer": "18"}),
        ("a.jsonl, line 4", {"answer": ""}),
    ]
    with pytest.raises(
        ValueError, match=r"data.train: a.jsonl, line 4: workers.rewards:math: .*1 of 4"
    ):
        check_answers(math, rows, "data.train")
    with pytest.raises(ValueError, match=r"line 2: workers.rewards:number: .*which has no number"):
        check_answers(CombinedReward({"right": (number, 1.0, {})}), rows, "data.train")
    with pytest.raises(ValueError, match=r"line 1: workers.rewards:multiple_choice: .*4 of 4"):
        check_answers(multiple_choice, rows, "data.train")
    check_answers(value, rows, "data.train")  # a function of one's own


def test_an_unreadable_answer_is_found_before_the_start(tmp_path: Path) -> None:
    settings = tiny_grpo(tmp_path)
    rows = [{"prompt": "3 4", "answer": answer} for answer in ("7", "blue")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings |= {"data.train": tmp_path / "rows.jsonl", "data.batch_size": 2}
    with pytest.raises(
        ValueError, match=r"data.train: .*rows.jsonl, line 2: .*'blue', which has no"
    ):
        dry_run("grpo", settings, reward="workers.rewards:number")
    evaluated = {
        name: settings[name] for name in ("runtime", "model.path", "actor.generation.engine")
    }
    evaluated["data.validation"] = tmp_path / "rows.jsonl"
    evaluated["actor.generation.sampling.max_response_tokens"] = 5
    with pytest.raises(ValueError, match=r"data.validation: .*rows.jsonl, line 2"):
        dry_run("evaluate", evaluated, reward="workers.rewards:number")
