"""What the spawned processes of test_fsdp.py do: all cases of all world sizes in one go,
because starting processes is slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hybridflow.context import RankContext
from hybridflow.resharding.shards import Box
from tests.engines.threed_cases import TEMPERATURE, loss_fn, make_sequences
from tests.ranks import worlds
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines.base import Head, Outputs, TrainingEngine
from workers.engines.fsdp import sharding
from workers.engines.fsdp.engine import FsdpEngine
from workers.sequences import Sequences

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, clip_grad_norm=0.5, epsilon=1e-6)
"""With this epsilon rounding of a gradient is not blown up where a weight has next to no
gradient."""
NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run; name is unique and a file name."""

    world_size: int = 1
    tp: int = 1
    order: tuple[str, ...] = ("dp", "pp", "cp", "tp")
    model: str = "qwen2"
    head: Head = Head.lm
    num_rows: int = 10
    precision: Precision = Precision.fp32
    micro_batch_tokens: int = 36
    zero3: bool = False
    """reshard_after_forward, with a group per layer."""
    layered: bool = False
    """A group per layer, as a large model has, without reshard_after_forward."""
    checkpointing: bool = False
    offload: bool = False
    packing: bool = True

    @property
    def name(self) -> str:
        options = (
            ("zero3", self.zero3),
            ("layered", self.layered),
            ("ac", self.checkpointing),
            ("off", self.offload),
            ("blocks", not self.packing),
        )
        flags = [word for word, on in options if on]
        sizes = f"w{self.world_size}t{self.tp}{''.join(self.order)}r{self.num_rows}m{self.micro_batch_tokens}"
        return "-".join([sizes, self.model, self.head.value, self.precision.value, *flags])


@dataclass(kw_only=True, slots=True)
class Result:
    """What one rank saw."""

    data: int
    outputs: Outputs
    """Before the first step, of its own rows."""
    shards: list[tuple[str, tuple[int, ...], list[tuple[Box, Tensor]]]]
    """local_parameters after the last step."""
    whole: dict[str, Tensor]
    """Parameters gathered by PyTorch after the last step."""
    metrics: list[dict[str, float]] = field(default_factory=list)


def run_worlds(rank: int, root: Path, cases: list[Case]) -> None:
    """Worlds of 4, 2 and 1 ranks one after the other in the same processes."""
    for world_size in worlds(rank, root, (4, 2, 1)):
        for case in cases:
            if case.world_size == world_size:
                torch.save(train(rank, root, case), root / f"{case.name}.{rank}.pt")
        EXTRA[world_size](rank, root)


@contextmanager
def groups_per_layer(layered: bool) -> Iterator[None]:
    """Within, models are built with an FSDP group per layer, as large ones are."""
    one_group_bytes = sharding.ONE_GROUP_BYTES
    if layered:
        sharding.ONE_GROUP_BYTES = 0
    try:
        yield
    finally:
        sharding.ONE_GROUP_BYTES = one_group_bytes


def make_engine(case: Case, root: Path, rank: int) -> FsdpEngine:
    config = TrainConfig(
        tp=case.tp,
        rank_order=list(case.order),
        precision=case.precision,
        micro_batch_tokens=case.micro_batch_tokens,
        packing=case.packing,
        activation_checkpointing=case.checkpointing,
        reshard_after_forward=case.zero3,
        offload_optimizer=case.offload,
        optimizer=OPTIMIZER,
    )
    context = RankContext(rank=rank, world_size=case.world_size)
    with groups_per_layer(case.layered):
        return FsdpEngine(
            model=ModelConfig(path=str(root / case.model), new_head=True),
            config=config,
            head=case.head,
            context=context,
        )


def batches(case: Case) -> list[Sequences]:
    return [make_sequences(case.num_rows, seed) for seed in range(NUM_STEPS)]


def own_rows(engine: FsdpEngine, batch: Sequences, rank: int) -> Sequences:
    """A data rank's rows: uneven, and none for the last of four."""
    size, data = engine.layout.axis_size("dp"), engine.layout.coordinates(rank)["dp"]
    return batch.rows(data_rows(batch.num_rows, size, data))


def data_rows(num_rows: int, size: int, data: int) -> Tensor:
    parts = max(1, size - 1) if size == 4 else size
    return (
        torch.arange(num_rows)[data::parts] if data < parts else torch.zeros(0, dtype=torch.int64)
    )


