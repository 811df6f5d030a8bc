"""Peak bytes of a training step on a hollow GPU beside the mapper's footprint; one process for each
case.

    python -m benchmarks.rehearsal.memory DIRECTORY "7B on 8" [--layers 4]

The process plays rank 1 of the world, which reads no checkpoint, with a model of full width. Prints
a JSON list of one row: bytes between steps and at the peak of the second step (the first one takes
the optimizer's states), and what the mapper predicts of both. Kernels' own scratch memory, NCCL and
the CUDA context are left out of both.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import argparse
import json
import logging
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from benchmarks.rehearsal.memory_cases import CASES, Case
from hybridflow.context import RankContext
from hybridflow.mapping.question.layouts import ModelLayout
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.workload import Lengths, Workload
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.mapping.simulate.footprint import Footprint, pass_footprint, resident_footprint
from recipes.mapping_question import precision_space
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.losses.aggregation import Aggregation, Counts, weight_columns
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.sequences import Sequences

RANK = 1
"""It receives the weights that rank 0 reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one case with so many of the model's layers."""

    stage: str
    case: str
    layers: int
    resident_bytes: int
    predicted_resident_bytes: int
    peak_bytes: int
    predicted_bytes: int
    parts: dict[str, int]
    """The prediction's."""


def hf_config(case: Case, spec: ModelSpec) -> PretrainedConfig:
    """The model that the specification describes."""
    sizes: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    if spec.num_experts:
        sizes |= {
            "head_dim": spec.head_dim,
            "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.expert_intermediate_size,
        }
    return case.family(**sizes)


def batch_of(case: Case, vocabulary: int) -> Sequences:
    lengths = torch.full((case.rows,), case.prompt + case.response)
    scored = torch.full((case.rows,), case.response)
    tokens = int(scored.sum())
    columns = weight_columns(
        scored, Counts(num_tokens=tokens, num_rows=case.rows), Aggregation.token_mean
    )
    columns |= {"advantages": torch.randn(tokens), "rollout_log_probs": -torch.rand(tokens)}
    ids = torch.randint(2, vocabulary, (int(lengths.sum()),))
    return Sequences(token_ids=ids, lengths=lengths, scored_lengths=scored, per_token=columns)


def predicted(case: Case, spec: ModelSpec, config: TrainConfig) -> tuple[Footprint, Footprint]:
    """Between the steps, and what a step adds."""
    engine = engine_class(case.engine)
    space = engine.limit(precision_space(config.precision))
    data = case.devices // (config.tp * config.pp)
    layout = ModelLayout(
        p=config.pp,
        t=config.tp,
        d=data,
        zero=engine.zero_stage(config),
        recompute=config.activation_checkpointing,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    workload = Workload(
        batch_size=case.rows * data,
        prompt=Lengths.fixed(case.prompt),
        response=Lengths.fixed(case.response),
    )
    resident = resident_footprint(spec, layout, space, trained=True)
    step = pass_footprint(
        spec,
        layout,
        space,
        workload,
        case.rows // case.rows_at_once,
        trained=True,
        backward=True,
    )
    return resident, step


def measure(directory: Path, name: str, layers: int) -> Row:
    case = CASES[name]
    spec = MODELS[case.model]
    if layers:
        spec = replace(spec, num_layers=layers)
    hf_config(case, spec).save_pretrained(directory)
    config = TrainConfig(
        engine=case.engine,
        micro_batch_tokens=case.rows_at_once * (case.prompt + case.response),
        precision=Precision.bf16,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        **case.settings,
    )
    context = RankContext(role="actor", rank=RANK, world_size=case.devices, device="cuda:0")
    batch = batch_of(case, spec.vocab_size)
    loss = policy_loss(PolicyLossConfig())
    with Hollow() as hollow:
        hollow.repeated = case.rows_at_once * case.response
        engine = engine_class(case.engine)(
            model=ModelConfig(path=str(directory)), config=config, head=Head.lm, context=context
        )
        engine.train_step(batch, loss)
        resident, hollow.memory.peak = hollow.memory.live, hollow.memory.live
        engine.train_step(batch, loss)
        peak = hollow.memory.peak
    between, step = predicted(case, spec, config)
    parts = {part: round(value) for part, value in asdict(between + step).items()}
    return Row(
        stage="A",
        case=name,
        layers=spec.num_layers,
        resident_bytes=resident,
        predicted_resident_bytes=round(between.total),
        peak_bytes=peak,
        predicted_bytes=round((between + step).total),
        parts=parts,
    )


def play_along() -> None:
    """The other ranks of this process' world have what this one has."""
    dist.broadcast_object_list = lambda objects, *args, **options: None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--layers", type=int, default=0, help="layers of the model (0: all)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    become_gpu()
    play_along()
    case = CASES[arguments.case]
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=case.devices)
    row = measure(arguments.directory, arguments.case, arguments.layers)
    print(json.dumps([asdict(row)]))


if __name__ == "__main__":
    main()
