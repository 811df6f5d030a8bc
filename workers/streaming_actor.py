"""StreamingActor: an actor whose responses are drawn ahead of the steps that ask for them.

Groups of rows (the samples of one prompt) are submitted before an algorithm's page asks for their
responses; generation goes on in slices, ordinary calls of a bounded number of engine steps, and
weights, validation and checkpoints come between two of them. So a host runs a call at a time as ever,
and the deadlock argument of split_actor.py holds. The page's generate_sequences gives the rows that
were drawn; rows that nobody submitted, and those with settings of their own, are drawn at once.

When groups start and when weights come is decided by controllers/rollout_queue.py.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybridflow.batch import Batch
from hybridflow.group import start
from hybridflow.pool import ResourcePool
from hybridflow.results import Metrics, Results
from hybridflow.waiting import CALLS
from workers.agents.outcome import FAILED
from workers.generation.config import SamplingConfig
from workers.packed_blocks import packed, unpacked
from workers.roles import Progress, RowName, SplitGenerator, SplitTrainer
from workers.row_stream import row_names
from workers.split_actor import SplitActor

SLICES_AHEAD = 2
"""Slices that are queued while rows are in flight: the generator goes on while the controller looks
at the last one."""


def nothing() -> None:
    return None


@dataclass(slots=True)
class StepRecord:
    """The rows and seconds of a step, for its metrics."""

    staleness: list[int] = field(default_factory=list)
    """Updates between the first token's weights and those that train, of each row."""
    newest: list[int] = field(default_factory=list)
    """The same of the last token."""
    waited_s: float = 0.0
    """For rows, on the controller."""
    generating_s: float = 0.0
    """In slices, on the replica that was busiest."""
    began: float = field(default_factory=time.perf_counter)


