"""Python programs that a model writes, run against tests in a sandbox (sandbox/).

A program runs in a process of its own that can read Python and the installed packages, write into an
empty directory, and do nothing else: no network, no other process, no file of this machine. What it
wrote, or what its functions returned, is judged in another process. docs/rewards.md says what holds.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from secrets import token_hex
from typing import Any

from workers.rewards import unconfined
from workers.rewards.fences import program_of
from workers.rewards.sandbox import Limits, judge, run
from workers.rewards.sandbox.mode import Sandbox, sandbox_mode

FUNCTIONAL = ("fn_name", "func_name")
"""Keys by which APPS, TACO and LiveCodeBench have arguments of a function in place of text."""
LEAST_MEMORY_MB = 64
CHECK = re.compile(r"^def check\(\w+\)", re.MULTILINE)
CALLED = re.compile(r"^check\(", re.MULTILINE)
"""HumanEval's function of assertions, and its call."""


def code(
    prompt: str,
    response: str,
    *,
    finish_reason: str,
    answer: object,
    allow_unsafe: bool = False,
    timeout_s: float = 5.0,
    memory_mb: int = 1024,
    partial: bool = False,
    entry_point: str | None = None,
    test_setup_code: str | None = None,
    test_imports: Sequence[str] | None = None,
    **columns: object,
) -> dict[str, float]:
    """1.0 if the program in the response passes all of its tests, else 0.0; with partial the
    share that it passes.

    answer: a list of {"input": text on stdin, "output": text on stdout}, {"inputs": [...],
    "outputs": [...]}, a list of assert statements, or Python that asserts; or the JSON text of one
    of them. The program is the last fenced block of Python, or the whole response. timeout_s: seconds of each
    test by the clock, without those that it waits for a busy processor. entry_point: the function
    that HumanEval's check(candidate) is called with; test_setup_code, test_imports: what MBPP's
    assertions need before them. All three are columns of those data sets.

    Programs run in the sandbox; with reward.sandbox=off and allow_unsafe=true as this user, with
    limits that a program can get around. A ValueError for an answer without tests, a RuntimeError
    where a program can't be started or the sandbox does not hold: neither is a reward of 0.
    """
    confined = sandbox_mode() is Sandbox.required
    if not confined and allow_unsafe is not True:
        raise ValueError(
            "workers.rewards:code runs what the model writes, and reward.sandbox is off; set "
            "allow_unsafe: true in its options (reward.parts) if that may happen on these "
            "machines, or reward.sandbox=required"
        )
    if not (timeout_s > 0 and memory_mb >= LEAST_MEMORY_MB):
        raise ValueError(
            f"workers.rewards:code has timeout_s={timeout_s} and memory_mb={memory_mb}; use more "
            f"than 0 seconds and at least {LEAST_MEMORY_MB} MiB, which Python itself needs"
        )
    tests = read_tests(answer, entry_point, [*(test_imports or ()), test_setup_code or ""])
    program, limits = program_of(response), Limits(timeout_s=timeout_s, memory_mb=memory_mb)
    passed = 0
    for test in tests:
        passed += (
            test.passes(program, limits) if confined else test.passes_unconfined(program, limits)
        )
    share = passed / len(tests)
    reward = share if partial else float(passed == len(tests))
    return {"reward": reward, "passed": share}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A test over the text that the program reads on stdin and the one that it writes on stdout."""

    stdin: str
    stdout: str

    def passes(self, program: str, limits: Limits) -> bool:
        return self._agrees(*run(program, self.stdin, limits))

    def passes_unconfined(self, program: str, limits: Limits) -> bool:
        return self._agrees(*unconfined.run(program, self.stdin, limits))

    def _agrees(self, ended: bool, written: str) -> bool:
        return ended and lines_of(written) == lines_of(self.stdout)


@dataclass(frozen=True, slots=True)
class Assertions:
    """Python that asserts, with the program's names."""

    source: str

    def passes(self, program: str, limits: Limits) -> bool:
        return judge(program, self.source, limits)

    def passes_unconfined(self, program: str, limits: Limits) -> bool:
        """Runs after the program, in its process: the program can see and change the tests."""
        # A program that leaves before the assertions has not passed them: it can't write this.
        mark = token_hex(16)
        end = f"import sys as _sys\n_sys.stdout.write({mark!r})\n"
        ended, written = unconfined.run(f"{program}\n\n{self.source}\n{end}", "", limits)
        return ended and written.endswith(mark)


