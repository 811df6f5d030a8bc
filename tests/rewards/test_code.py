"""workers.rewards:code: what passes, what does not, and what is no reward of 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from workers.reward_function import check_columns, score_rows
from workers.rewards import code
from workers.rewards.code import program_of
from workers.rewards.combined import RewardPart, combined
from workers.rewards.sandbox.mode import Sandbox, use_sandbox

SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [{"input": "2 3", "output": "5"}, {"input": "1 1\n", "output": "2\n\n"}]


def score(response: str, answer: object, **options: Any) -> float:
    numbers = code("", response, finish_reason="stop", answer=answer, **options)
    return numbers["reward"]


@pytest.fixture(params=list(Sandbox))
def mode(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Both ways to run programs, and the options that each needs."""
    with use_sandbox(request.param):
        yield {"allow_unsafe": True} if request.param is Sandbox.off else {}


def test_stdin_and_stdout(mode: dict[str, Any]) -> None:
    assert score(f"Sure:\n```python\n{SUM}\n```\nDone.", PAIRS, **mode) == 1.0
    assert score(SUM, {"inputs": ["2 3"], "outputs": ["5"]}, **mode) == 1.0
    assert score(SUM.replace("+", "-"), PAIRS, **mode) == 0.0
    half = [*PAIRS[:1], {"input": "1 1", "output": "3"}]
    assert (score(SUM, half, **mode), score(SUM, half, partial=True, **mode)) == (0.0, 0.5)


def test_assertions(mode: dict[str, Any]) -> None:
    program = "def add(a, b):\n    return a + b"
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    assert score(program, tests, **mode) == 1.0
    assert score(program, '["assert add(1, 2) == 4"]', **mode) == 0.0
    assert score(program, "for n in range(3):\n    assert add(n, n) == 2 * n", **mode) == 1.0


def test_columns_of_published_tests(mode: dict[str, Any]) -> None:
    """HumanEval's function to check, and what MBPP's assertions need before them."""
    program, wrong = (f"def add(a, b):\n    return a {sign} b" for sign in "+-")
    human = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    for test in (human, f"{human}\ncheck(add)\n"):
        assert score(program, test, entry_point="add", **mode) == 1.0
        assert score(wrong, test, entry_point="add", **mode) == 0.0
    needed = {"test_setup_code": "expected = math.isqrt(9)", "test_imports": ["import math"]}
    test = ["assert add(1, 2) == expected"]
    assert score(program, test, **needed, **mode) == 1.0
    assert score(wrong, test, **needed, **mode) == 0.0
    assert score(program, test, test_setup_code="", test_imports=[], **mode) == 0.0
    assert score(SUM, PAIRS, entry_point="add", **needed, **mode) == 1.0


BLOCKS = {
    "```python3\nprint(1)\n```\nThis prints 1": "print(1)",
    "```python\nprint(1)\n```\nOutput:\n```\n1\n```": "print(1)",
    "1.  ```py\n    if 1:\n        print(1)\n    ```": "    if 1:\n        print(1)",
    "  ```\n  if 1:\n      print(1)\n  ```": "if 1:\n    print(1)",
    "~~~python\nprint(1)\n~~~": "print(1)",
    "```Python title=a.py\nprint(1)```": "print(1)",
    "```python\nprint('```')\nprint(2)\n```": "print('```')\nprint(2)",
    "```python\nprint(1)": "print(1)",
    "not ```this``` but\n```python\nprint(1)\n```": "print(1)",
    "```python\nprint(1)\n```\n```bash\nls\n```\n```python\nprint(2)\n```": "print(2)",
    "print(1)": "print(1)",
}


@pytest.mark.parametrize("response", BLOCKS)
def test_the_program_is_the_last_block_of_python(response: str) -> None:
    assert program_of(response) == BLOCKS[response]


