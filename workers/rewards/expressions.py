"""Mathematical answers: fractions, roots, units, intervals, sets and equations, compared by
math-verify in a process of its own."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path

LOGGER = logging.getLogger(__name__)
PROGRAM = Path(__file__).with_name("equation_judge.py")
CPU_S = 3
"""Processor time of an answer, and of a response; what people write takes milliseconds."""


def math(
    prompt: str, response: str, *, finish_reason: str, answer: object, **columns: object
) -> float:
    r"""1.0 if the response's final answer equals the answer, else 0.0: \boxed{\frac{1}{2}} = 0.5 =
    1/2.

    The final answer is what stands in the last \boxed{...}, or the last expression in dollars or
    plain text. 0.0, with a warning, for a response whose expression takes over 3 s of processor
    time: a tower of powers has no end. A ValueError for an answer that math-verify can't read.
    """
    return JUDGE.compare(str(answer), response)


class EquationJudge:
    """A process that compares answers and responses, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def compare(self, answer: str, response: str) -> float:
        request = json.dumps({"answer": answer, "response": response})
        with self._turn:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._check_end(process)
            readable = self._line(process)
            if not readable:
                reason = "which math-verify can't read"
                if readable is None:
                    reason = f"whose value takes over {CPU_S} s of processor time"
                raise ValueError(f"answer is {answer[:80]!r}, {reason}; use another reward")
            equal = self._line(process)
        if equal is None:
            LOGGER.warning(
                "reward math: the expression of a response takes over %d s of processor time, "
                "which counts as a wrong answer: %r",
                CPU_S,
                response[-80:],
            )
        return float(bool(equal))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(CPU_S)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> bool | None:
        """The next answer; None where the process has used up its processor time."""
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            return bool(json.loads(line))
        self._check_end(process)
        return None

    def _check_end(self, process: subprocess.Popen[str]) -> None:
        """A RuntimeError where the process ended for another reason than its limit."""
        self._process = None
        status = process.wait()
        if status != -signal.SIGXCPU:
            raise RuntimeError(
                f"reward math: the process that compares expressions ended with status {status}; "
                "its output is above"
            )


JUDGE = EquationJudge()
