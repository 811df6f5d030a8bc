"""TrainedWorker: the base of every role that is trained (policy, actor, critic, preference model).

It counts updates and saves the count with the checkpoint, because the order of the mini-batches in
an update's later epochs depends on it. The losses are left to the roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError

from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.results import Metrics
from hybridflow.seeds import combine_seed
from hybridflow.snapshots.files import Written, check_file, file_name
from hybridflow.snapshots.flush import Flushed, Flusher
from hybridflow.snapshots.memory import Stager
from hybridflow.snapshots.reading import Check, FilesMissing, SnapshotFiles
from workers.engines.base import Head, LossFn
from workers.images import ImageProcessor, sees_images
from workers.mini_batches import MiniBatches, mean_over_steps, train_on
from workers.model_worker import ModelWorker
from workers.not_finite import NotFinite
from workers.process_memory import (
    begin_peak,
    device_bytes,
    give_back,
    most_bytes,
    peak_bytes,
    retained_bytes,
)
from workers.roles import TrainedRole
from workers.sequences import Sequences
from workers.text import end_token_ids, save_endings
from workers.tokenizer import load_tokenizer


class TrainedWorker(ModelWorker, TrainedRole):
    """A role's update is three lines:

    mini_batches = self.mini_batches(batch, sequences_of(batch, ("returns",)))
    steps = mini_batches.steps(num_epochs, self.update_seed, Aggregation.token_mean)
    return self.update(mini_batches, steps, loss_fn)
    """

    prefix: ClassVar[str]
    """Prefix of the role's metrics."""

    def __init__(self, config: Any, context: RankContext) -> None:
        super().__init__(config, context)
        self.not_finite = NotFinite(self.config.train.optimizer)
        self.num_updates = 0
        """Updates so far, over all runs that the checkpoint comes from."""
        self._stager, self._flusher = Stager(), Flusher(check_file)
        self._staged: Path | None = None
        """The file that was staged last."""

    @property
    def update_seed(self) -> int:
        """Decides the order of this update's mini-batches from the second pass over the batch
        on."""
        return combine_seed(self.config.seed, self.num_updates)

    def mini_batches(self, batch: Batch, sequences: Sequences) -> MiniBatches:
        """The mini-batches of `sequences`, the rows of `batch`: by its column mini_batch, or a
        single one. Collective."""
        labels = batch.tensor("mini_batch") if "mini_batch" in batch else None
        return MiniBatches(sequences, labels, self.layout, self.context.device)

    def update(
        self,
        mini_batches: MiniBatches,
        steps: Iterable[Sequences],
        loss_fn: LossFn,
        temperature: float = 1.0,
    ) -> Metrics:
        """Takes one optimizer step for each of `steps`, which are steps of `mini_batches`."""
        self.to_training()
        self.not_finite.begin_update()
        with self.measured_memory() as memory:
            metrics = train_on(
                self.engine,
                mini_batches,
                steps,
                loss_fn,
                self.not_finite,
                temperature=temperature,
            )
        self.num_updates += 1
        return mean_over_steps(metrics, self.prefix) | memory

    @contextmanager
    def measured_memory(self) -> Iterator[dict[str, float]]:
        """Yields what becomes, with the end of the body, this rank's peak in it and what its
        allocator keeps of freed memory."""
        device, memory = self.context.device, dict[str, float]()
        begin_peak(device)
        yield memory
        memory[f"{self.prefix}/memory/peak_bytes"] = float(peak_bytes(device))
        memory[f"{self.prefix}/memory/retained_bytes"] = float(retained_bytes(device))
        if device.startswith("cuda"):
            memory[f"{self.prefix}/memory/device_bytes"] = float(device_bytes(device))
        give_back(device)

    def counters(self) -> dict[str, int]:
        """The numbers that training goes on from, besides the engine's state."""
        return {"num_updates": self.num_updates}

    def load_counters(self, counters: dict[str, int]) -> None:
        """Puts back what counters() returned."""
        self.num_updates = counters["num_updates"]

    def save_checkpoint(self, directory: str) -> None:
        self.engine.save(Path(directory), self.counters())

    def try_checkpoint(self, directory: str) -> str:
        try:
            self.save_checkpoint(directory)
        except OSError as error:
            return f"{self.prefix} rank {self.context.rank}: {error}"
        return ""

    def load_checkpoint(self, directory: str, stamp: str | None = None) -> None:
        self.load_counters(self.engine.load(Path(directory), stamp))

    def stage_snapshot(self, directory: str, stamp: str, keep: tuple[str, ...]) -> Written:
        engine, rank = self.engine, self.context.rank
        state = engine.state(moments=engine.num_steps > 0, copies=False)
        scalars = engine.scalars(self.counters())
        contents = self._stager.contents(state, scalars, stamp)
        path = Path(directory) / self._snapshot_name / file_name(rank)
        kept = list(map(Path, keep))
        if self._flusher.source is not None and self._flusher.result(wait=False) is None:
            kept.append(self._flusher.source.parents[1])
        try:
            digests = self._stager.stage(path, contents, kept)
        except OSError as error:
            return Written.failed(f"{self._snapshot_name} rank {rank}: {error}")
        self._staged = path
        names: tuple[str, ...] = ()
        if rank == 0:
            names = tuple(parameter.name for parameter in state)
        return Written(names=names, digests=digests, num_bytes=contents.num_bytes)

    def flush_snapshot(self, directory: str) -> None:
        assert self._staged is not None, "flush_snapshot before stage_snapshot"
        target = Path(directory) / self._snapshot_name / self._staged.name
        self._flusher.start(self._staged, target)

    def flush_result(self, wait: bool) -> tuple[Flushed, ...]:
        result = self._flusher.result(wait=wait)
        return () if result is None else (result,)

    def check_snapshot(self, directory: str, stamp: str) -> Check:
        engine, context = self.engine, self.context
        try:
            files = SnapshotFiles(Path(directory), stamp)
            moments = files.scalars["num_steps"] > 0
            files.check_cover(engine.state(moments=moments, copies=True))
            for file in files.files:
                if int(file.path.stem) % context.world_size == context.rank:
                    file.check()
        except (OSError, ValueError) as error:
            missing = isinstance(error, FilesMissing | FileNotFoundError)
            return Check(problem=str(error), is_missing=missing)
        return Check()

    def drop_snapshots(self) -> None:
        self._flusher.give_up()
        self._stager.clear()
        self._staged = None

    @property
    def _snapshot_name(self) -> str:
        """The role's name in the run: a pool may hold two roles of one class."""
        return self.context.role or self.prefix

    def save_pretrained(self, directory: str) -> None:
        """Writes weights, tokenizer, chat template and the tokens that end a response as a
        Hugging Face directory."""
        self.engine.save_pretrained(Path(directory))
        self._save_tokenizer(directory)

    def export_model(self, directory: str) -> str:
        try:
            self.save_pretrained(directory)
        except (OSError, SafetensorError) as error:
            return f"{self.prefix} rank {self.context.rank}: {error}"
        return ""

    def try_saving(self, directory: str) -> int:
        try:
            num_bytes = self.engine.try_saving(Path(directory))
            self._save_tokenizer(directory)
        except Exception as error:  # of transformers' writers or the model's own code
            raise ValueError(
                f"{self.prefix}: a model like {self.model.path!r} can't be saved to {directory}: "
                f"{type(error).__name__}: {error}; correct that file of the model, or choose another "
                "output_dir"
            ) from error
        return num_bytes

    def _save_tokenizer(self, directory: str) -> None:
        if self.context.rank == 0:
            tokenizer = load_tokenizer(self.model)
            tokenizer.save_pretrained(directory)
            if sees_images(self.model):
                ImageProcessor(self.model).save(directory)
            if self.head is Head.lm:
                save_endings(Path(directory), end_token_ids(self.model, tokenizer=tokenizer))

    def peak_memory_bytes(self) -> int:
        device_bytes(self.context.device)
        return most_bytes(self.context.device)
