"""Training steps of models of full width on one device: seconds, MFU, bytes beside the mapper's, and
log-prob gaps; one process for each case.

    python -m benchmarks.gpu.training DIRECTORY "0.5B fsdp bf16" --device cuda

DIRECTORY keeps the models' files for the next case. The last line is one row of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.rehearsal.memory_cases import Case as StepCase
from benchmarks.rehearsal.training_step import batch_of, hf_config, predicted
from hybridflow.local_pool import LocalPool
from hybridflow.mapping.question.model import ModelSpec
from hybridflow.mapping.question.zoo import MODELS
from hybridflow.pool import PoolSpec
from workers.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from workers.engines import engine_class
from workers.engines.base import Head, TrainingEngine
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.sequences import Sequences

PROMPT, RESPONSE = 256, 768
TINY_PROMPT, TINY_RESPONSE = 16, 48
TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """An engine with a model of the mapper's zoo and random weights."""

    model: str
    engine: str = "fsdp"
    precision: Precision = Precision.bf16
    attention: str = "auto"
    rows: int = 32
    rows_at_once: int = 8
    settings: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    """For a CPU: a narrow model of two layers, and few tokens."""


CASES = {
    "0.5B fsdp bf16": Case(model="qwen2.5-0.5b"),
    "0.5B threed bf16": Case(model="qwen2.5-0.5b", engine="threed"),
    "0.5B deepspeed bf16": Case(model="qwen2.5-0.5b", engine="deepspeed"),
    "0.5B fsdp fp32": Case(model="qwen2.5-0.5b", precision=Precision.fp32, rows_at_once=4),
    "0.5B fsdp bf16 sdpa": Case(model="qwen2.5-0.5b", attention="sdpa"),
    "0.5B fsdp bf16 eager": Case(
        model="qwen2.5-0.5b",
        attention="eager",
        rows_at_once=4,
        settings={"packing": False, "share_prompts": False},
    ),
    "1.5B fsdp bf16": Case(model="qwen2.5-1.5b"),
    "1.5B threed bf16": Case(model="qwen2.5-1.5b", engine="threed"),
    "1.5B fsdp bf16 recomputed": Case(
        model="qwen2.5-1.5b", settings={"activation_checkpointing": True}
    ),
    "7B fsdp bf16, 8 layers": Case(model="qwen2.5-7b", rows_at_once=4),
    "tiny fsdp fp32": Case(
        model="qwen2.5-0.5b", precision=Precision.fp32, rows=4, rows_at_once=2, tiny=True
    ),
    "tiny threed fp32": Case(
        model="qwen2.5-0.5b",
        engine="threed",
        precision=Precision.fp32,
        rows=4,
        rows_at_once=2,
        tiny=True,
    ),
}
LAYERS = {"7B fsdp bf16, 8 layers": 8}
"""Fewer than the model has, so that optimizer states fit one device."""


def make_model(directory: Path, case: Case, step: StepCase, spec: ModelSpec) -> Path:
    """The files of a model with random weights; those that are there are taken."""
    path = directory / f"{case.model}-{spec.num_layers}-{spec.hidden_size}"
    if not path.exists():
        config = hf_config(step.family, spec)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        del model
        empty_cache()
    return path


def measure(directory: Path, name: str, device: str) -> dict[str, Any]:
    case = CASES[name]
    spec = MODELS[case.model]
    if name in LAYERS:
        spec = replace(spec, num_layers=LAYERS[name])
    prompt, response = PROMPT, RESPONSE
    if case.tiny:
        spec, prompt, response = replace(spec, **TINY), TINY_PROMPT, TINY_RESPONSE
    step = StepCase(
        model=case.model,
        family=Qwen2Config,
        devices=1,
        engine=case.engine,
        settings=case.settings,
        prompt=prompt,
        response=response,
        rows=case.rows,
        rows_at_once=case.rows_at_once,
    )
    path = make_model(directory, case, step, spec)
    config = TrainConfig(
        engine=case.engine,
        micro_batch_tokens=case.rows_at_once * (prompt + response),
        precision=case.precision,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        **case.settings,
    )
    pool = LocalPool(PoolSpec(device=device))
    before = outside_torch(device)
    started = time.perf_counter()
    engine = engine_class(case.engine)(
        model=ModelConfig(path=str(path), attention=case.attention),
        config=config,
        head=Head.lm,
        context=replace(pool.context, role="actor"),
    )
    row: dict[str, Any] = {"case": name, "built_s": time.perf_counter() - started}
    batch = batch_of(step, spec.vocab_size)
    row |= gaps(engine, path, batch_of(replace(step, rows=4), spec.vocab_size), device)
    row |= step_times(engine, batch, device)
    between, in_step = predicted(step, spec, config)
    row["predicted_gb"] = (between + in_step).total / 1e9
    row["predicted_between_gb"] = between.total / 1e9
    row["predicted_parts_gb"] = {
        part: value / 1e9 for part, value in asdict(between + in_step).items()
    }
    if device == "cuda":
        row["outside_torch_gb"] = outside_torch(device)
        row["outside_torch_before_gb"] = before
        row |= launches(engine, batch)
        row |= offload_times(engine)
    tokens = int(batch.lengths.sum())
    row["tokens_per_s"] = tokens / row["step_s"]
    row["model_tflops"] = step_flops(spec, batch) / row["step_s"] / 1e12
    row["forward_tflops"] = step_flops(spec, batch) / 3 / row["forward_s"] / 1e12
    return row


