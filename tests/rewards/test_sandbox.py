"""The sandbox for programs (FAULTS C12, D): what can't get out, under root and under another user,
with name spaces and without, and what of a program can't deceive its judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workers.reward_function import score_rows
from workers.rewards import code
from workers.rewards.sandbox import Limits, SandboxError, judge, run
from workers.rewards.sandbox.mode import Sandbox
from workers.rewards.sandbox.probing import ATTEMPTS, PREFACE

ROOT = Path(__file__).parents[2]
QUICK = Limits(timeout_s=5.0, memory_mb=256)
USER = 12345
"""A user that has nothing."""
CHECK = """
import json, sys
from workers.rewards.sandbox import Limits
from workers.rewards.sandbox.probing import check
limits = Limits(timeout_s=30.0, memory_mb=256, namespaces=json.loads(sys.argv[1]))
print(json.dumps(dict(check(limits))))
"""
HARMLESS = (
    *("network", "datagrams", "fork", "subprocess", "posix_spawn", "read passwd", "read temp"),
    *("read secret", "symbolic link", "hard link", "change time", "process list", "kill parent"),
    *("parent's environment", "own mappings", "memory file", "change mode", "truncate"),
)
"""Attempts that anybody may make outside of a sandbox, and that succeed there."""


def interpreter() -> str:
    """A Python that any user can start."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([path, "-c", ""], user=USER, group=USER, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return path
    pytest.skip("no Python here that another user can start")


@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_no_attempt_to_leave_succeeds(root: bool, namespaces: bool) -> None:
    """48 attempts in one program: network, processes, other processes, files, kernel."""
    if os.getuid() != 0 and root:
        pytest.skip("not root")
    user: dict[str, Any] = {}
    path = sys.executable
    if os.getuid() == 0:
        path = interpreter()
        user = {} if root else {"user": USER, "group": USER, "extra_groups": []}
    environment = {"PATH": "/usr/bin:/bin", "SANDBOX_TEST_SECRET": "x"}
    checked = subprocess.run(
        [path, "-B", "-c", CHECK, json.dumps(namespaces)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        **user,
    )
    assert checked.returncode == 0, checked.stderr[-1000:]
    layers = json.loads(checked.stdout)
    assert layers["landlock"] >= 1 and layers["seccomp"] and layers["user"] != 0
    assert not layers["namespaces"] or namespaces


def test_the_attempts_succeed_outside(tmp_path: Path) -> None:
    """Otherwise their failure inside would prove nothing."""
    lines = [
        PREFACE,
        f"OUTER_PID, SECRET, OUTER_DIRECTORY = os.getppid(), {str(tmp_path / 's')!r},",
    ]
    lines[-1] += f" {str(tmp_path)!r}\nopen(SECRET, 'w').write('x')"
    for name in HARMLESS:
        lines.append(f"def attempt():\n    {ATTEMPTS[name]}")
        lines.append(f"try:\n    attempt()\nexcept BaseException as e:\n    print({name!r}, e)")
    outside = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (outside.stdout, outside.returncode) == ("", 0), outside.stderr
    assert len(ATTEMPTS) > 40 and set(HARMLESS) <= set(ATTEMPTS)


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    print('x' * 10**6)",
        "x = []\nwhile True:\n    x.append(bytearray(10**7))",
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'wb').write(bytes(10**7))",
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()",
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, lambda *_: None)\n"
        "    except Exception:\n        pass\nwhile True:\n    pass",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.setsid() if os.getsid(0) != os.getpid() else None\nwhile True:\n    pass",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ],
    ids=["output", "memory", "disk", "threads", "signals", "forks", "crash", "session", "stack"],
)
def test_a_bomb_is_a_program_that_has_not_passed(program: str) -> None:
    started = time.monotonic()
    ended, written = run(program, "", Limits(timeout_s=0.5, memory_mb=128))
    assert not ended and len(written) <= 2**20
    assert time.monotonic() - started < 200


def test_the_next_program_finds_nothing_of_the_last() -> None:
    writes = "open('left', 'w').write('x')\nprint(open('left').read())"
    assert run(writes, "", QUICK) == (True, "x\n")
    assert run("import os\nprint(os.listdir())", "", QUICK) == (True, "['program.py']\n")


