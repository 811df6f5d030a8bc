"""What the spawned processes of test_replicas.py do: engine fsdp with replicas on four ranks (HSDP),
and the snapshots that it and plain FSDP leave to each other."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from hybridflow.resharding.shards import Box, LocalParameter
from tests.engines.fsdp_workers import gathered
from tests.engines.switch_workers import Case, Result, batches, make_engine, own_rows, train
from tests.engines.threed_cases import TEMPERATURE, loss_fn
from tests.ranks import worlds
from workers.engines.base import TrainingEngine

REPLICAS = {"fsdp_replicas": 2}
CASES = [
    Case(name="2x2", world_size=4, train=REPLICAS),
    Case(name="layered", world_size=4, train=REPLICAS, layered=True),
    Case(name="zero3", world_size=4, train=REPLICAS | {"reshard_after_forward": True}),
    Case(name="cp", world_size=4, train=REPLICAS | {"cp": 2}),
    Case(name="lora", world_size=4, train=REPLICAS | {"lora": {"rank": 2}}),
]
PLAIN = Case(name="plain", world_size=4)
HYBRID = CASES[0]
Boxes = list[list[tuple[str, list[Box]]]]
"""Of every rank, the boxes of every parameter."""


def run(rank: int, root: Path, cases: list[Case]) -> None:
    """Worlds of 4 and 1 one after the other."""
    for world_size in worlds(rank, root, (4, 1)):
        for case in cases:
            alone = Case(name=f"{case.name}-alone", train=without_ranks(case))
            if world_size == case.world_size:
                keep(rank, root, case, train(rank, root, case))
            elif world_size == 1:
                keep(rank, root, alone, train(rank, root, alone))
        if world_size == 4:
            snapshots(rank, root)


def without_ranks(case: Case) -> dict[str, object]:
    return {
        name: value for name, value in case.train.items() if name not in ("fsdp_replicas", "cp")
    }


def keep(rank: int, root: Path, case: Case, result: Result) -> None:
    if rank == 0:
        torch.save(result, root / f"{case.name}.pt")


def snapshots(rank: int, root: Path) -> None:
    """Two steps, a snapshot, the third step by each that reads it."""
    for case in (HYBRID, PLAIN):
        engine = make_engine(rank, root, case)
        for batch in batches()[:2]:
            step(engine, rank, batch)
        engine.save(root / f"snapshot-{case.name}")
        stored = engine.state(moments=True, copies=False)
        shards = everywhere([(parameter.name, boxes(parameter)) for parameter in stored])
        held = everywhere([(p.name, boxes(p)) for p in engine.local_parameters()])
        step(engine, rank, batches()[2])
        weights = gathered(engine)
        if rank == 0:
            torch.save((shards, held, weights), root / f"snapshot-{case.name}.pt")
        dist.barrier()
    for written, reader in ((HYBRID, PLAIN), (PLAIN, HYBRID), (HYBRID, HYBRID)):
        engine = make_engine(rank, root, reader)
        engine.load(root / f"snapshot-{written.name}")
        step(engine, rank, batches()[2])
        weights = gathered(engine)
        if rank == 0:
            torch.save(weights, root / f"{written.name}-to-{reader.name}.pt")
    engine.save_pretrained(root / "saved")


def step(engine: TrainingEngine, rank: int, batch: object) -> None:
    rows = own_rows(engine, batch, rank)  # type: ignore[arg-type]
    engine.train_step(rows, loss_fn, entropy=True, temperature=TEMPERATURE)


def boxes(parameter: LocalParameter) -> list[Box]:
    return [shard.box for shard in parameter.shards]


def everywhere(mine: list[tuple[str, list[Box]]]) -> Boxes:
    result: Boxes = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(result, mine)
    return result
