"""Stage A: a training engine as rank 0 of a world on a hollow GPU; one process for each engine.

    python -m benchmarks.rehearsal.case DIRECTORY fsdp 8
    python -m benchmarks.rehearsal.case DIRECTORY threed 4 tp=2
    python -m benchmarks.rehearsal.case DIRECTORY fsdp 8 experts

Prints a JSON list of rows {stage, case, launches, syncs, copies}: the engine's build, and what a
forward pass and a training step cost for each micro-batch.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from hybridflow.context import RankContext
from hybridflow.resharding import (
    Attestor,
    Executor,
    LocalParameter,
    LocalShard,
    ShardMap,
    compile,
)
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, LossFn, TrainingEngine
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.losses.config import PolicyLossConfig, ValueLossConfig
from workers.losses.policy import policy_loss
from workers.losses.value import value_loss
from workers.sequences import Sequences

LENGTHS, SCORED = (20, 30, 40, 50, 60), (10, 10, 20, 20, 30)
MICRO_BATCH_TOKENS, MICRO_BATCHES = 128, 2
VOCABULARY = 512
EXPERTS = "experts"
"""The change that makes the model a mixture of experts."""
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


def make_model(directory: Path) -> None:
    """A Qwen2 of two layers, with heads that the variable-length kernel takes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def sequences(head: Head) -> Sequences:
    lengths, scored = torch.tensor(LENGTHS), torch.tensor(SCORED)
    tokens = int(scored.sum())
    counts = Counts(num_tokens=tokens, num_rows=len(LENGTHS))
    columns = weight_columns(scored, counts, Aggregation.token_mean)
    if head is Head.lm:
        columns |= {"advantages": torch.randn(tokens), "rollout_log_probs": -torch.rand(tokens)}
    else:
        columns |= {"returns": torch.randn(tokens), "old_values": torch.randn(tokens)}
    ids = torch.randint(2, VOCABULARY, (int(lengths.sum()),))
    return Sequences(token_ids=ids, lengths=lengths, scored_lengths=scored, per_token=columns)


def make_experts(directory: Path) -> None:
    """A Qwen3-MoE of two layers with four experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


class Counter:
    """with Counter(rows, hollow, "fsdp lm forward", divisor): ..."""

    def __init__(self, rows: list[Row], hollow: Hollow, case: str, parts: int = 1) -> None:
        self.rows, self.hollow, self.case, self.parts = rows, hollow, case, parts

    def _now(self) -> tuple[int, int, int]:
        return self.hollow.launches, self.hollow.syncs.total(), self.hollow.copies

    def __enter__(self) -> None:
        self.before = self._now()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        used = [
            (now - before) / self.parts
            for now, before in zip(self._now(), self.before, strict=True)
        ]
        launches, syncs, copies = used
        if error is None:
            row = Row(stage="A", case=self.case, launches=launches, syncs=syncs, copies=copies)
            self.rows.append(row)


def run_engine(
    hollow: Hollow, directory: Path, name: str, world_size: int, config: TrainConfig, head: Head
) -> list[Row]:
    rows: list[Row] = []
    layout = f"{name} tp={config.tp} on {world_size}, {head.value}"
    if directory.name == EXPERTS:
        layout = f"{layout} with experts"
    context = RankContext(role="actor", rank=0, world_size=world_size, device="cuda:0")
    with Counter(rows, hollow, f"{layout}: build"):
        engine = engine_class(name)(
            model=ModelConfig(path=str(directory)), config=config, head=head, context=context
        )
    batch = sequences(head)
    with Counter(rows, hollow, f"{layout}: forward", MICRO_BATCHES):
        engine.forward(batch)
    with Counter(rows, hollow, f"{layout}: train step", MICRO_BATCHES):
        engine.train_step(batch, LOSSES[head])
    if name != "deepspeed":  # its master weights get other data, which a FakeTensor can't take
        with Counter(rows, hollow, f"{layout}: offload"):
            engine.offload()
        with Counter(rows, hollow, f"{layout}: onload"):
            engine.onload()
    if head is Head.lm:
        rows += sync_rows(hollow, engine, layout, world_size)
    return rows


def sync_rows(hollow: Hollow, engine: TrainingEngine, layout: str, world_size: int) -> list[Row]:
    """What moving and attesting the weights costs for each parameter: rank 0's shards to memory of
    the same boxes in bfloat16."""
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
    return rows


def main(directory: Path, name: str, world_size: int, *changes: str) -> list[Row]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    become_gpu()
    make = make_model
    if EXPERTS in changes:
        directory, make = directory / EXPERTS, make_experts
        changes = tuple(change for change in changes if change != EXPERTS)
    if not (directory / "config.json").exists():
        make(directory)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    settings = {key: int(value) for key, _, value in (change.partition("=") for change in changes)}
    config = TrainConfig(
        engine=name,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        precision=Precision.bf16,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        **settings,
    )
    rows: list[Row] = []
    with Hollow() as hollow:
        hollow.repeated = sum(SCORED)
        for head in LOSSES:
            rows += run_engine(hollow, directory, name, world_size, config, head)
    return rows


if __name__ == "__main__":
    results = main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    print(json.dumps([asdict(row) for row in results]))