def gaps(engine: TrainingEngine, path: Path, batch: Sequences, device: str) -> dict[str, float]:
    """The engine's log-probs of the scored tokens against those of transformers' model in float32,
    row by row, with plain attention."""
    outputs = engine.forward(batch)
    assert outputs is not None and outputs.log_probs is not None
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).to(device)
    rows = []
    with torch.no_grad():
        for ids, scored in zip(
            batch.token_ids.split(batch.lengths.tolist()), batch.scored_lengths, strict=True
        ):
            ids, count = ids.to(device), int(scored)
            logits = model(ids[None]).logits[0, -count - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(1, ids[-count:, None])[:, 0])
    gap = (torch.cat(rows).cpu() - outputs.log_probs.float().cpu()).abs()
    del model
    empty_cache()
    return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}


def step_flops(spec: ModelSpec, batch: Sequences) -> float:
    """FLOPs of the forward and backward pass without recomputation: 6 for each parameter and token,
    and attention's products (the prompts of different rows are different)."""
    lengths = batch.lengths.double()
    tokens, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
    layers = spec.num_layers * (
        2.0 * spec.active_layer_parameters * tokens + spec.attended_flops * pairs
    )
    head = 2.0 * float(batch.scored_lengths.sum()) * spec.head_parameters
    return 3.0 * (layers + head)


def step_times(engine: TrainingEngine, batch: Sequences, device: str) -> dict[str, Any]:
    """Seconds of the fastest step after the first, bytes between steps and at the peak."""
    loss = policy_loss(PolicyLossConfig())
    first = seconds_of(lambda: engine.train_step(batch, loss), device)
    row: dict[str, Any] = {"first_step_s": first}
    if device == "cuda":
        row["between_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    times = [seconds_of(lambda: engine.train_step(batch, loss), device) for _ in range(STEPS)]
    row["step_s"] = min(times)
    if device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    engine.forward(batch)
    row["forward_s"] = min(seconds_of(lambda: engine.forward(batch), device) for _ in range(2))
    return row


def launches(engine: TrainingEngine, batch: Sequences) -> dict[str, Any]:
    """Calls of the CUDA runtime in a training step, and the kernels that take the longest."""
    loss = policy_loss(PolicyLossConfig())
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine.train_step(batch, loss)
        torch.cuda.synchronize()
    averages = profile.key_averages()
    counts = {}
    for event in averages:
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync")) or (
            "Synchronize" in event.key
        ):
            counts[event.key] = event.count
    longest = sorted(averages, key=lambda event: -event.self_device_time_total)[:12]
    kernels = {}
    for event in longest:
        kernels[event.key[:60]] = round(event.self_device_time_total / 1e6, 4)
    return {"calls": counts, "kernel_s": kernels}


def offload_times(engine: TrainingEngine) -> dict[str, float]:
    """Seconds that the states' way to the host and back takes, the second time (its memory is
    page-locked the first time)."""
    seconds = {}
    for _ in range(2):
        seconds["offload_s"] = seconds_of(engine.offload, "cuda")
        seconds["left_after_offload_gb"] = torch.cuda.memory_allocated() / 1e9
        seconds["onload_s"] = seconds_of(engine.onload, "cuda")
    return seconds


def seconds_of(action: Callable[[], object], device: str) -> float:
    wait(device)
    started = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def outside_torch(device: str) -> float:
    """GB of the device that PyTorch's allocator does not hold."""
    if device != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit('no CUDA device: run it on one, or "tiny fsdp fp32" with --device cpu')
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    row = measure(arguments.directory, arguments.case, arguments.device)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
