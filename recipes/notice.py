"""keep_what_memory_holds(): a notice (SIGTERM) that comes before a run stands and its driver takes
notices (controllers/recovery.py)."""

from __future__ import annotations

from pathlib import Path

from controllers.saving import Saving
from hybridflow.checkpoint import CheckpointStore
from hybridflow.recovery.attempts import Attempt
from hybridflow.recovery.holders import is_held
from hybridflow.snapshots.memory import MemoryPlace
from recipes.config import RunConfig
from recipes.going_on import goes_on


def keep_what_memory_holds(config: RunConfig) -> None:
    """Writes the newest commit of the run that would have gone on to disk, where this machine's memory
    alone holds it. Other checkpoints stay: the next controller prunes them. Leaves out other nodes,
    which nobody can reach before Ray is there."""
    directory = Path(config.output_dir).absolute()
    memory = MemoryPlace.of(directory)
    goes_on_from_there = goes_on(config.loop).resume == "auto"
    if memory is None or not goes_on_from_there or is_held(directory):
        return
    store = CheckpointStore(directory / "checkpoints", keep_last=10**6)
    if Saving({}, store, memory).is_on_disk:
        return
    store.attempt = Attempt.claim(directory)
    Saving({}, store, memory).write_newest()
