"""Peak bytes of a training step on a hollow GPU beside the mapper's footprint; one process for each
case.

    python -m benchmarks.rehearsal.memory DIRECTORY "7B on 8" [--layers 4] [--largest 20]

The process plays rank 1 of the world, which reads no checkpoint, with a model of full width. Prints
a JSON list of one row: bytes between steps and at the peak of the second step (the first one takes
the optimizer's states), and what the mapper predicts of both. Kernels' own scratch memory, NCCL and
the CUDA context are left out of both. --largest: on the error stream so many of the largest amounts
that are alive at the peak, by the operation and the line that made them.
"""

from __future__ import annotations

# isort: off
from benchmarks.rehearsal.hollow import Hollow, become_gpu
# isort: on

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  (registers its operators)
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.rehearsal.memory_cases import CASES
from benchmarks.rehearsal.training_step import batch_of, hf_config, predicted
from hybridflow.context import RankContext
from hybridflow.mapping.question.zoo import MODELS
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss

RANK = 1
"""It receives the weights that rank 0 reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one case with so many of the model's layers; what the step asks of the GPU for each
    micro-batch."""

    stage: str
    case: str
    layers: int
    launches: float
    syncs: float
    copies: float
    resident_bytes: int
    predicted_resident_bytes: int
    peak_bytes: int
    predicted_bytes: int
    parts: dict[str, int]
    """The prediction's."""


def measure(directory: Path, name: str, layers: int, largest: int) -> Row:
    case = CASES[name]
    spec = MODELS[case.model]
    if layers:
        spec = replace(spec, num_layers=layers)
    hf_config(case.family, spec).save_pretrained(directory)
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
        engine = engine_class(case.engine)(
            model=ModelConfig(path=str(directory)), config=config, head=Head.lm, context=context
        )
        hollow.memory.watched = largest > 0
        engine.train_step(batch, loss)
        resident, hollow.memory.peak = hollow.memory.live, hollow.memory.live
        hollow.launches, hollow.copies = 0, 0
        hollow.syncs.clear()
        engine.train_step(batch, loss)
        peak = hollow.memory.peak
    for origin, size in hollow.memory.at_peak.most_common(largest):
        print(f"{size / 1e9:8.3f} GB  {origin}", file=sys.stderr)
    between, step = predicted(case, spec, config)
    parts = {part: round(value) for part, value in asdict(between + step).items()}
    micro_batches = case.rows // case.rows_at_once
    return Row(
        stage="A",
        case=name,
        layers=spec.num_layers,
        launches=hollow.launches / micro_batches,
        syncs=hollow.syncs.total() / micro_batches,
        copies=hollow.copies / micro_batches,
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
    parser.add_argument("--largest", type=int, default=0)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    become_gpu()
    play_along()
    case = CASES[arguments.case]
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=case.devices)
    row = measure(arguments.directory, arguments.case, arguments.layers, arguments.largest)
    print(json.dumps([asdict(row)]))


if __name__ == "__main__":
    main()
