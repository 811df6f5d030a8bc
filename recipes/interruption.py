"""what_is_kept(): the line that Ctrl-C ends a run with."""

from __future__ import annotations

from pathlib import Path

from controllers.ledger import LEDGER, read_ledger
from controllers.outcome import logged_steps
from controllers.saving import DISK, Commit, Saving
from hybridflow.checkpoint import CheckpointStore
from hybridflow.snapshots.memory import MemoryPlace
from recipes.config import RunConfig


def what_is_kept(config: RunConfig) -> str:
    """In words: the step that the run stands at, the newest commit, and how to go on."""
    directory = Path(config.output_dir).absolute()
    if not (directory / LEDGER).is_file():
        return "interrupted before the first step; nothing is kept"
    store = CheckpointStore(directory / "checkpoints")
    steps = [trained.step for trained in logged_steps(directory)]
    steps += [line["step"] for line in read_ledger(directory / LEDGER)]
    last = max(steps, default=0)
    commits = Saving({}, store, MemoryPlace.of(directory)).commits()
    commits = [commit for commit in commits if commit.step <= last]  # later ones: an earlier run's
    begun = f"interrupted after step {last}" if last else "interrupted before the first step ended"
    if not commits or not last:
        return f"{begun}; nothing is kept, the same command starts anew"
    again = "the same command goes on from there"
    if config.loop.resume != "auto":
        again = "the same command with loop.resume=auto goes on from there"
    return f"{begun}; {described(commits[0])} is kept: {again}"


def described(commit: Commit) -> str:
    if commit.place == DISK:
        return f"the checkpoint of step {commit.step} ({commit.path})"
    return f"the snapshot of step {commit.step} (in this machine's memory: {commit.path})"