class StreamingActor(SplitActor):
    """actor = StreamingActor.of(trainer, generator, training_pool, generation_pool)
    actor.submit(prompts)                                # rows with the columns uid and sample
    while not (uids := actor.poll()): actor.wait()       # whose rows have all ended
    batch = prompts | actor.generate_sequences(prompts)
    actor.forget(uids)
    """

    overlaps = True
    """Generation goes on while the controller waits for other pools."""

    def __init__(
        self,
        trainer: SplitTrainer,
        generator: SplitGenerator,
        pools: Sequence[ResourcePool] = (),
        *,
        num_replicas: int = 1,
        slice_steps: int = 16,
        bound: int = 0,
        whole_groups: bool = False,
    ) -> None:
        """`bound`: most steps between drawing a row's first token and training on it, held in
        updates, of which a step may have several; a row over it stops the run. `whole_groups`: the
        rows of a uid go to one replica."""
        super().__init__(trainer, generator, pools)
        self.whole_groups = whole_groups
        self.slice_steps, self.bound = slice_steps, bound
        self.before_direct: Callable[[], None] = nothing
        """Called before rows are drawn at once, without having been submitted."""
        self._slices: deque[Results[Progress]] = deque()
        self._load = np.zeros(num_replicas, dtype=np.int64)
        """Rows in flight on each replica."""
        self._unfinished: dict[int, int] = {}
        """uid -> rows in flight."""
        self._replica: dict[RowName, int] = {}
        self._versions: dict[RowName, tuple[int, int]] = {}
        """The versions of the first and last token of every row that ended."""
        self._ended: list[int] = []
        """uids whose rows have all ended and that poll has not named yet."""
        self._collected: dict[RowName, tuple[Batch, int]] = {}
        """Where a collected row stands."""
        self._must_discard = False
        self._version: int | None = None
        """The trainer's when it was last asked; None where it may be another since."""
        self._updates = 0
        """Updates of the present step so far."""
        self._updates_per_step = 1
        """The most of a step so far."""
        self._record = StepRecord()
        if self.overlaps and pools:
            CALLS.background.add((pools[-1].name, "advance"))

    # Drawing ahead.

    @property
    def num_in_flight(self) -> int:
        """Groups that were submitted and that poll has not named."""
        return len(self._unfinished) + len(self._ended)

    @property
    def is_outdated(self) -> bool:
        """Whether the weights were trained since the generator got them."""
        return self._changed

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        """Starts drawing a response for every row, behind those in flight. A group is complete when
        all rows of its uid that were submitted have ended."""
        self._discard_on_generator()
        names = row_names(prompts, greedy=not do_sample)
        replicas = self._assigned(names)
        for name, replica in zip(names, replicas.tolist(), strict=True):
            self._replica[name] = replica
            self._unfinished[name.uid] = self._unfinished.get(name.uid, 0) + 1
        rows = prompts | Batch.of(replica=torch.from_numpy(replicas))
        start(self._generator.submit, rows, do_sample=do_sample)

    def sync(self) -> None:
        self._discard_on_generator()
        super().sync()

    def _discard_on_generator(self) -> None:
        if self._must_discard:
            start(self._generator.discard)
            self._must_discard = False

    def _assigned(self, names: Sequence[RowName]) -> np.ndarray:
        """The replica of every new row: consecutive rows, as many as even out the rows in flight;
        with none in flight the same as for generate_sequences."""
        sizes = [1] * len(names)
        if self.whole_groups:
            sizes = list(Counter(name.uid for name in names).values())
        before = np.zeros_like(self._load)
        for size in sizes:
            least = self._load.argmin()
            self._load[least] += size
            before[least] += 1
        return np.repeat(np.repeat(np.arange(len(self._load)), before), sizes)

    def poll(self) -> list[int]:
        """The uids whose last row has ended since the last call. Keeps slices going where
        generation overlaps with other work; does not wait."""
        while self._slices and self._slices[0].arrived():
            self._notice(self._slices.popleft())
        while self.overlaps and self._unfinished and len(self._slices) < SLICES_AHEAD:
            self._advance()
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> None:
        """Returns when poll has something to look at."""
        began = time.perf_counter()
        if not self._slices:
            self._advance()
        self._slices[0].wait()
        self._record.waited_s += time.perf_counter() - began

    def _advance(self) -> None:
        self._slices.append(start(self._generator.advance, self.slice_steps))

    def _notice(self, progress_of_replicas: Results[Progress]) -> None:
        self._record.generating_s += max(progress.seconds for progress in progress_of_replicas)
        for progress in progress_of_replicas:
            for name, first, last in progress.finished:
                self._load[self._replica[name]] -= 1
                self._versions[name] = first, last
                self._unfinished[name.uid] -= 1
                if not self._unfinished[name.uid]:
                    del self._unfinished[name.uid]
                    self._ended.append(name.uid)

    def discard(self) -> None:
        """Forgets all rows; the generator does before its next weights or rows, when it may have
        been restarted."""
        self._slices.clear()
        self._load[:] = 0
        for rows in (self._unfinished, self._replica, self._versions, self._collected):
            rows.clear()
        self._ended.clear()
        self._must_discard, self._version, self._updates = True, None, 0
        self._record = StepRecord()

    def forget(self, uids: Sequence[int]) -> None:
        """A step has ended: the rows of these groups are not asked for any more."""
        self._updates = 0
        gone = set(uids)
        for name in [name for name in self._versions if name.uid in gone]:
            del self._versions[name], self._replica[name]
            self._collected.pop(name, None)

    # The actor's methods.

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        if sampling is None and "sample" in prompts:
            names = row_names(prompts, greedy=not do_sample)
            if all(name in self._versions for name in names):
                # Before the version is asked for: a wait starts slices, and the rows, with which
                # training begins, would come after them.
                self._collect(names)
                self._check_versions(names)
                return self._responses(names)
        self.before_direct()
        return super().generate_sequences(prompts, sampling, do_sample=do_sample)

    def _train(self, update: Callable[..., Metrics], *arguments: Any) -> Metrics:
        metrics = super()._train(update, *arguments)
        self._version = None
        self._updates += 1
        self._updates_per_step = max(self._updates_per_step, self._updates)
        record, self._record = self._record, StepRecord()
        elapsed_s = time.perf_counter() - record.began  # the metrics are read later
        return metrics | Metrics(sources=[lambda: self._metrics(record, elapsed_s)])

    def load_checkpoint(self, directory: str, stamp: str | None = None) -> None:
        self._version = None
        super().load_checkpoint(directory, stamp)

    def _check_versions(self, names: Sequence[RowName]) -> None:
        """Notes how stale the rows are; a RuntimeError for one that is over the bound. It is the
        trainer that says which version its weights have, whatever trained them."""
        version = self.current_version()
        if self._version not in (None, version):
            raise RuntimeError(
                f"the actor's weights are of version {version}, and generation was last told of "
                f"version {self._version}: something trained the actor past {type(self).__name__}; "
                "its methods that train have to go through SplitActor._train"
            )
        self._version = version
        bound = self.bound * self._updates_per_step + self._updates
        for name in names:
            first, last = self._versions[name]
            if not self._is_given_up(name):
                self._record.staleness.append(version - first)
                self._record.newest.append(version - last)
            if version - first > bound:
                raise RuntimeError(
                    f"the response {name.sample} to prompt {name.uid} was begun by weights of version "
                    f"{first} and would train version {version}: staleness {version - first}, and "
                    f"{bound} is the bound; this is a mistake in the scheduling of generation"
                )

    def _is_given_up(self, name: RowName) -> bool:
        """Whether it is of a group of episodes that was, of which nothing is trained on."""
        batch, row = self._collected[name]
        return "episode_metrics" in batch and batch.objects("finish_reason")[row] == FAILED

    def _responses(self, names: Sequence[RowName]) -> Batch:
        """The rows in that order."""
        self._collect(names)
        parts: list[Batch] = []
        first_row: dict[int, int] = {}
        total = 0
        index = []
        for batch, row in map(self._collected.__getitem__, names):
            if id(batch) not in first_row:
                first_row[id(batch)] = total
                parts.append(batch)
                total += len(batch)
            index.append(first_row[id(batch)] + row)
        whole = parts[0] if len(parts) == 1 else Batch.concat(parts)
        return whole.rows(index)

    def _collect(self, names: Sequence[RowName]) -> None:
        """Asks the generator for those of the rows that are not here yet."""
        names = [name for name in names if name not in self._collected]
        for greedy in (False, True):
            chosen = [name for name in names if name.greedy == greedy]
            if not chosen:
                continue
            rows = Batch.of(
                uid=torch.tensor([name.uid for name in chosen]),
                sample=torch.tensor([name.sample for name in chosen]),
                replica=torch.tensor([self._replica[name] for name in chosen]),
            )
            batch = self._generator.collect(rows, do_sample=not greedy)
            for row, name in enumerate(chosen):
                self._collected[name] = batch, row

    def _metrics(self, record: StepRecord, elapsed_s: float) -> dict[str, float]:
        """staleness/: in versions, of the first token (mean, max) and the last (newest_mean).
        asynchrony/: the share of the time between two updates in which the generator drew nothing
        ahead, and in which the controller waited for rows."""
        elapsed_s = max(elapsed_s, 1e-9)
        metrics = {
            "asynchrony/generator_idle": max(0.0, 1 - record.generating_s / elapsed_s),
            "asynchrony/trainer_waits": min(1.0, record.waited_s / elapsed_s),
            "asynchrony/groups_in_flight": float(len(self._unfinished)),
        }
        if record.staleness:
            first, last = np.array(record.staleness), np.array(record.newest)
            metrics |= {
                "staleness/mean": float(first.mean()),
                "staleness/max": float(first.max()),
                "staleness/newest_mean": float(last.mean()),
                "staleness/versions_per_row": float((first - last + 1).mean()),
            }
        return metrics

    # What a checkpoint holds of rows that ended.

    def export(self, uids: Sequence[int]) -> dict[str, Any]:
        """The responses of these groups as plain JSON data, bit for bit."""
        chosen = set(uids)
        names = sorted(name for name in self._versions if name.uid in chosen)
        if not names:
            return {}
        batch = self._responses(names)
        return {
            "updates_per_step": self._updates_per_step,
            "rows": [list(name) for name in names],
            "versions": [list(self._versions[name]) for name in names],
            "columns": {column: packed(batch.block(column)) for column in batch.columns},
        }

    def restore(self, state: dict[str, Any]) -> list[int]:
        """Takes back what export returned; the uids of its groups."""
        if not state:
            return []
        self._updates_per_step = max(self._updates_per_step, state.get("updates_per_step", 1))
        blocks = {column: unpacked(block) for column, block in state["columns"].items()}
        batch = Batch.of_blocks(blocks, len(state["rows"]))
        uids: dict[int, None] = {}
        for row, (values, versions) in enumerate(
            zip(state["rows"], state["versions"], strict=True)
        ):
            name = RowName(*values)
            first, last = versions
            self._versions[name], self._replica[name] = (first, last), 0
            self._collected[name] = batch, row
            uids[name.uid] = None
        return list(uids)


class ColocatedStreamingActor(StreamingActor):
    """The same where one worker trains and generates: slices run while the controller waits for
    rows, until enough of them are there, and never for the longest response. The worker brings the
    generation engine the weights before a slice, where they have changed."""

    overlaps = False

    def join(self) -> None:
        self._changed = True

    def sync(self) -> None:
        """A slice of no steps, so that rows that are submitted after it are of these weights."""
        self._discard_on_generator()
        self._slices.append(start(self._generator.advance, 0))
        self._changed = False
