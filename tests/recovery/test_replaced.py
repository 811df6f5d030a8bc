"""A controller that another one has replaced writes nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.ledger import LEDGER, read_ledger
from controllers.recovery import Driver
from controllers.saving import Saving
from hybridflow.errors import Where, WorkerDied
from hybridflow.failures import EventLog
from hybridflow.local_pool import LocalPool
from hybridflow.metrics import MetricsConfig, Tracker
from hybridflow.recovery.attempts import Attempt, Fenced
from hybridflow.recovery.config import RecoveryConfig
from hybridflow.results import Metrics
from hybridflow.supervision import SUPERVISION
from tests.controllers.hand_role import HandAlgorithm, HandRole, make_loop


def test_a_replaced_controller_writes_nothing_more(tmp_path: Path, shm: Path) -> None:
    loop = make_loop(tmp_path, shm)
    loop.snapshot()
    Attempt.claim(tmp_path)
    with pytest.raises(Fenced, match="attempt 2 has taken this run over"):
        Driver(loop).run()
    assert [line["step"] for line in read_ledger(loop.ledger.path)] == [0]
    assert not loop.store.all() and SUPERVISION.directory is None


class Suspended(HandAlgorithm):
    """During its third step, when what was being written is written, another controller takes the run
    over."""

    output = Path()
    saving: Saving
    dies = False
    files: dict[str, bytes]
    """Those of the run at that moment."""

    def step(self, prompts: object) -> Metrics:
        if self.role.engine.num_steps == 2:
            assert self.saving.is_flushed(wait=True)
            Attempt.claim(self.output)
            self.files = contents(self.output)
            if self.dies:
                where = Where(role="actor", rank=0, method="update_actor", pool="main")
                raise WorkerDied("actor rank 0 died", (where,))
        return super().step(prompts)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("dies", [False, True], ids=["its step ends", "a rank of it has died"])
def test_a_run_that_was_suspended_and_replaced_writes_nothing(
    tmp_path: Path, shm: Path, dies: bool
) -> None:
    """Ctrl-Z, the same command on another machine, fg: neither metrics nor the failure of a process
    that died meanwhile, and no second start of the ledger, memory or checkpoints."""
    output = tmp_path / "out"
    loop = make_loop(output, shm)
    attempt, role = loop.store.attempt, loop.trained["actor"]
    assert attempt is not None and isinstance(role, HandRole)
    quiet = MetricsConfig(console=False, tensorboard=True)
    loop.tracker = Tracker(quiet, output, total_steps=5, before_writing=attempt.check)
    loop.algorithm = algorithm = Suspended(role)  # type: ignore[assignment]
    algorithm.output, algorithm.saving, algorithm.dies = output, loop.saving, dies
    events = EventLog(output, attempt.number)
    driver = Driver(loop, pools={"main": LocalPool()}, config=RecoveryConfig(), events=events)
    with pytest.raises(Fenced, match="attempt 2 has taken this run over"), loop.tracker:
        driver.run()
    after = contents(output)
    assert {"metrics.jsonl", "events.jsonl", "trace.json", LEDGER} <= after.keys()
    assert after == algorithm.files
    assert [commit.step for commit in loop.saving.commits()][:1] == [2]
