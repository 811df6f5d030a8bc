"""WeightSync: moves the actor's weights from the training layout into the generation engine;
compiled once, attested every time.

A rank trains, generates, or does both: with both engines in one pool the group is the pool,
otherwise it spans two pools and every rank has one side. How the generation engine takes the
weights in is left to its weight destination (workers/generation/).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.progress import activity
from hybridflow.resharding import (
    AttestationError,
    Attestor,
    Executor,
    ParameterSpec,
    ReshardingPlan,
    ShardMap,
    compile,
    compile_cached,
    verify,
)
from hybridflow.resharding.transport import rank_in
from workers.engines.base import TrainingEngine, WeightSource
from workers.generation.base import GenerationEngine
from workers.generation.weight_destination import WeightDestination
from workers.process_memory import give_back
from workers.sequences import Sequences

BUCKET_BYTES = 64 << 20
LARGE_BUCKET_BYTES = 256 << 20
"""Bucket size of plans with many boxes (large models on many ranks): with fewer buckets 70B on
512 ranks compiles in 5 s, not in 31."""
PROBE_TOKENS = 16
"""Half of them are read as a prompt, half decoded one by one."""
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hybridflow" / "plans"
"""Directory of compiled plans; safe to delete."""
CACHED_BOXES = 20_000
"""Plans for at least this many boxes in both shard maps are cached on disk; a smaller plan
compiles in less than a second."""
LOGGER = logging.getLogger(__name__)
MakeDestination = Callable[[Sequence[ParameterSpec]], WeightDestination]


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """The cost of a sync for this rank, and the agreement of the two engines; commit and gap
    are 0 where the rank only trains."""

    seconds: float
    prepare_s: float
    """Shard maps, plan and buffers: the first time only."""
    transfer_s: float
    attest_s: float
    commit_s: float
    probe_s: float
    received_bytes: int
    shared_bytes: int
    """Bytes of generation weights that lie in the trainer's memory and need no copy."""
    probe_gap: float
    """Mean absolute difference of the probe's log-probs between trainer and generation engine, of
    the half where it is larger."""


