"""Python programs that a model writes, run against tests in a sandbox (sandbox/).

A program runs in a process of its own that can read Python and the installed packages, write into an
empty directory, and do nothing else: no network, no other process, no file of this machine. What it
wrote, or what its functions returned, is judged in another process. docs/rewards.md says what holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from workers.rewards import unconfined
from workers.rewards.sandbox import Limits, judge, run
from workers.rewards.sandbox.mode import Sandbox, sandbox_mode

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
LEAST_MEMORY_MB = 64


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
    **columns: object,
) -> dict[str, float]:
    """1.0 if the program in the response passes all of its tests, else 0.0; with partial the
    share that it passes.

    answer: a list of {"input": text on stdin, "output": text on stdout}, {"inputs": [...],
    "outputs": [...]}, a list of assert statements, or Python that asserts; or the JSON text of one
    of them. The program is the last fenced block, or the whole response. timeout_s: seconds of each
    test by the clock, without those that it waits for a busy processor.

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
    tests = read_tests(answer)
    program, limits = program_of(response), Limits(timeout_s=timeout_s, memory_mb=memory_mb)
    passed = 0
    for test in tests:
        passed += (
            test.passes(program, limits) if confined else test.passes_unconfined(program, limits)
        )
    share = passed / len(tests)
    reward = share if partial else float(passed == len(tests))
    return {"reward": reward, "passed": share}


def program_of(response: str) -> str:
    blocks = FENCED.findall(response)
    return str(blocks[-1]) if blocks else response


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


def read_tests(answer: object) -> list[Dialogue | Assertions]:
    """The tests of a row; a ValueError where there are none."""
    tests = answer
    if isinstance(answer, str):
        try:
            tests = json.loads(answer)
        except json.JSONDecodeError:
            tests = [answer]
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
    return [read_test(test) for test in tests]


def read_test(test: Any) -> Dialogue | Assertions:
    if isinstance(test, Mapping) and {"input", "output"} <= test.keys():
        return Dialogue(text_of(test["input"]), text_of(test["output"]))
    if isinstance(test, str) and "assert" in test:
        return Assertions(test)
    raise ValueError(
        f"a test is {str(test)[:80]!r}; give {{input, output}}, or Python with assert statements"
    )


def text_of(value: object) -> str:
    """Text, or lines of text."""
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return str(value)


def lines_of(text: str) -> list[str]:
    """Its lines without blanks at their ends and without empty ones at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
