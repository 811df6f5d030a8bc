"""hybridflow.out_of_memory on the files of both versions of cgroups, and on this machine's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hybridflow.out_of_memory import read_kills, read_limit, read_used, told

FILES = {
    "version 2": {
        "proc/self/cgroup": "0::/pod\n",
        "sys/fs/cgroup/pod/memory.events": "low 0\noom 9\noom_kill 3\noom_group_kill 0\n",
        "sys/fs/cgroup/pod/memory.max": "8000000000\n",
        "sys/fs/cgroup/pod/memory.current": "7000000000\n",
        "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 2000000000\nactive_file 7\n",
        "proc/vmstat": "oom_kill 77\n",
    },
    "version 2 in a container": {
        "proc/self/cgroup": "0::/../host/path\n",
        "sys/fs/cgroup/memory.events": "oom 9\noom_kill 3\n",
        "sys/fs/cgroup/memory.max": "8000000000\n",
        "sys/fs/cgroup/memory.current": "5000000000\n",
    },
    "version 1": {
        "proc/self/cgroup": "4:cpu,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 3\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "8000000000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "9000000000\n",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 4000000000\n",
    },
    "a machine without limits": {
        "proc/vmstat": "pgfault 12\noom_kill 3\n",
        "proc/meminfo": "MemTotal:       9765625 kB\nMemFree: 7 kB\nMemAvailable:    4882812 kB\n",
    },
}


@pytest.mark.parametrize("machine", FILES)
def test_kills_and_limit_are_those_of_the_container(machine: str, tmp_path: Path) -> None:
    """FAULTS trap 12: an out-of-memory kill is reported as such."""
    for name, text in FILES[machine].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = 0 if "without" in machine else 8_000_000_000
    assert (read_kills(tmp_path), read_limit(tmp_path)) == (3, limit)
    assert read_used(tmp_path) == pytest.approx(5_000_000_000, abs=1024)
    assert read_kills() >= 0


def test_it_is_told_only_where_there_was_one() -> None:
    assert told(3, 3, 0) == ""
    assert told(3, 4, 8_000_000_000).startswith("out of memory: the kernel has killed 1 processes")
    assert "whose limit is 8 GB" in told(3, 4, 8_000_000_000)


ENTERED = """
import json, os, subprocess, sys
from pathlib import Path
from hybridflow.out_of_memory import read_kills, read_limit, read_used
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = read_kills(), read_used()
hungry = subprocess.run([sys.executable, "-c", "memory = bytearray(200 << 20)"])
held = bytearray(16 << 20)
print(json.dumps([*before, hungry.returncode, read_kills(), read_limit(), read_used()]))
"""
LIMIT = 64 << 20


@pytest.fixture
def container() -> Iterator[Path]:
    """A cgroup of this machine with LIMIT bytes."""
    root = Path("/sys/fs/cgroup")
    version_2 = (root / "cgroup.controllers").exists()
    directory = (root if version_2 else root / "memory") / "hybridflow-test-of-memory"
    limit = directory / ("memory.max" if version_2 else "memory.limit_in_bytes")
    try:
        directory.mkdir(exist_ok=True)
        limit.write_text(str(LIMIT))
    except OSError as error:
        with suppress(OSError):
            directory.rmdir()
        pytest.skip(f"no cgroup of one's own here: {error}")
    yield directory
    directory.rmdir()


def test_a_real_kill_in_a_real_container(container: Path) -> None:
    """A process that takes more than its container may is killed by the kernel, and counted."""
    run = subprocess.run(
        [sys.executable, "-c", ENTERED, str(container)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    kills, used, status, kills_after, limit, used_after = json.loads(run.stdout)
    assert (kills, kills_after, limit, status) == (0, 1, LIMIT, -9)
    assert 16 << 20 <= used_after <= LIMIT and used < used_after