def read_tests(
    answer: object, entry_point: str | None = None, setup: Sequence[str] = ()
) -> list[Dialogue | Assertions]:
    """The tests of a row, assertions behind their setup; a ValueError where there are none."""
    tests = answer
    if isinstance(answer, str):
        try:
            tests = json.loads(answer)
        except json.JSONDecodeError:
            tests = [answer]
    if isinstance(tests, Mapping):
        check_textual(tests)
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        inputs, outputs = tests["inputs"], tests["outputs"]
        if len(inputs) != len(outputs):
            raise ValueError(f"answer has {len(inputs)} inputs and {len(outputs)} outputs")
        tests = [
            {"input": given, "output": expected}
            for given, expected in zip(inputs, outputs, strict=True)
        ]
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"answer is {str(answer)[:80]!r}; give tests, at least one")
    before = "\n".join(filter(None, setup))
    return [read_test(_whole(test, entry_point, before)) for test in tests]


def _whole(test: Any, entry_point: str | None, before: str) -> Any:
    """Assertions with what stands before them, and with the call of check(candidate)."""
    if not isinstance(test, str) or "assert" not in test:
        return test
    if entry_point and CHECK.search(test) and not CALLED.search(test):
        test = f"{test}\ncheck({entry_point})\n"
    return f"{before}\n{test}" if before else test


def read_test(test: Any) -> Dialogue | Assertions:
    if isinstance(test, Mapping) and {"input", "output"} <= test.keys():
        check_textual(test)
        return Dialogue(text_of(test["input"]), text_of(test["output"]))
    if isinstance(test, str) and "assert" in test:
        check_assertions(test)
        return Assertions(test)
    raise ValueError(
        f"a test is {str(test)[:80]!r}; give {{input, output}}, or Python with assert statements"
    )


def check_textual(test: Mapping[str, Any]) -> None:
    """A ValueError for inputs that are the arguments of a function: as text on stdin no program
    would pass them."""
    function = next((test[key] for key in FUNCTIONAL if test.get(key)), None)
    if function is None and "functional" in (test.get("testtype"), test.get("type")):
        function = "a function"
    if function is not None:
        raise ValueError(
            f"the inputs of a test are arguments of {function}, which are not read; give assert "
            "statements that call it"
        )


def check_assertions(source: str) -> None:
    """A ValueError for a test that any program would pass, because nothing in it is asserted, or
    none, because it can't run."""
    shown = repr(source[:80])
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"a test is {shown}, which is no Python ({error}); correct it") from None
    defined = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    if not any(asserts(node, defined) for node in run_at_once(tree)):
        names = ", ".join(sorted(defined)) or "nothing"
        raise ValueError(
            f"a test is {shown}, which asserts nothing: it defines {names} and calls none of it; "
            "add the call, such as check(solution)"
        )
    for node in ast.walk(tree):
        for module in imported(node):
            if not importable(module):
                raise ValueError(
                    f"a test is {shown}, which imports {module}, which is not installed here; the "
                    "program's names are there without an import"
                )


def asserts(node: ast.AST, defined: set[str]) -> bool:
    """Whether it is an assert statement, the use of a function that may hold some, or the call of
    one such as numpy.testing.assert_allclose."""
    if isinstance(node, ast.Name):
        return node.id in defined and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Call):
        name = node.func
        called = name.attr if isinstance(name, ast.Attribute) else ""
        return "assert" in (name.id if isinstance(name, ast.Name) else called)
    return isinstance(node, ast.Assert)


def run_at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_at_once(node)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return []


@lru_cache(maxsize=1024)
def importable(module: str) -> bool:
    """Whether it is there; looked up, not imported."""
    return module == "__main__" or find_spec(module) is not None


def text_of(value: object) -> str:
    """Text, or lines of text; null for none."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return str(value)


def lines_of(text: str) -> list[str]:
    """Its lines without blanks at their ends and without empty ones at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
