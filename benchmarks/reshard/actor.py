"""What a weight sync costs inside the actor, with its real engines: moving, attesting, taking in
(vLLM repacks on CPU), probing.

Run by benchmarks.reshard. Two processes with one thread each and a Llama of about 100 MB in bf16,
trained with float32 masters: in one pool (FSDP to two engines, tensor parallel to tensor parallel),
and in two pools, where one process trains and the other generates.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hybridflow import spanning
from hybridflow.context import RankContext
from hybridflow.layout import Layout
from hybridflow.resharding import Attestor, ParameterSpec
from workers.config import ModelConfig, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.generation.config import GenerationConfig
from workers.layouts import generation_grouping
from workers.role_config import ActorConfig
from workers.sampler import Sampler
from workers.weight_sync import WeightSync

VOCAB = 16000
CASES = {
    "fsdp-2 to 2 x tg 1, one pool": ("fsdp", 1, 1, False),
    "threed 1-2-1 to tg 2, one pool": ("threed", 2, 2, False),
    "fsdp-1 to tg 1, two pools": ("fsdp", 1, 1, True),
}
"""Name: (training engine, training tp, generation tp, two pools)."""
REPEATS = 13
PARTS = ("seconds", "transfer_s", "attest_s", "commit_s", "probe_s")
Report = dict[str, float]


def run(directory: Path) -> list[dict[str, Any]]:
    """A row for each case: medians of the later syncs of the slowest rank, the first one's
    preparation, and the attestation's share."""
    make_model(directory / "model")
    rows = []
    for number, (name, case) in enumerate(CASES.items()):
        mp.spawn(worker, (str(directory), number, *case), nprocs=2)
        reports = [
            json.loads((directory / f"sync-{number}-{rank}.json").read_text()) for rank in (0, 1)
        ]
        rows.append({"case": name, **summary(reports)})
    return rows


def make_model(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)


def worker(
    rank: int, directory: str, number: int, engine: str, tp: int, generation_tp: int, split: bool
) -> None:
    torch.set_num_threads(1)
    size = 1 if split else 2
    store = f"{directory}/world-{number}-{rank if split else 0}"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0 if split else rank, world_size=size
    )
    context = RankContext(rank=dist.get_rank(), world_size=size, local_rank=rank)
    config = ActorConfig(
        model=ModelConfig(path=f"{directory}/model"),
        train=TrainConfig(engine=engine, tp=tp),
        generation=GenerationConfig(tp=generation_tp, max_model_len=64, kv_cache_bytes=2**24),
    )
    trainer = train_engine(config, context) if not split or rank == 0 else None
    sync = make_sync(
        config,
        context,
        trainer,
        meet(directory, rank) if split else None,
        generates=not split or rank == 1,
    )
    dist.barrier(group=sync.group)
    first, attested, bare = sync.run(0), [], []
    attestor = sync.attestor
    assert attestor is not None, "made by the first sync"
    for version in range(1, REPEATS):
        for sync.attestor, reports in ((attestor, attested), (Unattested(), bare)):
            dist.barrier(group=sync.group)
            reports.append(asdict(sync.run(version)))
    Path(directory, f"sync-{number}-{rank}.json").write_text(
        json.dumps([asdict(first), attested, bare])
    )
    if sync.generator is not None:
        sync.generator.close()
    dist.destroy_process_group()


class Unattested(Attestor):
    """Sums nothing and is content: what a sync would cost without attestation."""

    def __init__(self) -> None:
        pass

    def start(self) -> Any:
        return self

    def finish(self) -> dict[str, int]:
        return {}


def train_engine(config: ActorConfig, context: RankContext) -> TrainingEngine:
    return engine_class(config.train.engine)(
        model=config.model, config=config.train, head=Head.lm, context=context
    )


def meet(directory: str, rank: int) -> dist.ProcessGroup:
    """The group over both processes; the address goes through a file, as it goes through the
    controller in a run."""
    address, point = Path(directory, "meeting"), None
    if rank == 0:
        point = spanning.MeetingPoint(spanning.LOOPBACK, size=2)
        address.with_suffix(".new").write_text(point.address)
        address.with_suffix(".new").rename(address)
    while not address.exists():
        torch.empty(0)
    where = {
        "rank": rank,
        "size": 2,
        "host": spanning.LOOPBACK,
        "device": "cpu",
        "timeout_s": 120.0,
    }
    return spanning.join(address.read_text(), point=point, **where)  # type: ignore[arg-type]


def make_sync(
    config: ActorConfig,
    context: RankContext,
    trainer: TrainingEngine | None,
    group: dist.ProcessGroup | None,
    *,
    generates: bool,
) -> WeightSync:
    settings: dict[str, Any] = {
        "probe_tolerance": 0.1,
        "vocab_size": VOCAB,
        "node": "here",
        "group": group,
    }
    if not generates:
        return WeightSync(trainer, None, **settings)
    layout = (
        generation_grouping(config, trainer.layout).layout
        if trainer is not None
        else Layout.of(dp=1)
    )
    sampler = Sampler(config, context, layout)
    sync = WeightSync(trainer, sampler.engine, sampler.make_destination, **settings)
    if trainer is not None:
        sync.make_destination(
            [
                ParameterSpec(one.name, one.shape, str(one.dtype).removeprefix("torch."))
                for one in trainer.local_parameters()
            ]
        )
    return sync


def summary(ranks: list[tuple[Report, list[Report], list[Report]]]) -> dict[str, float]:
    """Medians over the syncs after the first, of the rank for which each part took longest;
    what attestation adds to the slower rank."""
    medians = {
        part: max(
            statistics.median(report[part] for report in attested) for _, attested, _ in ranks
        )
        for part in PARTS
    }
    bare = max(
        statistics.median(report["seconds"] for report in without) for _, _, without in ranks
    )
    return medians | {
        "prepare_s": max(first["prepare_s"] for first, _, _ in ranks),
        "received_max": max(first["received_bytes"] for first, _, _ in ranks),
        "seconds_unattested": bare,
        "attest_share": (medians["seconds"] - bare) / medians["seconds"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| sync in the actor | received, MB | seconds | moving | attesting | taking in | probe | "
        "unattested | attestation adds | prepare |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row[part]:.3f}" for part in (*PARTS, "seconds_unattested"))
        lines.append(
            f"| {row['case']} | {row['received_max'] / 1e6:.1f} | {times} | "
            f"{100 * row['attest_share']:.1f} % | {row['prepare_s']:.2f} |"
        )
    return "\n".join(lines)
