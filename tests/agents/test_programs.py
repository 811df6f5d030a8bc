"""Programs that the policy writes, in the sandbox, for a tool."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest

from tests.agents.chat import conversation, saying
from workers.agents.interfaces import as_episode
from workers.agents.programs import run_python


class Interpreter:
    def python(self, program: str) -> str:
        """Runs Python and returns what it prints.

        Args:
            program: The program.
        """
        return run_python(program)

    def reward(self, answer: str) -> float:
        return float(answer == "720")


@pytest.mark.parametrize(
    "program, written",
    [
        ("print(input() + '{}')", "in{}\n"),
        ("from __future__ import annotations\nprint(__name__)", "__main__\n"),
        ("import sys; sys.stderr.write('e'); sys.exit('bye')", "ebye\n"),
        ("open('/etc/passwd')", "Traceback .*open\\('/etc/passwd'\\).*Error"),
        ("import socket; socket.socket()", "Traceback .*PermissionError"),
        ("x = 1\nx / 0", 'Traceback .*"<program>", line 2, .*ZeroDivisionError: division by zero'),
        ("a b", "    a b\n.*SyntaxError: invalid syntax"),
        ("print('x' * 5000)", r"x{4000}\n\.\.\. \(5001 characters\)\n$"),
        (
            "while True: pass",
            r"^The program crashed, or was ended: it may take 0.5 s and 512 MiB\.\n",
        ),
    ],
)
def test_what_a_program_prints(program: str, written: str) -> None:
    said = run_python(program, "in", timeout_s=0.5)
    assert said == written or re.search(written, said, re.DOTALL), said


def test_a_tool_that_runs_programs() -> None:
    program = "import math\nprint(math.factorial(6))"
    call = json.dumps({"name": "python", "arguments": {"program": program}})
    model = conversation(saying([f"<tool_call>\n{call}\n</tool_call>", "720"]), reply_tokens=200)
    prompt = [{"role": "user", "content": "6!"}]
    began = time.perf_counter()
    outcome = asyncio.run(as_episode(Interpreter).episode(model, {"prompt": prompt}))
    assert outcome.reward == 1.0 and time.perf_counter() - began > model.segments.tool_s > 0
    assert model.messages[2] == {"role": "tool", "name": "python", "content": "720\n"}
