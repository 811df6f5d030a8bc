"""Files with the stacks of hosts that were killed do not stay behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow.host import STACK_FILES, remove_stack_files


def test_files_of_dead_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of living processes stay, and those of another process namespace, where the same number
    may be another process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = str(Path("/proc/self/ns/pid").readlink()).partition("[")[2].removesuffix("]")
    assert namespace.isdigit()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f"{STACK_FILES}{namespace}-{dead.pid}-ab_c.txt": False,
        f"{STACK_FILES}{namespace}-{dead.pid}-ab_c.txt.activity": False,
        f"{STACK_FILES}{namespace}-{os.getpid()}-xyz.txt": True,
        f"{STACK_FILES}1{namespace}-{dead.pid}-xyz.txt": True,
        "another.txt": True,
    }
    for name in names:
        (tmp_path / name).touch()
    remove_stack_files()
    assert {name: (tmp_path / name).exists() for name in names} == names