ADD = "def add(a, b):\n    return a + b"
CHEATS = {
    "exit": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "always equal": "class Equal:\n    def __eq__(self, other): return True\n"
    "    __gt__ = __lt__ = __ge__ = __le__ = __eq__\n"
    "    def __sub__(self, other): return 0\n    __rsub__ = __abs__ = __sub__\n"
    "def add(a, b):\n    return Equal()",
    "own integer": "class Equal(int):\n    def __eq__(self, other): return True\n"
    "def add(a, b):\n    return Equal(1)",
    "own assert": "import builtins\nbuiltins.AssertionError = ValueError\ndef add(a, b):\n    return 1",
    "own abs": "def abs(x): return 0\ndef isclose(*x): return True\ndef add(a, b): return 1",
    "reads the tests": "import sys, os\ndef add(a, b):\n"
    "    frame = sys._getframe()\n    while frame:\n"
    "        for value in frame.f_locals.values():\n"
    "            if 'assert' in str(value): return 5\n        frame = frame.f_back\n    return 1",
    "writes the verdict": "import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'1' * 32)\n"
    "    except OSError:\n        pass\ndef add(a, b): return 1",
    "says it is ready and dies": "import os\nfor n in range(3, 64):\n    try:\n"
    '        os.write(n, b\'{"ready": true}\\n{"value": 0}\\n\')\n    except OSError:\n        pass\n'
    "os._exit(0)",
    "raises": "def add(a, b):\n    raise StopIteration",
    "never answers": "def add(a, b):\n    while True:\n        pass",
    "own module": "import unittest.mock as math\nmath.floor = lambda x: 5\ndef add(a, b): return 1",
    "callback's globals": "def add(a, b, f=None):\n    return 1\n"
    "def apply(f, x):\n    return f.__globals__['expected']",
}
TAKE_OVER = """
import sys, os
frame = sys._getframe()
while frame.f_back and "nonce" not in frame.f_locals:
    frame = frame.f_back
os.write(frame.f_locals["verdict"], frame.f_locals["nonce"].encode())
os._exit(0)
"""
for _function in ("exec", "eval"):
    # The protocol spoken by hand: the program asks the judge to run its code.
    _asks = {"ask": "call", "with": {"list": [{"tuple": [{"builtin": "exec"}, TAKE_OVER]}, {}]}}
    _asks["with"]["list"][1] = {"dict": []}
    CHEATS[f"has the judge {_function}"] = (
        f"import json, os\nASKS = {json.dumps(json.dumps(_asks))}.replace('exec', '{_function}')\n"
        "def add(a, b):\n    for n in range(3, 64):\n        try:\n"
        "            os.write(n, ASKS.encode() + b'\\n')\n        except OSError:\n"
        "            pass\n    return 1"
    )


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str) -> None:
    limits = Limits(timeout_s=1.0, memory_mb=256)
    for tests in (
        "assert add(2, 3) == 5",
        "x = add(2, 3)\nassert abs(x - 5) < 1e-6",
        "assert math.floor(add(2, 3)) == 5",
    ):
        assert not judge(CHEATS[name], tests, limits)
    apply = "expected = 4\nassert apply(lambda x: x + 1, 3) == expected"
    assert not judge(CHEATS[name], apply, limits)


PROGRAM = """
import math
import numpy as np
from collections import Counter
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __iter__(self): return iter(self.items)
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __hash__(self): return hash((self.x, self.y))
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
    def __mul__(self, n): return Point(self.x * n, self.y * n)
    def __repr__(self): return f"Point({self.x}, {self.y})"
class Wrong(ValueError): pass
def sum(a, b): return a * 10 + b
def sort_in_place(xs): xs.sort()
def primes():
    yield from (2, 3, 5)
def apply(f, xs): return [f(x) for x in xs]
def fail(x): raise Wrong("no " + str(x))
def depth(node): return 0 if node is None else 1 + max(depth(node.left), depth(node.right))
def counts(text): return Counter(text)
def big(n): return 7 ** n
async def later(x): return x
"""
HONEST = [
    "assert sum(1, 2) == 12",
    "xs = [3, 1, 2]\nsort_in_place(xs)\nassert xs == [1, 2, 3]",
    "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s[0] == 1 and list(s) == [1, 2]",
    "assert isinstance(Stack(), Stack) and not isinstance(3, Stack)",
    "assert Point(1, 2) == Point(1, 2) != Point(2, 1) and Point(1, 2) + Point(1, 1) == Point(2, 3)",
    "assert Point(1, 2) * 2 == Point(2, 4) and str(Point(1, 2)) == 'Point(1, 2)'",
    "assert len({Point(1, 2), Point(1, 2)}) == 1 and Point(3, 4).x == 3",
    "assert list(primes()) == [2, 3, 5] and next(primes()) == 2",
    "assert apply(lambda x: x * x, [1, 2]) == [1, 4] and apply(str, [1]) == ['1']",
    "try:\n    fail(1)\n    assert False\nexcept Wrong as e:\n    assert 'no 1' in str(e)",
    "try:\n    fail(1)\n    raise SystemExit\nexcept ValueError:\n    pass",
    "class Node:\n    def __init__(self, l=None, r=None): self.left, self.right = l, r\n"
    "assert depth(Node(Node(Node()), Node())) == 3",
    "assert counts('aab') == {'a': 2, 'b': 1} and counts('aab').most_common(1) == [('a', 2)]",
    "assert math.floor(np.sqrt(17)) == 4",
    "assert big(9000) == 7 ** 9000 and abs(math.sqrt(2) ** 2 - 2) < 1e-9",
    "def check(candidate):\n    assert candidate('ab')['a'] == 1\ncheck(counts)",
]


@pytest.mark.parametrize("number", range(0, len(HONEST), 5))
def test_honest_programs_pass_as_they_do_in_one_process(number: int) -> None:
    """Against exec of program and tests in one name space, and with one value wrong."""
    tests = "\n".join(HONEST[number : number + 5])
    exec(PROGRAM + "\n" + tests, {"__name__": "tests"})
    assert judge(PROGRAM, tests, QUICK)
    assert not judge(PROGRAM, tests + "\nassert counts('a') == {'a': 2}", QUICK)


def test_what_can_not_be_judged_is_said() -> None:
    with pytest.raises(ValueError, match=r"a test passes a datetime\.date to the program"):
        judge(ADD, "import datetime\nadd(datetime.date(2000, 1, 1), 1)", QUICK)


def test_a_sandbox_that_does_not_hold_is_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: the run stops, under the name of the sandbox and not of the reward."""
    row = {
        "prompt": "",
        "response": ADD,
        "finish_reason": "stop",
        "answer": ["assert add(1, 1) == 2"],
    }
    assert score_rows(code, [row])[0][0] == 1.0
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="can't be started here"):
        score_rows(code, [row])
    with pytest.raises(Exception, match="allow_unsafe"):
        score_rows(code, [row], sandbox=Sandbox.off)