def train(rank: int, root: Path, case: Case) -> Result:
    engine = make_engine(case, root, rank)
    rows = [own_rows(engine, batch, rank) for batch in batches(case)]
    outputs = engine.forward(rows[0], entropy=True, temperature=TEMPERATURE)

    def loss_of_reduced(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        if case.layered:
            assert unreduced_elements(engine) == 0, "micro-batches before this one are reduced"
        return loss_fn(outputs, sequences)

    metrics = []
    for batch in rows:
        metrics.append(
            engine.train_step(batch, loss_of_reduced, entropy=True, temperature=TEMPERATURE)
        )
    shards = [
        (
            parameter.name,
            parameter.shape,
            [(shard.box, shard.tensor.clone()) for shard in parameter.shards],
        )
        for parameter in engine.local_parameters()
    ]
    whole = gathered(engine)
    if case.head is not Head.score:
        engine.save_pretrained(root / f"{case.name}.hf")
    return Result(
        data=engine.layout.coordinates(rank)["dp"],
        outputs=outputs,
        shards=shards,
        whole=whole,
        metrics=metrics,
    )


def unreduced_elements(engine: FsdpEngine) -> int:
    """Elements of gradients of gathered parameters, which FSDP2 has not reduced."""
    count = 0
    for module in engine._scored.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    if parameter.unsharded_accumulated_grad is not None:
                        count += parameter.unsharded_accumulated_grad.numel()
                    if "_unsharded_param" in vars(parameter):
                        gradient = parameter._unsharded_param.grad
                        count += gradient.numel() if gradient is not None else 0
    return count


def gathered(engine: TrainingEngine) -> dict[str, Tensor]:
    """Every parameter, pasted together from the boxes of all ranks."""
    parameters = engine.local_parameters()
    everywhere = [parameters] * dist.get_world_size()
    dist.all_gather_object(everywhere, parameters)
    whole = {parameter.name: torch.full(parameter.shape, torch.nan) for parameter in parameters}
    for of_rank in everywhere:
        for parameter in of_rank:
            for shard in parameter.shards:
                whole[parameter.name][shard.box.slices] = shard.tensor
    return whole


def save_and_fail(rank: int, root: Path) -> None:
    """In a world of two: a checkpoint after two steps, the third step, and steps that go wrong."""
    case = Case(world_size=2, micro_batch_tokens=20)
    engine = make_engine(case, root, rank)
    rows = [own_rows(engine, batch, rank) for batch in batches(case)]
    for batch in rows[:2]:
        engine.train_step(batch, loss_fn, entropy=True, temperature=TEMPERATURE)
    engine.save(root / "checkpoint")
    before = gathered(engine)
    nothing_moves_when_a_step_fails(engine, rows[2])
    assert all(torch.equal(before[name], value) for name, value in gathered(engine).items())
    third = engine.train_step(rows[2], loss_fn, entropy=True, temperature=TEMPERATURE)
    after = gathered(engine)
    resumed = make_engine(case, root, rank)
    resumed.forward(rows[0])
    metrics, weights = third_step(resumed, root, rank)
    assert metrics == third, (metrics, third)
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match="neither a directory with a Hugging Face config"):
        make_engine(Case(world_size=2, model="nothing"), root, rank)
    with pytest.raises(ValueError, match="weights do not fit"):
        make_engine(Case(world_size=2, model="broken"), root, rank)
    resume_here(rank, root, 2)


def nothing_moves_when_a_step_fails(engine: FsdpEngine, batch: Sequences) -> None:
    def infinite(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = loss_fn(outputs, sequences)
        return loss * torch.inf, {}

    with pytest.raises(
        RuntimeError,
        match=r"grad_norm is nan: the gradient is not finite in model\.embed_tokens\.weight",
    ):
        engine.train_step(batch, infinite, entropy=True)

    calls = 0

    def raises(outputs: Outputs, sequences: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("advantages")
        return loss_fn(outputs, sequences)

    with pytest.raises(KeyError):
        engine.train_step(batch, raises, entropy=True)


def resume_here(rank: int, root: Path, world_size: int) -> None:
    """The third step from the checkpoint, on another layout."""
    engine = make_engine(Case(world_size=world_size, tp=2 if world_size > 1 else 1), root, rank)
    found = third_step(engine, root, rank)
    if rank == 0:
        torch.save(found, root / f"resumed.{world_size}.pt")


def third_step(
    engine: FsdpEngine, root: Path, rank: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    engine.load(root / "checkpoint")
    rows = own_rows(engine, batches(Case())[2], rank)
    metrics = engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)
    return metrics, gathered(engine)


def save_on_four(rank: int, root: Path) -> None:
    """Nothing more in a world of four: the checkpoint is made later, by two ranks."""


def load_on_one(rank: int, root: Path) -> None:
    resume_here(rank, root, 1)


EXTRA = {4: save_on_four, 2: save_and_fail, 1: load_on_one}
