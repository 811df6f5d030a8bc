"""Stage A: a training engine as rank 0 of a world on a hollow GPU; one process for each engine.

    python -m benchmarks.rehearsal.case DIRECTORY fsdp 8
    python -m benchmarks.rehearsal.case DIRECTORY threed 4 tp=2
    python -m benchmarks.rehearsal.case DIRECTORY fsdp 8 experts ep=4

A name of models.py (experts, images) takes that model, `episodes` rows with turns of an environment;
lora=8, cp_exchange=ring and every other integer are settings of TrainConfig. Prints a JSON list of
rows {stage, case, launches, syncs, copies, peak_bytes}: the engine's build, what a forward pass and a
training step cost for each micro-batch, and what a snapshot in memory costs.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.rehearsal.models import MAKERS
from benchmarks.rehearsal.rows import sequences
from hybridflow.context import RankContext
from hybridflow.resharding import (
    Attestor,
    Executor,
    LocalParameter,
    LocalShard,
    ShardMap,
    compile,
)
from hybridflow.resharding.transport import Message
from hybridflow.snapshots.memory import Stager
from workers.config import (
    ContextExchange,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from workers.engines import engine_class
from workers.engines.base import Head, LossFn, TrainingEngine
from workers.losses.config import PolicyLossConfig, ValueLossConfig
from workers.losses.policy import policy_loss
from workers.losses.value import value_loss

MICRO_BATCH_TOKENS, MICRO_BATCHES = 128, 2
EPISODES = "episodes"
"""Rows with turns of an environment, on the dense model."""
DENSE = "dense"
LOSSES: dict[Head, LossFn] = {
    Head.lm: policy_loss(PolicyLossConfig()),
    Head.value: value_loss(ValueLossConfig()),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the host asks of the GPU in one case."""

    stage: str
    case: str
    launches: float
    syncs: float
    copies: float
    peak_bytes: int
    """On the device, of all that is alive."""
    predicted_bytes: int | None = None
    """By the mapper, for models of full width only (memory.py)."""
    pageable: float = 0.0
    """Copies that the host waits for, and so for all that was launched before."""


class Counter:
    """with Counter(rows, hollow, "fsdp lm forward", divisor): ..."""

    def __init__(self, rows: list[Row], hollow: Hollow, case: str, parts: int = 1) -> None:
        self.rows, self.hollow, self.case, self.parts = rows, hollow, case, parts

    def _now(self) -> tuple[int, int, int, int]:
        hollow = self.hollow
        return hollow.launches, hollow.syncs.total(), hollow.copies, hollow.pageable

    def __enter__(self) -> None:
        self.before = self._now()
        self.hollow.memory.peak = self.hollow.memory.live

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        used = [
            (now - before) / self.parts
            for now, before in zip(self._now(), self.before, strict=True)
        ]
        launches, syncs, copies, pageable = used
        if error is None:
            row = Row(
                stage="A",
                case=self.case,
                launches=launches,
                syncs=syncs,
                copies=copies,
                pageable=pageable,
                peak_bytes=self.hollow.memory.peak,
            )
            self.rows.append(row)


def run_engine(
    hollow: Hollow, directory: Path, kind: str, config: TrainConfig, world_size: int, head: Head
) -> list[Row]:
    rows: list[Row] = []
    name = config.engine
    layout = f"{name} {describe(config)} on {world_size}, {head.value}"
    if kind != DENSE:
        layout = f"{layout} with {kind}"
    context = RankContext(role="actor", rank=0, world_size=world_size, device="cuda:0")
    with Counter(rows, hollow, f"{layout}: build"):
        engine = engine_class(name)(
            model=ModelConfig(path=str(directory)), config=config, head=head, context=context
        )
    batch = sequences(head, kind)
    with Counter(rows, hollow, f"{layout}: forward", MICRO_BATCHES):
        engine.forward(batch)
    with Counter(rows, hollow, f"{layout}: train step", MICRO_BATCHES):
        engine.train_step(batch, LOSSES[head])
    if head is Head.lm:
        rows += snapshot_rows(hollow, engine, f"{layout}: snapshot", directory / "memory")
    if name != "deepspeed":  # its master weights get other data, which a FakeTensor can't take
        with Counter(rows, hollow, f"{layout}: offload"):
            engine.offload()
        if head is Head.lm:
            name = f"{layout}: snapshot, states on the host"
            rows += snapshot_rows(hollow, engine, name, directory / "offloaded")
        with Counter(rows, hollow, f"{layout}: onload"):
            engine.onload()
    if head is Head.lm and kind == DENSE and not config.lora.enabled:
        rows += sync_rows(hollow, engine, layout, world_size)
    return rows


