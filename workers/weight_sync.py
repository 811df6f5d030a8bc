"""WeightSync: the actor's weights from the training layout into the generation engine, compiled once, attested every time.

Leaves out what the generation engine does with the weights it is given (its sink: workers/generation/).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.resharding import AttestationError, Attestor, Executor, ShardMap, compile, verify
from workers.engines.base import TrainingEngine
from workers.generation.base import GenerationEngine
from workers.generation.sink import WeightSink
from workers.sequences import Sequences

BUCKET_BYTES = 64 << 20
PROBE_TOKENS = 24
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one sync cost and how well the two engines agree."""

    seconds: float
    transfer_s: float
    attest_s: float
    commit_s: float
    probe_s: float
    received_bytes: int
    probe_gap: float
    """Mean absolute difference of the probe's log-probs between trainer and generation engine."""


class WeightSync:
    """sync = WeightSync(engine, generator, sink, probe_tolerance=1e-3, vocab_size=32000); report = sync.run(version)"""

    def __init__(
        self, engine: TrainingEngine, generator: GenerationEngine, sink: WeightSink, *, probe_tolerance: float, vocab_size: int
    ) -> None:
        self.engine = engine
        self.generator = generator
        self.sink = sink
        self.probe_tolerance = probe_tolerance
        self.probe = np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS)
        self._executor: Executor | None = None

    def _prepare(self) -> tuple[Executor, Attestor]:
        sources, destinations = self.engine.local_parameters(), self.sink.destinations()
        source, target = ShardMap.gather(sources), ShardMap.gather(destinations)
        plan = compile(source, target, bucket_bytes=BUCKET_BYTES)
        self.certificate = verify(plan)
        if dist.get_rank() == 0:
            LOGGER.info("resharding plan\n%s", self.certificate)
        return Executor(plan, sources, destinations), Attestor(plan.source, sources, plan.target, destinations)

    def run(self, version: int) -> SyncReport:
        """Moves, attests, commits and probes; raises AttestationError where the two sides differ. Collective."""
        started = time.perf_counter()
        if self._executor is None:
            self._executor, self._attestor = self._prepare()
        report = self._executor.run()
        moved = time.perf_counter()
        self._attestor.run()
        attested = time.perf_counter()
        self.sink.commit(version)
        committed = time.perf_counter()
        gap = self._probe()
        ended = time.perf_counter()
        return SyncReport(
            seconds=ended - started,
            transfer_s=moved - started,
            attest_s=attested - moved,
            commit_s=committed - attested,
            probe_s=ended - committed,
            received_bytes=report.received_bytes,
            probe_gap=gap,
        )

    def _probe(self) -> float:
        """Scores one fixed sequence on both sides; every rank takes part and learns the largest gap."""
        tokens = torch.from_numpy(self.probe)
        length = torch.tensor([len(tokens)])
        outputs = self.engine.forward(Sequences(token_ids=tokens, lengths=length, scored_lengths=length - 1))
        scored = torch.from_numpy(self.generator.score(self.probe.tolist()))
        # Only the last pipeline stage has the trainer's numbers; the others learn the gap by the reduction below.
        gap = (
            (outputs.log_probs.cpu() - scored).abs().mean()
            if outputs is not None and outputs.log_probs is not None
            else scored.new_zeros(())
        )
        gap = torch.nan_to_num(gap, nan=torch.inf).reshape(1)
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
        if float(gap) > self.probe_tolerance:
            raise AttestationError(
                f"probe: after a sync with equal digests the generation engine scores a fixed sequence {float(gap):.3g} per token away "
                f"from the trainer (probe_tolerance={self.probe_tolerance}): it computes with other weights or in another way. If the "
                "engines' precisions explain it, raise actor.probe_tolerance; otherwise do not train on"
            )
        return float(gap)
