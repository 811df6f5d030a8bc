"""The parts of a run: next rows, algorithm.step, log, validate, snapshot, checkpoint, and back.

Knows no algorithm and no engine. What a run must not lose (position in the data, the algorithm's
own numbers, weights, optimizer) goes into one atomic commit. Their order, with failures and without
them, is decided by hybridflow/recovery/machine.py and carried out by controllers/recovery.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from controllers.algorithm_base import Algorithm
from controllers.data import PromptDataset
from controllers.ledger import LEDGER, Ledger, Line, Rows
from controllers.loop_config import LoopConfig
from controllers.not_finite import BadSteps
from controllers.outcome import (
    Outcome,
    TrainedStep,
    peak_memory,
    phase_seconds,
)
from controllers.samples import SampleReader
from controllers.saving import Commit, Saving, checkpoint_at
from controllers.streams import RowSource
from controllers.validation import REWARD, Validate
from hybridflow.batch import Batch
from hybridflow.calls import CallRecord
from hybridflow.checkpoint import CheckpointStore
from hybridflow.group import each
from hybridflow.metrics import Tracker
from hybridflow.metrics.jsonl import to_json
from hybridflow.progress import activity
from hybridflow.snapshots.files import Written
from hybridflow.snapshots.memory import MemoryPlace
from hybridflow.waiting import CALLS
from workers.roles import TrainedRole

LOGGER = logging.getLogger(__name__)
PATIENCE_S = 30.0
"""Seconds of a validation or a checkpoint after which the log says what it is doing
(progress.py)."""
STEP_PATIENCE_S = 300.0
INPUTS = PromptDataset.columns
"""The columns that every step's prompts bring."""


