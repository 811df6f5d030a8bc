"""The actor in two pools: one trains, the other generates, and weights go from shards to shards
past the controller.

The algorithm's page sees one actor (SplitActor). Before a generation, if the weights have changed,
the controller starts sync_weights on both pools, one straight after the other and before it waits
for anything. A host runs its calls in the order in which they were started, so both pools reach the
two halves of a sync at the same place of one common order: neither can wait for a call that stands
behind its own half, and no deadlock is possible. If a process dies, its peers' sockets close and
the controller names it. The training pool is free again as soon as its weights have arrived and
were attested; taking them in and the probe are the generation pool's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar

from hybridflow import spanning
from hybridflow.batch import Batch
from hybridflow.context import RankContext
from hybridflow.group import each, start
from hybridflow.layout import Layout
from hybridflow.pool import ResourcePool
from hybridflow.results import Metrics
from hybridflow.snapshots.files import Written
from hybridflow.snapshots.flush import Flushed
from hybridflow.snapshots.reading import Check
from workers.actor import sync_metrics
from workers.actor_training import ActorTrainingWorker
from workers.adapter_sync import sends_adapter
from workers.generation.config import SamplingConfig
from workers.layouts import generation_layout, training_layout
from workers.losses.config import DPOLossConfig
from workers.precision import with_native_precision
from workers.role_config import ActorConfig
from workers.roles import Actor, Progress, SplitGenerator, SplitTrainer
from workers.row_stream import RowStream, Stream
from workers.sampler import Sampler, further_writes, probe_settings
from workers.weight_sync import WeightSync


class SplitTrainingWorker(ActorTrainingWorker, SplitTrainer):
    """Trains and sends."""

    sync: WeightSync | None = None
    _meeting: spanning.MeetingPoint | None = None

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        return {"train": training_layout(config.train, world_size, "actor")}

    def open_meeting(self, host: str, num_ranks: int) -> str:
        if self.context.rank:
            return ""
        self._meeting = spanning.MeetingPoint(host or self.context.node, size=num_ranks)
        return self._meeting.address

    def join(self, meeting: str, num_ranks: int, host: str, timeout_s: float) -> None:
        context = self.context
        group = spanning.join(
            meeting,
            rank=context.rank,
            size=num_ranks,
            host=host or context.node,
            device=context.device,
            timeout_s=timeout_s,
            point=self._meeting,
        )
        if self.sync is not None:
            self.sync.reconnect(group)
            return
        tolerance, vocab_size = probe_settings(self.config)
        self.sync = WeightSync(
            self.engine,
            None,
            probe_tolerance=tolerance,
            vocab_size=vocab_size,
            node=context.node,
            group=group,
            adapter=sends_adapter(self.config),
        )

    def sync_weights(self) -> dict[str, float]:
        assert self.sync is not None, "join comes first"
        self.sync.run(self.weight_version)
        return sync_metrics(self.sync)


class GenerationWorker(SplitGenerator):
    """Receives and generates."""

    config: ActorConfig
    sampler_class: ClassVar[type[Sampler]] = Sampler
    sync: WeightSync | None = None

    def __init__(self, config: ActorConfig, context: RankContext) -> None:
        super().__init__(with_native_precision(config, context.device), context)
        if config.generation.release_during_training:
            raise ValueError(
                "actor.generation.release_during_training is true, but generation has a pool of "
                "its own; set it to false"
            )
        self.sampler = self.sampler_class(
            self.config,
            context,
            self.layouts(config, context.world_size)["generation"],
            adapter=sends_adapter(self.config),
        )
        self.stream = self.make_stream()

    @classmethod
    def layouts(cls, config: ActorConfig, world_size: int) -> dict[str, Layout]:
        return {"generation": generation_layout(config.generation, world_size, "actor")}

    @classmethod
    def further_writes(cls, config: ActorConfig) -> dict[str, tuple[str, ...]]:
        return further_writes(config)

    def join(self, meeting: str, num_ranks: int, host: str, timeout_s: float) -> None:
        context = self.context
        # The ranks that train come first.
        rank = num_ranks - context.world_size + context.rank
        group = spanning.join(
            meeting,
            rank=rank,
            size=num_ranks,
            host=host or context.node,
            device=context.device,
            timeout_s=timeout_s,
        )
        if self.sync is not None:
            self.sync.reconnect(group)
            return
        tolerance, vocab_size = probe_settings(self.config)
        self.sync = WeightSync(
            None,
            self.sampler.engine,
            self.sampler.make_destination,
            probe_tolerance=tolerance,
            vocab_size=vocab_size,
            node=context.node,
            group=group,
            adapter=sends_adapter(self.config),
        )

    def sync_weights(self) -> dict[str, float]:
        assert self.sync is not None, "join comes first"
        self.sync.run()
        return sync_metrics(self.sync)

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        return self.sampler.generate(prompts, sampling, do_sample=do_sample)

    def make_stream(self) -> Stream:
        """The rows that are drawn in slices."""
        return RowStream(self.sampler)

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None:
        self.stream.submit(prompts, do_sample=do_sample)

    def advance(self, limit: int) -> Progress:
        return self.stream.advance(limit)

    def collect(self, rows: Batch, *, do_sample: bool = True) -> Batch:
        return self.stream.collect(rows, do_sample=do_sample)

    def discard(self) -> None:
        self.stream.discard()

    def close(self) -> None:
        self.stream.close()
        self.sampler.close()


class SplitActor(Actor):
    """Both halves behind the actor's methods, on the controller.

    trainer = spawn(SplitTrainingWorker, training_pool, config, role="actor")
    generator = spawn(GenerationWorker, generation_pool, config, role="generation")
    actor = SplitActor.of(trainer, generator, training_pool, generation_pool)
    """

    def __init__(
        self, trainer: SplitTrainer, generator: SplitGenerator, pools: Sequence[ResourcePool] = ()
    ) -> None:
        """`pools`: those of trainer and generator."""
        self._trainer, self._generator = trainer, generator
        self.pools = tuple(pools)
        self._changed = True
        """Whether the weights changed since the generation pool got them."""
        self._sync = Metrics()

    @classmethod
    def of(
        cls,
        trainer: SplitTrainer,
        generator: SplitGenerator,
        training: ResourcePool,
        generation: ResourcePool,
    ) -> SplitActor:
        """Brings the two pools together; returns when all their ranks are in one group."""
        actor = cls(trainer, generator, (training, generation))
        actor.join()
        return actor

    def join(self) -> None:
        """Brings the pools together, again after one of them was restarted; the next generation
        then begins with a sync."""
        training, generation = self.pools
        nodes = set()
        for pool in self.pools:
            nodes |= {pool.node(rank) for rank in range(pool.size)}
        host = spanning.LOOPBACK if len(nodes) == 1 else ""
        num_ranks = training.size + generation.size
        meeting = each(self._trainer.open_meeting, host, num_ranks)[0]
        timeout_s = training.spec.collective_timeout_s
        joining = [
            start(self._trainer.join, meeting, num_ranks, host, timeout_s),
            start(self._generator.join, meeting, num_ranks, host, timeout_s),
        ]
        for ranks in joining:
            ranks.wait()
        self._changed = True
        self._sync = Metrics()

    def generate_sequences(
        self, prompts: Batch, sampling: SamplingConfig | None = None, *, do_sample: bool = True
    ) -> Batch:
        if self._changed:
            self.sync()
        return self._generator.generate_sequences(prompts, sampling, do_sample=do_sample)

    def sync(self) -> None:
        """Starts both halves of a sync."""
        start(self._trainer.sync_weights)
        received = start(self._generator.sync_weights)
        self._sync = Metrics(sources=[lambda: received[0]])
        self._changed = False

    def current_version(self) -> int:
        return each(self._trainer.current_version)[0]

    def compute_log_prob(self, batch: Batch) -> Batch:
        return self._trainer.compute_log_prob(batch)

    def update_actor(self, batch: Batch) -> Metrics:
        return self._train(self._trainer.update_actor, batch)

    def update_supervised(self, batch: Batch) -> Metrics:
        return self._train(self._trainer.update_supervised, batch)

    def update_dpo(self, batch: Batch, loss: DPOLossConfig) -> Metrics:
        return self._train(self._trainer.update_dpo, batch, loss)

    def update_distilled(self, batch: Batch) -> Metrics:
        return self._train(self._trainer.update_distilled, batch)

    def _train(self, update: Callable[..., Metrics], *arguments: Any) -> Metrics:
        """Every update, of which kind ever, goes through here."""
        self._changed = True
        return update(*arguments) | self._sync

    def save_checkpoint(self, directory: str) -> None:
        self._trainer.save_checkpoint(directory)

    def try_checkpoint(self, directory: str) -> str:
        return next(filter(None, each(self._trainer.try_checkpoint, directory)), "")

    def load_checkpoint(self, directory: str, stamp: str | None = None) -> None:
        self._changed = True
        self._trainer.load_checkpoint(directory, stamp)

    def stage_snapshot(self, directory: str, stamp: str, keep: tuple[str, ...]) -> Written:
        """All training ranks' answers in one."""
        return Written.total(each(self._trainer.stage_snapshot, directory, stamp, keep))

    def flush_snapshot(self, directory: str) -> None:
        self._trainer.flush_snapshot(directory)

    def flush_result(self, wait: bool) -> tuple[Flushed, ...]:
        answers = each(self._trainer.flush_result, wait)
        return tuple(chain.from_iterable(answers)) if all(answers) else ()

    def check_snapshot(self, directory: str, stamp: str) -> Check:
        """The first rank's that can't; damage before what is missing."""
        checks = each(self._trainer.check_snapshot, directory, stamp)
        failed = [check for check in checks if check.problem]
        return min(failed, key=lambda check: check.is_missing, default=Check())

    def drop_snapshots(self) -> None:
        self._trainer.drop_snapshots()

    def save_pretrained(self, directory: str) -> None:
        self._trainer.save_pretrained(directory)

    def export_model(self, directory: str) -> str:
        return next(filter(None, each(self._trainer.export_model, directory)), "")

    def try_saving(self, directory: str) -> int:
        return max(each(self._trainer.try_saving, directory))

    def peak_memory_bytes(self) -> int:
        """The most that a training rank held."""
        return max(each(self._trainer.peak_memory_bytes))
