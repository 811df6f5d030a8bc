"""A run that is finished before it starts: the same command a second time.

Nothing is started and none of its files is changed; what a killed controller left unfinished is
removed. Leaves out runs whose newest commit is not a
checkpoint that can be read, with its model; those go on as any other.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from controllers.loop import numbers_of
from controllers.outcome import Outcome, logged_steps, nothing_to_do
from controllers.saving import Saving, on_disk
from controllers.validation import REWARD
from hybridflow.checkpoint import CheckpointStore, load_metadata
from hybridflow.metrics.jsonl import METRICS, SUMMARY, write_summary
from hybridflow.recovery.attempts import DIRECTORY as ATTEMPTS
from hybridflow.recovery.attempts import Attempt, newest
from hybridflow.recovery.holders import is_held
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.supervision import SUPERVISION
from recipes.preparation import Preparation
from recipes.same_run import checkpoint_store
from recipes.settings_history import other_settings

LOGGER = logging.getLogger(__name__)


def finished(prepared: Preparation) -> Outcome | None:
    """The outcome of the run in output_dir, as its files have it, where it is finished; the log says
    that nothing is to do, and which settings are others now. None for any other run."""
    config = prepared.config
    if config.loop.resume != "auto" or SUPERVISION.took_over:
        return None
    directory = Path(config.output_dir).absolute()
    latest = checkpoint_store(prepared.placement, directory).latest()
    staged = MemoryPlace.commits_of(directory)
    if latest is None or (staged and staged[0].number > latest.sequence):
        return None
    if not on_disk(latest).has_model:
        return None  # the run exports it
    try:
        state = load_metadata(latest.path)
    except ValueError:
        return None  # resuming says what is wrong, and goes back to the checkpoint before it
    position, after = int(state["data"]["position"]), numbers_of(state["validation_after"])
    length = config.loop.length(len(prepared.train), config.data.batch_size)
    target = config.loop.stop_at_reward
    good_enough = target is not None and after.get(REWARD, float("-inf")) >= target
    if not length.reached(latest.step, position) and not good_enough:
        return None
    steps = [step for step in logged_steps(directory) if step.step <= latest.step]
    before = numbers_of(state["validation_before"])
    outcome = Outcome.of(latest.step, steps, before, after, REWARD)
    LOGGER.warning("%s", nothing_to_do(directory, latest.step))
    differences = other_settings(prepared.config, directory, but=prepared.derived, loop=True)
    if differences:
        LOGGER.warning("its steps were trained with other settings: %s", differences)
    complete_summary(directory, outcome)
    remove_leftovers(directory)
    return outcome


def remove_leftovers(directory: Path) -> None:
    """Frees the memory and removes the unfinished files of a controller that was killed behind the last
    commit."""
    memory, attempts = MemoryPlace.of(directory), directory / ATTEMPTS
    if memory is None or is_held(directory):
        return
    memory.clear()
    last = Attempt(attempts, newest(attempts), run="")
    Saving({}, CheckpointStore(directory / "checkpoints", attempt=last)).tidy()


def complete_summary(directory: Path, outcome: Outcome) -> None:
    """Writes summary.json where the run ended between its last checkpoint and that file, or the
    file has no seconds of any step."""
    path = directory / SUMMARY
    if not (directory / METRICS).is_file():
        return
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved.get("num_steps") == outcome.num_steps and saved.get("train_s") != 0:
            return
    write_summary(directory, asdict(outcome))


def newest_model(store: CheckpointStore) -> Path | None:
    """The Hugging Face directory of the newest checkpoint."""
    latest = store.latest()
    if latest is None or not (latest.path / "huggingface").is_dir():
        return None
    return latest.path / "huggingface"
