"""Progress: what is said about a slow start, on a terminal and elsewhere, and how hosts tell what
they do.

The slow work is this file's own: workers that sleep inside an activity.
"""

from __future__ import annotations

import errno
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridflow import progress
from hybridflow.context import RankContext
from hybridflow.group import spawn, start
from hybridflow.pool import PoolSpec
from hybridflow.progress import Activity, activities, activity, duration
from hybridflow.protocols import ONE_TO_ALL
from hybridflow.ray_pool import RayPool
from hybridflow.waiting import CALLS
from hybridflow.worker import Worker, remote

ROOT = Path(__file__).parents[2]
SLOW_START = """
import logging, time
from hybridflow.progress import activity
from hybridflow.progress_display import shown
logging.basicConfig(level=logging.INFO, format="%(message)s")
with shown():
    with activity("start", patience_s=0.5, detail=lambda: "rank 0 is loading"):
        with activity("starting Ray"):
            time.sleep(0.3)
        logging.info("a line of the log")
        with activity("building actor"):
            time.sleep(1.0)
    with activity("short", patience_s=0.5):
        time.sleep(0.1)
    with activity("answering", total=4, patience_s=0.5) as answering:
        for _ in range(4):
            time.sleep(0.3)
            answering.advance()
"""


class SlowWorker(Worker):
    """Takes a while to build and to answer, and names what it does."""

    def __init__(self, config: float, context: RankContext) -> None:
        super().__init__(config, context)
        with activity("loading nothing"):
            time.sleep(config)

    @remote(ONE_TO_ALL)
    def think(self) -> float:
        with activity("thinking"):
            time.sleep(self.config)
        return self.config


def test_activities_nest_and_end_with_their_block() -> None:
    with activity("outer"):
        with pytest.raises(RuntimeError), activity("inner"):
            assert [one.what for one in activities()] == ["outer", "inner"]
            raise RuntimeError
        with activity("inner"):
            pass
        (outer,) = activities()
    assert activities() == [] and list(outer.parts) == ["inner"]


def test_reports_become_rarer() -> None:
    current = Activity(what="x", patience_s=10.0)
    reported = []
    for second in range(400):
        current.started = time.monotonic() - second
        if current.overdue():
            current.num_reports += 1
            reported.append(second)
    assert reported == [10, 30, 60, 120, 240]


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (0.04, 9.96, 59.4, 125, 4320)] == [
        "0.0 s",
        "10 s",
        "59 s",
        "2:05 min",
        "1:12 h",
    ]


def test_a_slow_start_says_why_where_there_is_no_terminal() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SLOW_START], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "", "log lines only"
    lines = [
        re.sub(r"\d+\.\d s", "# s", line).replace("2 of 4", "1 of 4")
        for line in run.stderr.splitlines()
    ]
    assert lines == [
        "a line of the log",
        "start: # s so far; building actor (# s); rank 0 is loading",
        "start took # s: starting Ray # s, building actor # s",
        "answering: 1 of 4, # s so far",
        "answering took # s",
    ]


def test_a_terminal_shows_a_moving_line_that_log_lines_do_not_break() -> None:
    text = in_a_terminal(SLOW_START)
    assert "start" in text and "building actor" in text and "rank 0 is loading" in text
    assert "3/4" in text, "a bar counts"
    rows = text.replace("\r", "\n").splitlines()
    assert any(row.rstrip().endswith("a line of the log") and "start" not in row for row in rows)
    assert "so far" not in text and "short" not in text


def test_a_file_tells_other_processes_and_naming_is_cheap(tmp_path: Path) -> None:
    path = tmp_path / "activity"
    script = f"""
import time
from pathlib import Path
from hybridflow import progress
progress.write_to(Path({str(path)!r}))
with progress.activity("outer"):
    with progress.activity("compiling a pl\N{LATIN SMALL LETTER A WITH DIAERESIS}n"):
        print(progress.read(Path({str(path)!r})))
    print(progress.read(Path({str(path)!r})))
print(repr(progress.read(Path({str(path)!r}))))
started = time.perf_counter()
for _ in range(1000):
    with progress.activity("x" * 600):
        pass
print((time.perf_counter() - started) / 1000 < 1e-3)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    inner, outer, after, is_cheap = run.stdout.splitlines()
    assert re.fullmatch(r"compiling a plän \(\d\.\d s\)", inner), run.stderr
    assert re.fullmatch(r"outer \(\d\.\d s\)", outer)
    assert (after, is_cheap) == ("''", "True")
    assert progress.read(tmp_path / "gone") == ""


def test_the_controller_sees_what_a_host_does(ray_cluster: None) -> None:
    with RayPool(PoolSpec(name="slow", num_devices=2, cpus_per_device=1)) as pool:
        worker = spawn(SlowWorker, pool, 1.5, role="thinker")
        assert CALLS.finish() is not None and CALLS.under_way() == ""
        answers = start(worker.think)
        seen = set()
        deadline = time.monotonic() + 10
        while "thinking" not in " ".join(seen) and time.monotonic() < deadline:
            seen.add(re.sub(r" \(.*", "", CALLS.under_way()))
            time.sleep(0.05)
        assert (
            seen <= {"thinker.think", "thinker.think: thinking"}
            and "thinker.think: thinking" in seen
        )
        assert list(answers) == [1.5, 1.5]
        assert pool.activity() == ""


def in_a_terminal(script: str) -> str:
    """What the script writes to a terminal of 100 columns, without control sequences."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError as error:
            assert error.errno == errno.EIO, "the other end is closed"
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.wait(timeout=60) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(chunks).decode())
