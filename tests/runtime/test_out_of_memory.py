"""hybridflow.out_of_memory on the files of both versions of cgroups, and on this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.out_of_memory import read_kills, read_limit, told

FILES = {
    "version 2": {
        "proc/self/cgroup": "0::/pod\n",
        "sys/fs/cgroup/pod/memory.events": "low 0\noom 9\noom_kill 3\noom_group_kill 0\n",
        "sys/fs/cgroup/pod/memory.max": "8000000000\n",
        "proc/vmstat": "oom_kill 77\n",
    },
    "version 2 in a container": {
        "proc/self/cgroup": "0::/../host/path\n",
        "sys/fs/cgroup/memory.events": "oom 9\noom_kill 3\n",
        "sys/fs/cgroup/memory.max": "8000000000\n",
    },
    "version 1": {
        "proc/self/cgroup": "4:cpu,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 3\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "8000000000\n",
    },
    "a machine without limits": {"proc/vmstat": "pgfault 12\noom_kill 3\n"},
}


@pytest.mark.parametrize("machine", FILES)
def test_kills_and_limit_are_those_of_the_container(machine: str, tmp_path: Path) -> None:
    """FAULTS trap 12: an out-of-memory kill is reported as such."""
    for name, text in FILES[machine].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = 0 if "without" in machine else 8_000_000_000
    assert (read_kills(tmp_path), read_limit(tmp_path)) == (3, limit)
    assert read_kills() >= 0


def test_it_is_told_only_where_there_was_one() -> None:
    assert told(3, 3, 0) == ""
    assert told(3, 4, 8_000_000_000).startswith("out of memory: the kernel has killed 1 processes")
    assert "whose limit is 8 GB" in told(3, 4, 8_000_000_000)
