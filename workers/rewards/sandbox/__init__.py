"""A sandbox for programs that a model writes: Linux, without privileges, fail closed.

    launcher.py   shuts its own process in, then runs the program
    kernel.py     Landlock, seccomp, name spaces, users, limits
    judging.py    assertions of another process over the program's functions
    processes.py  starts both, watches them, reads the verdict
    probing.py    tries the walls, and says which layers hold

    ended, written = run(program, "2 3", Limits(timeout_s=5, memory_mb=512))
    passed = judge(program, "assert add(1, 2) == 3", Limits(timeout_s=5, memory_mb=512))

Both raise a SandboxError where the walls do not hold: that is never a reward of 0. Left out:
programs in other languages, and machines of their own for programs (gVisor, virtual machines).
"""

from __future__ import annotations

from workers.rewards.sandbox.processes import Limits, SandboxError, judge, run

__all__ = ["Limits", "SandboxError", "judge", "run"]