class Stateful(Protocol):
    """Something small that a checkpoint must hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """loop = Loop(algorithm, trained={"actor": actor, "critic": critic}, data=RowLoader(dataset,
    config.data), validate=None, ...)
    loop.resume()                   # where the run stands, as loop.resume says
    outcome = Driver(loop).run()    # goes on from there (controllers/recovery.py)

    trained: the roles that a checkpoint holds; the first is the one that the run is for, also saved
    as a Hugging Face directory. further: by name, whatever else has a position that a checkpoint
    must hold. samples: reads what the model says; None shows nothing of it. settings: those that
    make the run what it is, written into its checkpoints. memory: where snapshots go every
    `snapshot_every` steps; None: checkpoints on disk are all that the run can go back to.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        trained: Mapping[str, TrainedRole],
        data: RowSource,
        validate: Validate | None,
        tracker: Tracker,
        store: CheckpointStore,
        config: LoopConfig,
        further: Mapping[str, Stateful] | None = None,
        samples: SampleReader | None = None,
        settings: Mapping[str, str] | None = None,
        memory: MemoryPlace | None = None,
        snapshot_every: int = 1,
    ) -> None:
        self.algorithm = algorithm
        self.trained = trained
        self.data = data
        self.validation = validate
        self.tracker, self.store, self.config = tracker, store, config
        self.saving = Saving(trained, store, memory)
        self.ledger = Ledger(store.directory.parent / LEDGER)
        self.saving.before_commit = self.ledger.sync
        self.snapshot_every = snapshot_every
        self._rows = Rows()
        """Used since the last commit."""
        self.bad = BadSteps(store.directory.parent)
        self.length = config.length(len(data.dataset), data.config.batch_size)
        self.further = dict(further or {})
        self.samples = samples
        self.settings = dict(settings or {})
        self.step = 0
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.trained_steps: list[TrainedStep] = []
        """Those of the run, as far as they are known; the ones that a recovery took back are left
        out."""
        self._start = self._state()
        self._validated = False
        """Whether the step that it stands at was."""
        self._line: Line | None = None
        """That of the staged step, not recorded yet."""

    def run_step(self, step: int) -> None:
        """Trains that step, and validates where that is due. Step 0 is the validation before the
        first step."""
        if step == 0:
            self.before = self.before or self.validate()
            return
        assert step == self.step + 1, f"step {step} after step {self.step}"
        self.train_one_step()
        self._validated = self._finished() or _due(self.step, self.config.validate_every)
        if self._validated:
            self.after = self.validate()

    @property
    def ends(self) -> bool:
        """Whether the run ends with the step that it stands at."""
        return self._finished() or self._good_enough()

    @property
    def is_best(self) -> bool:
        """Whether the step was validated, and better than all checkpoints."""
        return self._validated and self.store.would_be_best(self.after)

    def outcome(self) -> Outcome:
        """The result so far."""
        return Outcome.of(self.step, self.trained_steps, self.before, self.after, REWARD)

    def train_one_step(self, prompts: Batch | None = None) -> dict[str, float]:
        """One step on the next rows, or on these; returns what was logged of it once its calls
        have ended."""
        self.tracker.trace(CALLS.finish())  # what ran before is not part of this step's seconds
        started, clock = time.perf_counter(), time.time()
        if prompts is None:
            self._pass_over()
        position = self.data.position
        with self._rows_given_back_on_failure():
            if prompts is None:
                rows = self.length.next_rows(self.data.position)
                if rows < 1:
                    raise ValueError(
                        f"loop.num_epochs={self.config.num_epochs}: every row was used; raise it"
                    )
                prompts = self.data.take(rows).repeat(self.algorithm.config.samples_per_prompt)
            with (
                activity(
                    f"step {self.step + 1}", detail=CALLS.under_way, patience_s=STEP_PATIENCE_S
                ),
                self.bad.saving(self.step + 1, prompts),
            ):
                metrics = self.algorithm.step(prompts)
                numbers = dict(metrics)
                records = CALLS.finish()
            self.saving.check_fence()
            self.bad.look_at(self.step + 1, position, prompts, numbers, metrics.rows)
        self.data.end_step()
        self._rows.add(prompts)
        seconds = time.perf_counter() - started
        self.step += 1
        row = self._record(numbers, records, seconds)
        self.tracker.trace(records, f"step {self.step}", clock, row)
        if self.samples is not None:
            self.tracker.show(self.step, self.samples.training(metrics, self.step))
        self.bad.watch(self.step, row)
        return row

    def _pass_over(self) -> None:
        """Leaves out the rows of a step that was given up, where they come next. The ledger says
        so in the line of the step that comes after them, however the run came here."""
        position = self.data.position
        number = self.bad.num_next(position)
        if number == 0:
            return
        before = self.data.state_dict()
        rows = self.data.take(number)
        if self.bad.passes_over(position, rows):
            self.data.end_step()
            self._rows.pass_over(rows)
        else:
            LOGGER.warning("other rows come next than those of the step that was given up")
            self.data.load_state_dict(before)

    @contextmanager
    def _rows_given_back_on_failure(self) -> Iterator[None]:
        """A step that was interrupted used no rows: the next one begins with them again."""
        position = self.data.state_dict()
        try:
            yield
        except BaseException:
            self.data.load_state_dict(position)
            raise

    def validate(self) -> dict[str, float]:
        """Runs validation now and returns its numbers by name, which the tracker logs under split
        validation; {} where the run has no validation data."""
        if self.validation is None:
            return {}
        started, clock = time.perf_counter(), time.time()
        with activity("validation", detail=CALLS.under_way, patience_s=PATIENCE_S):
            metrics = self.validation()
            numbers = dict(metrics)
            self.tracker.trace(CALLS.finish(), "validation", clock)
        self.tracker.log(
            self.step,
            numbers | {"seconds/validation": time.perf_counter() - started},
            split="validation",
        )
        if self.samples is not None:
            self.tracker.show(self.step, self.samples.validation(metrics), split="validation")
        return numbers

    def try_saving(self) -> None:
        """Saves once, without the weights: what can fail only while saving, after the last step by
        default, is a ValueError before the first one."""
        needed = 0
        with activity("trying to save", patience_s=PATIENCE_S), self.store.trial() as directory:
            for name, role in self.trained.items():
                needed += max(each(role.try_saving, str(directory / name)))
            self.store.check_space(needed)
        CALLS.finish()

    def stage(self) -> Line:
        """Commits the step to memory, where that is in use, so that a failure goes back to it;
        returns its line of the ledger."""
        clock = time.time()
        with activity("snapshot", detail=CALLS.under_way, patience_s=PATIENCE_S):
            written = self.saving.stage(self.step)
            line = self._line = self._current_line(written or {})
            if written is not None:
                ledger = {"ledger": line, "unwritten": self.ledger.unwritten}
                self.saving.commit_staged(self.step, self._state() | ledger)
            self.tracker.trace(CALLS.finish(), "snapshot", clock)
        return line

    def record(self) -> None:
        """Writes the line of the staged step to the ledger."""
        line, self._line = self._line, None
        if line is not None and line is not self.ledger.last:
            self.saving.check_fence()
            self.ledger.append(line)
            self._rows = Rows()

    def snapshot(self) -> None:
        """Commits the step to memory and records it, where memory is in use."""
        if self.saving.memory is None:
            return
        before = self.ledger.last
        self.stage()
        self.record()
        steps = {self.step} if before is None else {self.step, int(before["step"])}
        self.saving.prune_memory(steps)

    def export(self) -> None:
        """Writes the Hugging Face directory of the step, for its checkpoint."""
        with activity("export", detail=CALLS.under_way, patience_s=PATIENCE_S):
            self.saving.export(self.step, self._main_role)

    def begin_flush(self) -> None:
        """Begins to write the step to disk."""
        clock = time.time()
        with activity("checkpoint", detail=CALLS.under_way, patience_s=PATIENCE_S):
            state = self._state() | {"ledger": self._current_line({})}
            self.saving.begin_flush(self.step, state, self.after)
            self.tracker.trace(CALLS.finish(), "checkpoint", clock)

    def checkpoint(self) -> None:
        """Writes a checkpoint of the step with the model as a Hugging Face directory; returns when
        it is complete."""
        self.export()
        self._line = self._current_line({})
        self.begin_flush()
        self.saving.is_flushed(wait=True)
        self.saving.commit()
        self.record()

    def _current_line(self, written: Mapping[str, Written]) -> Line:
        """The step's line of the ledger; the same one when asked again."""
        for line in (self._line, self.ledger.last):
            if line is not None and line["step"] == self.step:
                return line
        position = self.data.state_dict()
        position.pop("ahead", None)
        return self.ledger.next(self.step, self._rows, position, written)

    def save_pretrained(self, directory: Path) -> None:
        """The model that the run is for, as a Hugging Face directory; returns when every rank
        has written its part."""
        self._main_role.save_pretrained(str(directory))

    @property
    def _main_role(self) -> TrainedRole:
        return next(iter(self.trained.values()))

    def resume(self) -> None:
        """Brings everything back to where the run stood, as loop.resume says: to the newest commit
        that can be read, in memory or on disk; or to a checkpoint. A ValueError where there are
        commits and none can be read, and where the checkpoint that is named can't."""
        self.saving.tidy()
        if self.config.resume == "auto":
            if not self.saving.is_empty:
                commit = self._go_back()
                LOGGER.info("resumed from %s, step %d", commit.path, self.step)
            return
        self.saving.clear()
        self.saving.begins_after = self.store.newest_sequence()
        if self.config.resume == "never":
            self.ledger.rewind(None)
            return
        self.begin_from(checkpoint_at(Path(self.config.resume)))
        LOGGER.info("resumed from %s, step %d", self.config.resume, self.step)

    def begin_from(self, commit: Commit) -> None:
        """Brings everything to a commit of this run or of another one with the same settings. A
        ValueError where the commit can't be read."""
        commit = self.saving.verified(commit)
        self.saving.origin = commit
        self.go_to(commit)
        self.rewind(commit)

    def restore(self) -> None:
        """Back to the newest commit of this run that every trained role can load, or to where it
        began. Where that is the pretrained weights (see starts_from_scratch), the roles must have
        been built anew."""
        if self.starts_from_scratch:
            self.go_to(None)
            self.rewind(None)
        else:
            commit = self._go_back()
            LOGGER.info("restored step %d from %s (%s)", self.step, commit.path, commit.place)

    def go_to(self, commit: Commit | None) -> None:
        """Brings the trained roles, data, streams and algorithm to a verified commit; None: the
        start, whose weights the roles must hold already."""
        if commit is None:
            self._load_state(self._start | {"validation_before": self.before})
            return
        self.saving.load(commit)
        self._load_state(commit.state)

    def rewind(self, commit: Commit | None) -> None:
        """Takes back what was recorded of the steps after the commit; None: of all steps."""
        self.saving.check_fence()
        if commit is None:
            self.ledger.rewind(None)
        else:
            self.ledger.rewind(commit.state.get("ledger"), commit.state.get("unwritten", ()))
        self._line = None
        retained = [trained for trained in self.trained_steps if trained.step <= self.step]
        self.trained_steps = retained

    @property
    def starts_from_scratch(self) -> bool:
        """Whether restore() goes back to the weights that the roles are built with."""
        return self.saving.is_empty

    def _go_back(self) -> Commit:
        """Loads the newest commit that can be read; those that can't are said in the log with what
        is wrong, and set aside."""
        damaged = []
        for commit in self.saving.commits():
            try:
                commit = self.saving.verified(commit)
            except ValueError as error:
                LOGGER.warning("step %d can't be restored: %s", commit.step, error)
                damaged.append(commit)
                continue
            self.go_to(commit)
            self.rewind(commit)
            for other in damaged:
                self.saving.set_aside(other)
            return commit
        raise ValueError(
            f"loop.resume=auto: no commit of the run in {self.store.directory.parent} can be read "
            "(see above); use loop.resume=never or another output_dir to start anew"
        )

    def _state(self) -> dict[str, Any]:
        """All that the controller must not lose."""
        return {
            "step": self.step,
            "run": self.settings,
            "data": self.data.state_dict(),
            "further": {name: stateful.state_dict() for name, stateful in self.further.items()},
            "algorithm": self.algorithm.state_dict(),
            # JSON has no infinity, and what is not a number is not equal to itself.
            "validation_before": to_json(self.before),
            "validation_after": to_json(self.after),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.data.load_state_dict(state["data"])
        for name, stateful in self.further.items():
            stateful.load_state_dict(state["further"][name])
        self.algorithm.load_state_dict(state["algorithm"])
        self._rows = Rows()
        self.step = state["step"]
        self.before = numbers_of(state["validation_before"])
        self.after = numbers_of(state["validation_after"])

    def _record(
        self, metrics: dict[str, float], records: list[CallRecord], seconds: float
    ) -> dict[str, float]:
        """Logs the step and adds it to what the outcome reports."""
        phases = phase_seconds(records)
        tokens = metrics.pop("tokens", 0.0)
        row = dict(metrics)
        for phase, value in phases.items():
            row[f"seconds/{phase}"] = value
        row["seconds/step"] = seconds
        row["tokens_per_s"] = tokens / seconds
        row |= peak_memory(records)
        self.tracker.log(self.step, row)
        maxima = {name: value for name, value in metrics.items() if name.endswith("max")}
        self.trained_steps.append(
            TrainedStep(
                step=self.step, seconds=seconds, tokens=tokens, phases=phases, maxima=maxima
            )
        )
        return row

    def _finished(self) -> bool:
        position = self.data.position
        return self.length.reached(self.step, position + self.bad.num_next(position))

    def _good_enough(self) -> bool:
        target = self.config.stop_at_reward
        return target is not None and REWARD in self.after and self.after[REWARD] >= target


def numbers_of(saved: Mapping[str, float | str]) -> dict[str, float]:
    """What to_json made texts of is numbers again."""
    return {name: float(value) for name, value in saved.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
