"""What the spawned processes of test_training.py do: all cases of all world sizes in one go."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.context import RankContext
from hybridflow.resharding.shards import Box
from tests.engines.fsdp_workers import data_rows, groups_per_layer
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences
from tests.ranks import worlds
from workers.config import (
    ContextExchange,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from workers.engines import engine_class
from workers.engines.base import Head, Outputs, WeightSource
from workers.engines.shared.sharded_engine import ShardedEngine
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=5e-3, weight_decay=0.1, clip_grad_norm=0.05, epsilon=1e-3)
"""With this epsilon rounding of a gradient is not blown up by AdamW's division."""
NUM_STEPS = 3
RANK, ALPHA = 4, 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a file name."""

    engine: str = "fsdp"
    world_size: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    exchange: ContextExchange = ContextExchange.auto
    zero: int = 2
    stages: int = 1
    """threed: of a pipeline rank."""
    family: str = "llama"
    head: Head = Head.lm
    layered: bool = False
    """fsdp: a group per layer, freed after the forward pass."""
    targets: str | tuple[str, ...] = "all-linear"
    precision: Precision = Precision.fp32

    @property
    def name(self) -> str:
        targets = "all" if self.targets == "all-linear" else "some"
        flags = [self.precision.value]
        if self.layered:
            flags.append("layered")
        sizes = f"w{self.world_size}t{self.tp}p{self.pp}z{self.zero}s{self.stages}"
        if self.cp > 1:
            sizes += f"c{self.cp}{self.exchange.value}"
        if self.ep > 1:
            sizes += f"e{self.ep}"
        return "-".join([self.engine, sizes, self.family, self.head.value, targets, *flags])


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    data: int
    outputs: Outputs | None
    """Before the first step, of its own rows."""
    base_outputs: Outputs | None
    """After the last step, of the same rows with the adapter left out."""
    base_before: dict[str, Tensor]
    base_after: dict[str, Tensor]
    trained: dict[str, Tensor]
    """Trained parameters after the last step."""
    merged: dict[str, Tensor]
    """Weights as a sync takes them, after the last step."""
    metrics: list[dict[str, float]] = field(default_factory=list)


def run_worlds(rank: int, root: Path, cases: list[Case]) -> None:
    """Worlds of 4, 2 and 1 ranks one after the other in the same processes."""
    for world_size in worlds(rank, root, (4, 2, 1)):
        for case in cases:
            if case.world_size == world_size:
                torch.save(train(rank, root, case), root / f"{case.name}.{rank}.pt")


def make_engine(
    case: Case, root: Path, rank: int, *, trains: bool = True, lender: ShardedEngine | None = None
) -> ShardedEngine:
    config = train_config(case)
    model = ModelConfig(path=str(root / case.family), new_head=True)
    if lender is not None:
        assert lender.lends_base(model, config)
    context = RankContext(rank=rank, world_size=case.world_size)
    with groups_per_layer(case.layered):
        engine = engine_class(case.engine)(
            model=model,
            config=config,
            head=case.head,
            context=context,
            trains=trains,
            lender=lender,
        )
    assert isinstance(engine, ShardedEngine)
    return engine


def train_config(case: Case) -> TrainConfig:
    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    return TrainConfig(
        engine=case.engine,
        tp=case.tp,
        pp=case.pp,
        cp=case.cp,
        ep=case.ep,
        cp_exchange=case.exchange,
        zero_stage=case.zero,
        pipeline_schedule="interleaved_1f1b" if case.stages > 1 else "1f1b",
        virtual_stages=case.stages,
        precision=case.precision,
        micro_batch_tokens=36,
        reshard_after_forward=case.layered,
        lora=LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets),
        optimizer=OPTIMIZER,
    )


def batches() -> list[Sequences]:
    return [make_sequences(10, seed) for seed in range(NUM_STEPS)]


def own_rows(engine: ShardedEngine, batch: Sequences, rank: int) -> Sequences:
    size, data = engine.layout.axis_size("dp"), engine.layout.coordinates(rank)["dp"]
    return batch.rows(data_rows(batch.num_rows, size, data))


def train(rank: int, root: Path, case: Case) -> Result:
    engine = make_engine(case, root, rank)
    rows = [own_rows(engine, batch, rank) for batch in batches()]
    outputs = engine.forward(rows[0], entropy=True, temperature=TEMPERATURE)
    base_before = whole(engine, engine.local_parameters())
    engine.save_pretrained(root / f"{case.name}.first")
    metrics = []
    for number, batch in enumerate(rows):
        if number == 2:
            engine.save(root / f"{case.name}.checkpoint")
            dist.barrier()
        metrics.append(engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE))
    with engine.base_only():
        base_outputs = engine.forward(rows[0], entropy=True, temperature=TEMPERATURE)
    engine.save_pretrained(root / f"{case.name}.last")
    source = engine.weight_source()
    with source.latest():
        merged = whole(engine, source.parameters)
    assert not any(memory_of(source)), "merged weights take no memory between syncs"
    trained = engine._gathered_trained()
    check_resumed(rank, root, case, metrics[2], trained)
    if engine.lends and case.head is Head.lm:
        check_shared(rank, root, case, engine)
    return Result(
        data=engine.layout.coordinates(rank)["dp"],
        outputs=outputs,
        base_outputs=base_outputs,
        base_before=base_before,
        base_after=whole(engine, engine.local_parameters()),
        trained=trained,
        merged=merged,
        metrics=metrics,
    )


def memory_of(source: WeightSource) -> list[int]:
    sizes = []
    for parameter in source.parameters:
        if parameter.name in source.transient:
            sizes += [shard.tensor.untyped_storage().nbytes() for shard in parameter.shards]
    return sizes


def check_resumed(
    rank: int, root: Path, case: Case, third: dict[str, float], trained: dict[str, Tensor]
) -> None:
    """The third step again, from the checkpoint after two, on the same layout: bit for bit."""
    engine = make_engine(case, root, rank)
    engine.load(root / f"{case.name}.checkpoint")
    rows = own_rows(engine, batches()[2], rank)
    metrics = engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)
    assert metrics == third, (metrics, third)
    again = engine._gathered_trained()
    assert all(torch.equal(again[name], value) for name, value in trained.items())


def check_shared(rank: int, root: Path, case: Case, policy: ShardedEngine) -> None:
    """A critic on the policy's base: the same memory, and outputs and a step as of a critic with a
    base of its own, bit for bit; the policy is not touched."""
    critic = replace(case, head=Head.value)
    rows = own_rows(policy, batches()[0], rank)
    before = policy.forward(rows, temperature=TEMPERATURE)
    alone = make_engine(critic, root, rank)
    sharing = make_engine(critic, root, rank, lender=policy)
    for engine in (alone, sharing):
        shared = frozen_memory(engine).items() & frozen_memory(policy).items()
        assert len(shared) == (len(frozen_memory(engine)) if engine is sharing else 0)
    expected, values = alone.forward(rows), sharing.forward(rows)
    if expected is not None:
        assert values is not None
        assert torch.equal(expected.values, values.values)
    metrics = [engine.train_step(rows, loss_fn) for engine in (alone, sharing)]
    assert metrics[0] == metrics[1]
    assert frozen_memory(sharing).items() <= frozen_memory(policy).items()
    after = policy.forward(rows, temperature=TEMPERATURE)
    if before is not None:
        assert torch.equal(before.log_probs, after.log_probs)


def frozen_memory(engine: ShardedEngine) -> dict[tuple[str, Box], int]:
    """Where every shard of the base lies."""
    trained = {p.name.removeprefix("model.") for p in engine.state(moments=False, copies=True)}
    addresses = {}
    for parameter in engine.local_parameters():
        if parameter.name not in trained:
            for shard in parameter.shards:
                addresses[parameter.name, shard.box] = shard.tensor.data_ptr()
    return addresses


def whole(engine: ShardedEngine, parameters: list) -> dict[str, Tensor]:
    """Every parameter, pasted together from the boxes of all ranks."""
    everywhere = [parameters] * dist.get_world_size()
    dist.all_gather_object(everywhere, parameters)
    result = {parameter.name: torch.full(parameter.shape, torch.nan) for parameter in parameters}
    for of_rank in everywhere:
        for parameter in of_rank:
            for shard in parameter.shards:
                result[parameter.name][shard.box.slices] = shard.tensor.detach().float()
    return result


def resumed_elsewhere(root: Path, checkpoint: Path, case: Case) -> tuple[float, dict[str, Tensor]]:
    """The third step of `case`, whose world is this process, from a checkpoint of another layout:
    (gradient norm, trained parameters)."""
    engine = make_engine(case, root, 0)
    engine.load(checkpoint)
    metrics = engine.train_step(batches()[2], loss_fn, entropy=True, temperature=TEMPERATURE)
    return metrics["grad_norm"], engine._gathered_trained()


def refuses_another_base(root: Path, checkpoint: Path, case: Case) -> None:
    engine = make_engine(case, root, 0)
    with pytest.raises(ValueError, match="its adapter was trained on other weights"):
        engine.load(checkpoint)