UNJUDGED = [
    ("def check(candidate):\n    assert candidate(1) == 2", "asserts nothing: it defines check"),
    ("def test_add():\n    assert add(1, 1) == 2", "asserts nothing: it defines test_add"),
    (
        "class T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 1), 2)\n"
        "unittest.main()",
        "asserts nothing",
    ),
    ("from solution import add\nassert add(1, 1) == 2", "imports solution, which is not installed"),
    ("assert add(1, 1) ==", "which is no Python"),
    ({"inputs": [[1, 1]], "outputs": [2], "fn_name": "add"}, "arguments of add"),
    ([{"input": "[1, 1]", "output": "2", "testtype": "functional"}], "arguments of a function"),
]


@pytest.mark.parametrize(("answer", "message"), UNJUDGED)
def test_tests_that_any_program_or_none_would_pass_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        score(SUM, answer)
    assert "\n" not in str(error.value)


def test_helpers_of_tests_that_are_called(mode: dict[str, Any]) -> None:
    program = "def add(a, b):\n    return a + b"
    for tests in (
        "def check(candidate):\n    assert candidate(1, 1) == 2\ncheck(add)",
        "def one():\n    assert add(1, 1) == 2\nfor test in (one,):\n    test()",
        "import math\ntry:\n    assert math.sqrt(add(2, 2)) == 2\nexcept KeyError:\n    raise",
    ):
        assert score(program, tests, **mode) == 1.0
        assert score(program.replace("+", "-"), tests, **mode) == 0.0
    assert score("print(1)", [{"input": None, "output": 1}], **mode) == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import sys; sys.exit(97)",
        "import os; os._exit(0)",
        "this is no Python",
        "x = [0] * 10**12",
        "raise SystemExit",
    ],
)
def test_a_program_that_leaves_early_has_not_passed(program: str) -> None:
    assert score(program, ["assert True"]) == 0.0


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    started = time.perf_counter()
    sleeper = "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    assert score(sleeper, ["assert True"], timeout_s=1.0) == 0.0
    assert time.perf_counter() - started < 100
    environment = "import os\nassert 'SECRET' not in os.environ and os.listdir() == ['program.py']"
    assert score(environment, ["assert True"]) == 1.0
    memory = "try:\n    bytearray(2**30)\nexcept MemoryError:\n    print('limited')"
    assert score(memory, [{"input": "", "output": "limited"}], memory_mb=256) == 1.0


def test_what_is_no_reward_of_0() -> None:
    with use_sandbox(Sandbox.off), pytest.raises(ValueError, match=r"reward\.sandbox is off"):
        code("", SUM, finish_reason="stop", answer=PAIRS, allow_unsafe=False)
    for limits in ({"memory_mb": 0}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}):
        with pytest.raises(ValueError, match="use more than 0 seconds and at least 64 MiB"):
            score(SUM, PAIRS, **limits)
    assert score(SUM, PAIRS, memory_mb=64) == 1.0
    for answer in ([], "", None, 7, [7], "print(1)", {"inputs": [1], "outputs": []}):
        with pytest.raises(ValueError, match=r"answer|test"):
            score(SUM, answer)


def test_a_program_that_can_not_be_started_is_no_reward_of_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for interpreter in ("/bin/false", "/no/such/python"):
        monkeypatch.setattr(sys, "executable", interpreter)
        with pytest.raises(RuntimeError, match="can't be started here"):
            score(SUM, PAIRS)


def test_consent_is_an_option_and_no_column() -> None:
    path = "workers.rewards:code"
    check_columns(path, ["answer"], "reward")
    with pytest.raises(ValueError, match="the data has a column 'allow_unsafe'"):
        check_columns(path, ["answer", "allow_unsafe"], "reward")
    part = RewardPart(function=path, options={"allow_unsafe": True})
    reward = combined({"tests": part}, "reward")
    check_columns(reward, ["answer"], "reward")
    row = {"prompt": "", "response": SUM, "finish_reason": "stop", "answer": PAIRS}
    ((total, numbers),) = score_rows(reward, [row])
    assert total == 1.0 and numbers == {"tests": 1.0, "tests_passed": 1.0}
