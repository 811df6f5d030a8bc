"""One run of TRL's GRPOTrainer for benchmarks.step: CASE OUTPUT, in an interpreter that has trl.

settings of the case: precision (bf16 | fp32), attention (sdpa | eager), generation (vllm |
transformers), micro_batch (rows), threads (of the one process; the cores if it is not given).
Per-row lengths go in where TRL leaves a door open: a list of sampling parameters for vLLM, a logits
processor for transformers. TRL's own transfer of weights to vLLM does not work on CPUs, where vLLM
keeps repacked copies; it is replaced by vLLM's reload.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.step.case import (
    PROMPT_TOKENS,
    PROMPTS,
    RESPONSE_TOKENS,
    SAMPLES,
    Case,
    PeakMemory,
    StepClock,
    reward,
    write_result,
)

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    DO_NOT_TRACK="1",
)

import numpy as np
import torch
from datasets import load_dataset
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Phases:
    """Seconds by name since the last take()."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def around(
        self, name: str, function: Callable[..., Any], *, when: Callable[[], bool] = lambda: True
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return function(*args, **kwargs)
            with self.time(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


class Watch(TrainerCallback):
    def __init__(self, clock: StepClock, phases: Phases) -> None:
        self.clock, self.phases, self.by_step = clock, phases, list[dict[str, float]]()

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.phases.take()
        self.clock.mark()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.by_step.append(self.phases.take())

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.clock.mark()


class EndAt(LogitsProcessor):
    """Row i ends with the end-of-sequence token as token lengths[i], not before."""

    def __init__(self, lengths: np.ndarray, eos: int) -> None:
        self.lengths, self.eos = torch.from_numpy(lengths), eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        number = input_ids.shape[1] - PROMPT_TOKENS + 1
        end = scores[:, self.eos].clone()
        scores[:, self.eos] = -torch.inf
        last = self.lengths == number
        scores[last] = -torch.inf
        scores[last, self.eos] = end[last]
        return scores


def make_trainer(case: Case, directory: str, watch: Watch) -> GRPOTrainer:
    settings, micro_batch = case.settings, int(case.settings["micro_batch"])
    rows = PROMPTS * SAMPLES
    bf16 = settings["precision"] == "bf16"
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=SAMPLES,
        max_completion_length=RESPONSE_TOKENS,
        max_steps=case.warm_up + case.steps,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_vllm=settings["generation"] == "vllm",
        vllm_mode="colocate",
        vllm_max_model_length=PROMPT_TOKENS + RESPONSE_TOKENS,
        vllm_importance_sampling_correction=False,
        model_init_kwargs={"attn_implementation": settings["attention"], "dtype": "float32"},
        generation_kwargs={"ignore_eos": True} if settings["generation"] == "vllm" else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = load_dataset("parquet", data_files=case.data_path, split="train")
    with vllm_settings(bf16):
        return GRPOTrainer(
            model=case.model_path,
            reward_funcs=rewards,
            args=config,
            train_dataset=dataset,
            callbacks=[watch],
        )


def rewards(completions: list[str], **_columns: Any) -> list[float]:
    return [reward(completion) for completion in completions]


@contextmanager
def vllm_settings(bf16: bool) -> Iterator[None]:
    """TRL passes no dtype to vLLM; the engine should compute as the trainer does."""
    from trl.generation import vllm_generation

    original = vllm_generation.LLM

    def build(**kwargs: Any) -> Any:
        return original(
            **{
                **kwargs,
                "dtype": "bfloat16" if bf16 else "float32",
                "max_num_seqs": PROMPTS * SAMPLES,
                "disable_log_stats": True,
            }
        )

    vllm_generation.LLM = build
    try:
        yield
    finally:
        vllm_generation.LLM = original


def watch_vllm(trainer: GRPOTrainer, case: Case, phases: Phases) -> None:
    generation = trainer.vllm_generation
    generate = generation.llm.generate
    runner = generation.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def limited(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        each = [copy.copy(sampling_params) for _ in prompts]
        for params, tokens in zip(
            each, case.response_tokens(trainer.state.global_step), strict=True
        ):
            params.max_tokens = int(tokens)
        return generate(prompts, sampling_params=each, **kwargs)

    def sync() -> None:
        runner.reload_weights(weights_iterator=iter(trainer.model.state_dict().items()))
        generation.llm.reset_prefix_cache()

    generation.llm.generate = limited
    generation.sync_weights = phases.around("sync", sync)
    generation.generate = phases.around("generation", generation.generate)


def watch_transformers(trainer: GRPOTrainer, case: Case, phases: Phases) -> None:
    generate, eos = trainer.model.generate, trainer.processing_class.eos_token_id

    def limited(*args: Any, **kwargs: Any) -> Any:
        lengths = case.response_tokens(trainer.state.global_step)
        return generate(
            *args, **kwargs, logits_processor=LogitsProcessorList([EndAt(lengths, eos)])
        )

    trainer.model.generate = phases.around("generation", limited)


def watch_rollout(trainer: GRPOTrainer, phases: Phases) -> None:
    """Times what comes before the update, and the log-probs in it."""
    trainer._generate_and_score_completions = phases.around(
        "rollout", trainer._generate_and_score_completions
    )
    trainer._get_per_token_logps_and_entropies = phases.around(
        "log_probs",
        trainer._get_per_token_logps_and_entropies,
        when=lambda: not torch.is_grad_enabled(),
    )


def rollout_phases(step_s: float, seconds: dict[str, float]) -> dict[str, float]:
    """PHASES of a step: everything outside the rollout is forward, backward and optimizer."""
    named = {name: seconds.get(name, 0.0) for name in ("generation", "sync", "log_probs")}
    other = seconds["rollout"] - sum(named.values())
    return {**named, "update": step_s - seconds["rollout"], "other": other}


def run(case: Case, output: Path) -> None:
    phases, clock = Phases(), StepClock()
    watch = Watch(clock, phases)
    threads = int(case.settings.get("threads", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory, PeakMemory() as memory:
        trainer = make_trainer(case, directory, watch)
        if case.settings["generation"] == "vllm":
            watch_vllm(trainer, case, phases)
        else:
            watch_transformers(trainer, case, phases)
        torch.set_num_threads(threads)
        watch_rollout(trainer, phases)
        trainer.train()
    steps = []
    for number, (times, seconds) in enumerate(zip(clock.steps(), watch.by_step, strict=True)):
        steps.append(
            {
                **times,
                "tokens": float(
                    case.response_tokens(number).sum() + PROMPTS * SAMPLES * PROMPT_TOKENS
                ),
                "phases": rollout_phases(times["step_s"], seconds),
            }
        )
    write_result(output, steps[case.warm_up :], memory.peak_bytes)


if __name__ == "__main__":
    run(Case.from_json(sys.argv[1]), Path(sys.argv[2]))
