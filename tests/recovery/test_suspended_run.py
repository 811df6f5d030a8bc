"""A run that Ctrl-Z suspended: the same command leaves it alone, and where another machine has taken
it over it ends without writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from controllers.ledger import LEDGER, read_ledger
from hybridflow.recovery.holders import FILE
from tests.recovery.test_killed_run import ROOT, settings, wait_for_step


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "log"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_suspended_run_is_left_alone_and_ends_where_it_was_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    tiny = settings(tmp_path) | {"runtime": "local", "output_dir": output}
    arguments = [f"{name}={value}" for name, value in tiny.items()]
    command = [sys.executable, "-m", "recipes.grpo", *arguments]
    with (output / "log").open("w") as log:
        suspended = subprocess.Popen(
            [*command, "loop.num_steps=10000"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        wait_for_step(suspended, output, 1)
        os.killpg(suspended.pid, signal.SIGSTOP)
        time.sleep(0.5)
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        *_, line = again.stderr.splitlines()
        assert again.returncode == 2 and line.startswith("error: "), again.stderr
        assert "a suspended run is there" in line and f"kill -CONT -- -{suspended.pid})" in line
        # As on another machine, which knows nothing of this one's processes.
        (output / "attempts" / "1" / FILE).unlink()
        last = read_ledger(output / LEDGER)[-1]["step"] + 3
        other = [*command, f"loop.num_steps={last}"]
        subprocess.run(other, cwd=ROOT, check=True, capture_output=True, timeout=200)
        before = contents(output)
        os.killpg(suspended.pid, signal.SIGCONT)
        assert suspended.wait(100) == 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(suspended.pid, signal.SIGKILL)
        suspended.wait(100)
    *_, line = (output / "log").read_text().splitlines()
    assert line.endswith(
        "attempt 2 has taken this run over; attempt 1 ends without writing anything more"
    )
    assert contents(output) == before
