"""TRL's GRPOTrainer on the task of benchmarks.real_model: TASK OUTPUT, both JSON; in an interpreter
that has trl.

settings of the task: micro_batch (rows of a forward and backward pass), threads. Everything in
fp32, generation by transformers: the combination that is the fastest here, because TRL's transfer
of weights to vLLM does not work on CPUs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from benchmarks.real_model.task import (
    LEARNING_RATE,
    PROMPTS,
    RESPONSE_TOKENS,
    SAMPLES,
    Task,
    write_result,
)
from benchmarks.step.case import PeakMemory, StepClock
from benchmarks.step.trl_side import Phases, Watch, rollout_phases, watch_rollout
from workers.rewards import number


def score(response: str, answer: str) -> float:
    """The same reward for both systems."""
    return float(number(prompt="", response=response, finish_reason="", answer=answer))


def rewards(completions: list[Any], answer: list[str], **_columns: Any) -> list[float]:
    """Completions are lists of one turn."""
    scores = []
    for (turn,), expected in zip(completions, answer, strict=True):
        scores.append(score(turn["content"], expected))
    return scores


def make_trainer(task: Task, directory: str, watch: Watch) -> GRPOTrainer:
    rows, micro_batch = PROMPTS * SAMPLES, int(task.settings["micro_batch"])
    config = GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=SAMPLES,
        max_completion_length=RESPONSE_TOKENS,
        max_steps=task.steps,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = load_dataset("json", data_files=task.rows("train"), split="train")
    return GRPOTrainer(
        model=task.model_path,
        reward_funcs=rewards,
        args=config,
        train_dataset=dataset,
        callbacks=[watch],
    )


def accuracy(model: PreTrainedModel, task: Task) -> float:
    """Greedy answers to the held-out prompts, scored as the training's are."""
    tokenizer = AutoTokenizer.from_pretrained(task.model_path, padding_side="left")
    rows = list(load_dataset("json", data_files=task.rows("held_out"), split="train"))
    texts = []
    for row in rows:
        texts.append(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        )
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=RESPONSE_TOKENS, do_sample=False)
    answers = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], True)
    scores = [score(text, row["answer"]) for text, row in zip(answers, rows, strict=True)]
    return sum(scores) / len(scores)


def run(task: Task, output: Path) -> None:
    phases, clock = Phases(), StepClock()
    watch = Watch(clock, phases)
    torch.set_num_threads(int(task.settings.get("threads", os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory() as directory, PeakMemory() as memory:
        trainer = make_trainer(task, directory, watch)
        before = accuracy(trainer.model, task)
        trainer.model.generate = phases.around("generation", trainer.model.generate)
        watch_rollout(trainer, phases)
        trainer.train()
        after = accuracy(trainer.model, task)
    steps = []
    for times, seconds in zip(clock.steps(), watch.by_step, strict=True):
        steps.append({**times, "phases": rollout_phases(times["step_s"], seconds)})
    write_result(
        output,
        steps=steps[task.warm_up :],
        accuracy_before=before,
        accuracy_after=after,
        peak_bytes=memory.peak_bytes,
    )


if __name__ == "__main__":
    run(Task.from_json(sys.argv[1]), Path(sys.argv[2]))
