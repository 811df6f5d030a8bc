"""Where a run goes on, and its metrics with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from controllers.loop_config import LoopConfig
from controllers.saving import Saving, checkpoint_at
from hybridflow.checkpoint import CheckpointStore
from hybridflow.metrics import Tracker
from hybridflow.recovery.attempts import Attempt
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.supervision import SUPERVISION
from recipes.config import RunConfig
from recipes.settings_history import settings_tree


def start_tracker(
    config: RunConfig, directory: Path, first_step: int, num_steps: int, attempt: Attempt
) -> Tracker:
    """The metrics of this run; what an earlier one logged after `first_step` is dropped. It raises
    Fenced once another attempt has taken the run over."""
    return Tracker(
        config.metrics,
        directory,
        total_steps=num_steps,
        start_step=first_step,
        run_config=settings_tree(config),
        before_writing=attempt.check,
    )


def goes_on(loop: LoopConfig) -> LoopConfig:
    """The loop's settings in a controller that takes over from a dead one: once the run has a
    commit, that is where it goes on, whatever loop.resume says of its beginning."""
    if SUPERVISION.state.get("furthest", -1) < 0:
        return loop
    return replace(loop, resume="auto")


def start_step(resume: str, store: CheckpointStore, memory: MemoryPlace | None = None) -> int:
    """The step that the run goes on from, 0 included; metrics of later ones are dropped. -1: none."""
    if resume == "never":
        return -1
    if resume == "auto":
        commits = Saving({}, store, memory).commits()
        return commits[0].step if commits else -1
    return checkpoint_at(Path(resume)).step