def describe(config: TrainConfig) -> str:
    sizes = {"tp": config.tp, "cp": config.cp, "pp": config.pp, "ep": config.ep}
    words = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if config.cp_exchange is not ContextExchange.auto:
        words.append(config.cp_exchange.value)
    if config.engine == "deepspeed":
        words.append(f"ZeRO-{config.zero_stage}")
    if config.lora.enabled:
        words.append("LoRA")
    return " ".join(words) or "tp=1"


def snapshot_rows(hollow: Hollow, engine: TrainingEngine, case: str, directory: Path) -> list[Row]:
    """The third snapshot of a step in the node's memory: the first two take the memory."""
    rows: list[Row] = []
    stager, place = Stager(), directory / "1" / "0"
    for step in range(3):
        target, used = place / f"step{step}" / "actor" / "rank0.safetensors", list[Row]()
        with Counter(used, hollow, case):
            state = engine.state(moments=True, copies=False)
            contents = stager.contents(state, engine.scalars(), stamp=str(step))
            stager.stage(target, contents, keep=[place / f"step{step - 1}"])
        rows = used
    return rows


def sync_rows(hollow: Hollow, engine: TrainingEngine, layout: str, world_size: int) -> list[Row]:
    """What moving and attesting the weights costs for each parameter: rank 0's shards to memory of
    the same boxes in bfloat16, and to another pool."""
    if world_size > 1:
        return []  # a plan needs every rank's boxes
    rows: list[Row] = []
    sources = engine.local_parameters()
    targets = []
    for parameter in sources:
        shards = []
        for shard in parameter.shards:
            memory = torch.empty_like(shard.tensor, dtype=torch.bfloat16)
            shards.append(LocalShard(shard.box, memory))
        targets.append(
            LocalParameter(parameter.name, parameter.shape, torch.bfloat16, tuple(shards))
        )
    source, target = ShardMap.gather(sources), ShardMap.gather(targets)
    plan = compile(source, target, bucket_bytes=1 << 20, nodes=[0])
    executor = Executor(plan, sources, targets)
    attestor = Attestor(plan.source, sources, plan.target, targets)
    with Counter(rows, hollow, f"{layout}: sync, a parameter", len(sources)):
        executor.run()
    with Counter(rows, hollow, f"{layout}: attestation, a parameter", len(sources)):
        attestor.start()
    apart = compile(
        source.relabel([0], 2), target.relabel([1], 2), bucket_bytes=1 << 20, nodes=[0, 1]
    )
    sender = Executor(apart, sources, [], transport=Sent())
    with Counter(rows, hollow, f"{layout}: sync to another pool, a parameter", len(sources)):
        sender.run()
    return rows


class Sent:
    """A transport whose messages are on their way at once; this process is rank 0."""

    rank = 0

    def post(
        self, receives: Sequence[Message], sends: Sequence[Message]
    ) -> tuple[list[Callable[[], None]], Callable[[], None]]:
        return [], lambda: None


def main(directory: Path, name: str, world_size: int, *changes: str) -> list[Row]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    become_gpu()
    kinds = [change for change in changes if "=" not in change] or [DENSE]
    (kind,) = kinds
    model = directory / (DENSE if kind == EPISODES else kind)
    if not (model / "config.json").exists():
        MAKERS[model.name](model)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    pairs = (change.split("=") for change in changes if "=" in change)
    settings: dict[str, Any] = {}
    for key, value in pairs:
        settings[key] = ContextExchange(value) if key == "cp_exchange" else int(value)
    if "lora" in settings:
        settings["lora"] = LoraConfig(rank=settings["lora"])
    config = TrainConfig(
        engine=name,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        precision=Precision.bf16,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        **settings,
    )
    rows: list[Row] = []
    with Hollow() as hollow:
        for head in LOSSES:
            rows += run_engine(hollow, model, kind, config, world_size, head)
    return rows


if __name__ == "__main__":
    results = main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    print(json.dumps([asdict(row) for row in results]))
