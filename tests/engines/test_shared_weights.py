"""Weights that data ranks of one machine share: what the kernel maps, and what a pass computes with.

tests/engines/test_fsdp.py compares engines that share with plain PyTorch.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.engines.fsdp_workers import Case, batches, make_engine, own_rows
from tests.engines.threed_cases import save_tiny_model
from tests.ranks import run_ranks, worlds
from workers.config import Precision
from workers.engines.fsdp.shared_weights import PREFIX, mapped, shared_memory

NUM_BYTES = 1 << 20


def bytes_mapped() -> int:
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if PREFIX in line:
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            total += last - first
    return total


def check_memory(rank: int, root: Path) -> None:
    for _ in worlds(rank, root, (2,)):
        assert dist.group.WORLD is not None
        memory = shared_memory(NUM_BYTES, dist.group.WORLD)
        assert memory is not None
        memory[rank] = rank + 1
        dist.barrier()
        assert memory[:3].tolist() == [1, 2, 0]
        assert bytes_mapped() == NUM_BYTES
        del memory
        assert bytes_mapped() == 0


def refuse(name: str) -> int:
    raise OSError(f"no memory for {name}")


def check_refusal(rank: int, root: Path) -> None:
    os.memfd_create = refuse
    for _ in worlds(rank, root, (2,)):
        assert dist.group.WORLD is not None
        assert shared_memory(NUM_BYTES, dist.group.WORLD) is None


def test_a_system_that_refuses_it_leaves_each_rank_its_own(tmp_path: Path) -> None:
    run_ranks(check_refusal, (tmp_path,), 2)


def test_all_ranks_have_one_memory_which_ends_with_them(tmp_path: Path) -> None:
    run_ranks(check_memory, (tmp_path,), 2)


def check_engine(rank: int, root: Path) -> None:
    for size in worlds(rank, root, (2,)):
        for layered in (False, True):
            case = Case(world_size=size, model="llama", layered=layered)
            gc.collect()  # the engine before
            elsewhere = bytes_mapped()
            engine = make_engine(case, root, rank)
            rows = own_rows(engine, batches(case)[0], rank)
            before = engine.forward(rows).log_probs
            elements = 0
            for parameter in engine.local_parameters():
                if parameter.shape[0] % size == 0:  # not the embeddings, whose vocabulary is odd
                    elements += torch.Size(parameter.shape).numel()
            # Rounded up to pages, once for each FSDP group.
            has = bytes_mapped() - elsewhere
            assert 4 * elements <= has < 4 * elements + 20 * 4096, (has, 4 * elements)
            # Only rank 1 changes its shards, which rank 0 computes with too.
            changed = rank == 1
            for parameter in engine.local_parameters() if changed else ():
                for shard in parameter.shards:
                    shard.tensor.mul_(1.5)
            dist.barrier()
            after = engine.forward(rows).log_probs
            assert before is not None and after is not None
            assert (after - before).abs().max() > 1e-3
        bf16 = Case(world_size=size, model="llama", precision=Precision.bf16)
        mapped_before = bytes_mapped()
        make_engine(bf16, root, rank)
        assert bytes_mapped() == mapped_before, "float32 weights that are gathered in bfloat16"


def test_a_rank_computes_with_what_another_one_wrote(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "llama", "llama")
    run_ranks(check_engine, (tmp_path,), 2)


def test_what_another_machine_has_at_that_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "link"
    (tmp_path / "file").write_bytes(b"abc")
    path.symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="does not have the memory hybridflow-weights-0"):
        mapped(str(path), f"{PREFIX}0", 10)
    assert path.read_bytes() == b"abc"
    with pytest.raises(OSError):
        mapped("/proc/0/fd/0", f"{PREFIX}0", 10)
