"""recipes.grpo on the task of benchmarks.real_model: TASK OUTPUT, both JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.real_model.task import (
    LEARNING_RATE,
    PROMPTS,
    RESPONSE_TOKENS,
    SAMPLES,
    Task,
    write_result,
)
from benchmarks.step.case import PeakMemory, StepClock
from benchmarks.step.hybridflow_side import phases
from recipes.config import RunConfig
from recipes.preparation import foresee, prepare
from recipes.python_settings import make_settings
from recipes.session import Session


def settings(task: Task, directory: str) -> RunConfig:
    return make_settings(
        "grpo",
        [
            f"model.path={task.model_path}",
            f"data.train={task.rows('train')}",
            f"data.validation={task.rows('held_out')}",
            f"data.batch_size={PROMPTS}",
            f"algorithm.samples_per_prompt={SAMPLES}",
            "num_devices=2",
            "actor.train.precision=fp32",
            "actor.generation.precision=fp32",
            f"actor.train.optimizer.learning_rate={LEARNING_RATE}",
            f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
            f"loop.num_steps={task.steps}",
            "loop.resume=never",
            "metrics.console=false",
            f"output_dir={directory}",
            *(f"{name}={value}" for name, value in task.settings.items()),
        ],
        reward="workers.rewards:number",
    )


def run(task: Task, output: Path) -> None:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as directory:
        config = settings(task, directory)
        predicted = foresee(config)
        with PeakMemory() as memory, Session(prepare(config)) as session:
            before = session.validate()
            for _ in range(task.steps):
                clock.mark()
                session.step()
            clock.mark()
            after = session.validate()
        lines = Path(directory, "metrics.jsonl").read_text().splitlines()
    measured = []
    for times, line in zip(clock.steps(), training_lines(lines), strict=True):
        measured.append({**times, "phases": phases(line, times["step_s"])})
    write_result(
        output,
        steps=measured[task.warm_up :],
        accuracy_before=before["reward/mean"],
        accuracy_after=after["reward/mean"],
        peak_bytes=memory.peak_bytes,
        peak_bytes_per_host=memory.largest_process_bytes("ray::"),
        predicted_bytes=predicted.process_bytes[predicted.pools[0].name],
    )


def training_lines(lines: list[str]) -> list[dict[str, float]]:
    read = [json.loads(line) for line in lines]
    return [line for line in read if "seconds/step" in line]


if __name__ == "__main__":
    run(Task.from_json(sys.argv[1]), Path(sys.argv[2]))
