"""A run that another process of this machine is training is left to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hybridflow.recovery import holders
from hybridflow.recovery.attempts import Attempt


def test_a_run_of_a_process_that_is_alive_is_refused(tmp_path: Path) -> None:
    """One that is suspended, too; not one's own, not one that was killed or is another machine's."""
    holders.check_nobody_holds(tmp_path)
    attempt = Attempt.claim(tmp_path)
    holders.hold(attempt)
    holders.check_nobody_holds(tmp_path)
    file = tmp_path / "attempts" / "1" / holders.FILE
    with subprocess.Popen(["sleep", "60"]) as process:
        other = holders._identity(process.pid) | {"parent": str(os.getpid())}
        file.write_text(json.dumps(other))
        with pytest.raises(
            ValueError, match=rf"alive there \(process {process.pid} on .*kill -INT"
        ):
            holders.check_nobody_holds(tmp_path)
        for changed in ({"boot": "another"}, {"host": "another"}, {"began": "1"}):
            file.write_text(json.dumps(other | changed))
            holders.check_nobody_holds(tmp_path)
        file.write_text(json.dumps(other))
        os.kill(process.pid, signal.SIGSTOP)
        while holders._state(process.pid) != "T":
            time.sleep(0.01)
        group = os.getpgid(process.pid)
        with pytest.raises(ValueError, match=rf"suspended run .*kill -CONT -- -{group}\)"):
            holders.check_nobody_holds(tmp_path)
        assert holders.is_held(tmp_path)
        process.kill()
    holders.check_nobody_holds(tmp_path)
    assert not holders.is_held(tmp_path)
    holders.release(attempt)
    assert not file.exists()


def test_a_process_without_its_supervisor_is_waited_for(tmp_path: Path) -> None:
    attempt = Attempt.claim(tmp_path)
    with subprocess.Popen(["sleep", "0.5"]) as process:
        holder = holders._identity(process.pid) | {"parent": "1"}
        (attempt.directory / "1" / holders.FILE).write_text(json.dumps(holder))
        started = time.monotonic()
        holders.check_nobody_holds(tmp_path)
        assert 0.2 < time.monotonic() - started < 30