class WeightSync:
    """sync = WeightSync(engine, generator, make_destination, probe_tolerance=1e-3,
    vocab_size=32000); report = sync.run(version)"""

    def __init__(
        self,
        engine: TrainingEngine | None,
        generator: GenerationEngine | None,
        make_destination: MakeDestination | None = None,
        *,
        probe_tolerance: float,
        vocab_size: int,
        node: str = "",
        group: dist.ProcessGroup | None = None,
        share_memory: bool = False,
        adapter: bool = False,
    ) -> None:
        """`group`: all ranks of both sides, those that train first (None: the pool). `node`:
        this rank's machine. `share_memory`: the generation engine may compute with the
        trainer's memory, because neither side ever gives its weights' memory back. `adapter`: the
        generation engine has the base, and is sent an adapter alone."""
        self.engine = engine
        self.generator = generator
        self.group = group
        self.node = node
        self.probe_tolerance = probe_tolerance
        self.probe = np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS)
        self.share_memory = share_memory
        self.destination: WeightDestination | None = None
        self.last: SyncReport | None = None
        self.attestor: Attestor | None = None
        """None before the first sync."""
        self.adapter = adapter
        self._make_destination = make_destination
        self._executor: Executor | None = None
        self._source = WeightSource(parameters=[])

    def run(self, version: int = 0) -> SyncReport:
        """Moves, attests, commits and probes; raises AttestationError where the two sides differ.
        Collective over the group.

        `version` counts where the rank trains. A rank that only trains is done when its weights
        have arrived and were attested.
        """
        times = [device_time()]
        # The trainer's pass may gather weights: before the memory for the transfer is there.
        version, expected = self._announce(version)
        # The trainer's pass gathered more at once than the rest of a sync needs.
        give_back("cuda" if torch.cuda.is_initialized() else "cpu")
        times.append(device_time())
        if self.destination is not None:
            self.destination.restore()
        if self._executor is None:
            self._source = self.make_source()
        with self._source.latest():
            if self._executor is None or self.attestor is None:
                with activity("compiling the resharding plan"):
                    self._executor, self.attestor = self._prepare()
            times.append(device_time())
            report = self._executor.run()
            times.append(device_time())
            attestation = self.attestor.start()
            times.append(device_time())
            if self.destination is not None:
                # The comparison is under way meanwhile; nothing is generated before it has
                # finished.
                self.destination.commit(version)
            times.append(device_time())
            attestation.finish()
            times.append(device_time())
        gap = self._probe(expected) if self.generator is not None else 0.0
        if self.destination is not None:
            # Only needed until the engine has taken the weights in: the next to use this memory is
            # the trainer's.
            self.destination.release()
        times.append(device_time())
        announce, prepare, transfer, sums, commit, compare, score = np.diff(times).tolist()
        self.last = SyncReport(
            seconds=times[-1] - times[0],
            prepare_s=prepare,
            transfer_s=transfer,
            attest_s=sums + compare,
            commit_s=commit,
            probe_s=announce + score,
            received_bytes=report.received_bytes,
            shared_bytes=report.shared_bytes,
            probe_gap=gap,
        )
        return self.last

    def reconnect(self, group: dist.ProcessGroup | None) -> None:
        """Goes on over another group, because ranks of the last one were restarted. The next run
        compiles its plan anew and is attested and probed like every one."""
        self.group = group
        self.attestor, self._executor, self.last = None, None, None

    def make_destination(self, parameters: Sequence[ParameterSpec]) -> WeightDestination:
        """The destination for the trainer's parameters, which is created once."""
        if self.destination is None:
            assert self._make_destination is not None, "a rank that generates has a destination"
            self.destination = self._make_destination(parameters)
        return self.destination

    def make_source(self) -> WeightSource:
        """This rank's side of a sync: nothing where it does not train."""
        if self.engine is None:
            return WeightSource(parameters=[])
        return self.engine.weight_source(adapter=self.adapter)

    def _prepare(self) -> tuple[Executor, Attestor]:
        sources, transient = self._source.parameters, self._source.transient
        source = ShardMap.gather(sources, self.group)
        destination = (
            self.make_destination(source.parameters) if self.generator is not None else None
        )
        if destination is not None and self.share_memory:
            destination.share([source for source in sources if source.name not in transient])
        destinations = destination.destinations() if destination is not None else []
        plan = make_plan(
            source, ShardMap.gather(destinations, self.group), machines(self.node, self.group)
        )
        self.certificate = verify(plan)
        if rank_in(self.group) == 0:
            LOGGER.info("resharding plan\n%s", self.certificate)
        return Executor(plan, sources, destinations, self.group), Attestor(
            plan.source, sources, plan.target, destinations, self.group
        )

    def _announce(self, version: int) -> tuple[int, Tensor]:
        """The trainer's version and its log-probs of the probe [tokens - 1], on every rank of
        the group."""
        table = torch.zeros(PROBE_TOKENS, dtype=torch.float64)
        if self.engine is not None:
            tokens, length = torch.from_numpy(self.probe), torch.tensor([PROBE_TOKENS])
            outputs = self.engine.forward(
                Sequences(token_ids=tokens, lengths=length, scored_lengths=length - 1)
            )
            layout = self.engine.layout
            if rank_in(self.group) == layout.rank(pp=layout.axis_size("pp") - 1):
                assert outputs is not None and outputs.log_probs is not None, (
                    "the last pipeline stage has the outputs"
                )
                table[0], table[1:] = version, outputs.log_probs.double().cpu()
        dist.all_reduce(table, group=self.group)
        return int(table[0]), table[1:].float()

    def _probe(self, expected: Tensor) -> float:
        """The largest gap, over ranks, between the engine's log-probs of a fixed sequence and the
        trainer's.

        Raises an AttestationError above the tolerance.
        """
        assert self.generator is not None
        scored = torch.from_numpy(self.generator.score(self.probe.tolist()))
        # Each half by itself: an engine may read prompts by other code than it generates.
        means = [part.mean() for part in (expected - scored).abs().tensor_split(2)]
        gap = torch.nan_to_num(torch.stack(means).max(), nan=torch.inf).reshape(1)
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
        if float(gap) > self.probe_tolerance:
            raise AttestationError(
                "probe: after a sync with equal digests the generation engine scores a fixed "
                f"sequence {float(gap):.3g} per token away from the trainer "
                f"(probe_tolerance={self.probe_tolerance}): it computes with other weights or in "
                "another way. If the engines' precisions explain it, raise actor.probe_tolerance; "
                "otherwise do not train on"
            )
        return float(gap)


def device_time() -> float:
    """The time when this process' GPU has done what it was given: transfers only order streams."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_plan(source: ShardMap, target: ShardMap, nodes: Sequence[int]) -> ReshardingPlan:
    """The plan between two maps; a plan that takes long to compile is cached on disk for the
    next run."""
    if len(source.rank) + len(target.rank) < CACHED_BOXES:
        return compile(source, target, bucket_bytes=BUCKET_BYTES, nodes=nodes)
    return compile_cached(source, target, CACHE, bucket_bytes=LARGE_BUCKET_BYTES, nodes=nodes)


def machines(node: str, group: dist.ProcessGroup | None) -> list[int]:
    """A number for the machine of every rank of the group, from the machines' addresses.
    Collective."""
    addresses = [""] * dist.get_world_size(group)
    dist.all_gather_object(addresses, node, group=group)
    distinct = list(dict.fromkeys(addresses))
    return list(map(distinct.index, addresses))
