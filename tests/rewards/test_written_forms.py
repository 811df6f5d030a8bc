r"""Mathematics as people and models write it, each pair with the value that a reader gives it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from recipes.python_api import dry_run
from tests.rewards.test_rewards import value
from tests.tiny import tiny_grpo
from workers.rewards import code, exact_match, math, multiple_choice, number
from workers.rewards.answers import check_answers
from workers.rewards.combined import CombinedReward
from workers.rewards.numbers import numbers_in

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


def test_tests_and_texts_that_a_reward_can_not_read_are_found_before_any_response() -> None:
    human = "def check(candidate):\n    assert candidate(1) == 1\n"
    rows: list[tuple[str, dict[str, Any]]] = [
        ("a.jsonl, line 1", {"answer": human, "entry_point": "one"}),
        ("a.jsonl, line 2", {"answer": ["assert one(1) == 1"], "test_setup_code": "import math"}),
    ]
    check_answers(code, rows, "data.train")
    for broken, message in (
        ({"answer": human}, "asserts nothing"),
        ({"answer": human, "entry_point": None}, "asserts nothing"),
        ({"answer": "[]"}, "give tests, at least one"),
        ({"answer": ["assert one(1) =="]}, "no Python"),
        ({"answer": ["assert one(1)"], "test_imports": ["import no_such"]}, "imports no_such"),
    ):
        with pytest.raises(ValueError, match=rf"line 3: workers.rewards:code: .*{message}.*1 of 3"):
            check_answers(code, [*rows, ("a.jsonl, line 3", broken)], "data.train")
    for answer in ({"aliases": ["a"]}, [], [["a"]], [None]):
        texts = [("a.jsonl, line 1", {"answer": "a"}), ("a.jsonl, line 2", {"answer": answer})]
        with pytest.raises(ValueError, match=r"line 2: workers.rewards:exact_match: answer is"):
            check_answers(exact_match, texts, "data.train")


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


SEPARATORS = [
    # thousands
    ("1,234", "1234"),
    ("1,234.5", "1234.5"),
    ("1,234,567", "1234567"),
    ("1.234.567", "1234567"),
    ("1'234'567", "1234567"),
    ("1 234 567", "1234567"),
    ("1\u2009234\u202f567", "1234567"),
    ("10 000 \u20ac", "10000"),
    (r"10,\!000", "10000"),
    (r"1\,234{,}5", "1234.5"),
    # decimals behind a comma
    ("1,5", "1.5"),
    ("-12,50 \u20ac", "-12.5"),
    ("0,125", "0.125"),
    ("1234,567", "1234.567"),
    ("1.234,56", "1234.56"),
    ("1.234.567,89", "1234567.89"),
    ("1 234,56", "1234.56"),
    (r"\boxed{1{,}5}", "1.5"),
    ("3,14 x 10^2", "314"),
    # and behind a point
    ("1.234", "1.234"),
    # lists
    ("1,2,3", "1 2 3"),
    ("1, 5", "1 5"),
    ("1.5,2.5", "1.5 2.5"),
    ("1,5, 2,5", "1.5 2.5"),
    ("(1,5)", "1 5"),
    ("[-1,5]", "-1 5"),
    (r"\{1,5\}", "1 5"),
    (r"1,\;5", "1 5"),
    ("1 234 5", "1 234 5"),
    ("2020 100 200", "2020 100 200"),
]


@pytest.mark.parametrize(("text", "values"), SEPARATORS)
def test_commas_points_and_spaces(text: str, values: str) -> None:
    assert numbers_in(text) == [Fraction(value) for value in values.split()]
    assert numbers_in(f"so {text}.") == [Fraction(value) for value in values.split()]


def test_plain_spaces_may_part_numbers() -> None:
    for answer, expected in ((1234567, 1.0), (567, 1.0), (1234, 0.0), (234, 0.0)):
        assert value(number, "so 1 234 567", answer=answer) == expected
    assert value(number, "so 567", answer="1 234 567") == 0.0


SEVERAL_BOXES = [
    ("1, 2", r"\boxed{1}, \boxed{2}", 1.0),
    ("1, 2", r"$x=\boxed{2}$ or $x_2 = \boxed{1}$.", 1.0),
    ("1, 2", "so\n- \\boxed{1}\n- \\boxed{2}", 1.0),
    (r"\{1, 2\}", r"\boxed{1} \text{ and } \boxed{2}", 1.0),
    (r"\boxed{1} and \boxed{2}", r"\boxed{1,2}", 1.0),
    ("1, 2, 3", r"\boxed{1}, \boxed{2}, \boxed{3}", 1.0),
    ("1, 2", r"\boxed{1}, \boxed{3}", 0.0),
    ("1, 2", r"\boxed{2}", 0.0),
    ("2", r"\boxed{1}, \boxed{2}", 0.0),
    ("2", r"first \boxed{1}, no, \boxed{2}", 1.0),
    ("2", "\\boxed{1}\n\n\\boxed{2}", 1.0),
    ("2", r"\boxed{2}, \boxed{2}", 1.0),
    ("1/2", r"\boxed{\frac{1}{2}} or \boxed{0.5}", 1.0),
    ("1, 2", r"no \boxed{7}; then \boxed{1} and \boxed{2}", 1.0),
]


@pytest.mark.parametrize(("answer", "response", "expected"), SEVERAL_BOXES)
def test_boxes_side_by_side_are_one_list(answer: str, response: str, expected: float) -> None:
    assert value(math, response, answer=answer) == expected
