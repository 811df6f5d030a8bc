"""One run of recipes.grpo for benchmarks.step: CASE OUTPUT [setting=value ...]

The recipe's session, step by step: reads the clock between the steps and, for sampled lengths,
gives every row its limit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.step.case import (
    PROMPT_TOKENS,
    PROMPTS,
    RESPONSE_TOKENS,
    SAMPLES,
    Case,
    PeakMemory,
    StepClock,
    write_result,
)
from hybridflow.batch import Batch
from recipes.config import RunConfig
from recipes.preparation import prepare
from recipes.python_settings import make_settings
from recipes.session import Session


def settings(case: Case, directory: str) -> RunConfig:
    """recipes.grpo with the case's model, data and lengths, and nothing tuned beyond it."""
    return make_settings(
        "grpo",
        [
            f"model.path={case.model_path}",
            f"data.train={case.data_path}",
            "data.answer_column=null",
            f"data.batch_size={PROMPTS}",
            f"algorithm.samples_per_prompt={SAMPLES}",
            "num_devices=2",
            f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
            "actor.generation.sampling.ignore_eos=true",
            f"loop.num_steps={case.warm_up + case.steps}",
            "loop.resume=never",
            "metrics.console=false",
            f"output_dir={directory}",
            *(f"{name}={value}" for name, value in case.settings.items()),
        ],
        reward="benchmarks.step.reward:score",
    )


def run(case: Case, output: Path) -> None:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as directory, PeakMemory() as memory:
        config = settings(case, directory)
        train(config, case, clock)
        lines = [
            json.loads(line)
            for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()
        ]
    steps = [
        {
            **times,
            "tokens": line["tokens_per_s"] * line["seconds/step"],
            "phases": phases(line, times["step_s"]),
        }
        for times, line in zip(clock.steps(), lines, strict=True)
    ]
    for number, step in enumerate(steps):
        expected = int(case.response_tokens(number).sum()) + PROMPTS * SAMPLES * PROMPT_TOKENS
        assert round(step["tokens"]) == expected, (
            f"step {number} had {step['tokens']} tokens, not the {expected} of the case"
        )
    write_result(output, steps[case.warm_up :], memory.peak_bytes)


def train(config: RunConfig, case: Case, clock: StepClock) -> None:
    with Session(prepare(config)) as session:
        for number in range(case.warm_up + case.steps):
            prompts = next(session.prompts)
            clock.mark()
            if case.lengths != "fixed":
                limits = torch.from_numpy(case.response_tokens(number))
                prompts |= Batch.of(max_response_tokens=limits)
            session.step(prompts)
        clock.mark()


def phases(line: dict[str, float], step_s: float) -> dict[str, float]:
    """The step's seconds by phase; a first update of a batch needs no log-probs beforehand."""
    sync = line["sync/seconds"]
    named = {
        "generation": line["seconds/actor.generate_sequences"] - sync,
        "sync": sync,
        "log_probs": line.get("seconds/actor.compute_log_prob", 0.0),
        "update": line["seconds/actor.update_actor"],
    }
    return {**named, "other": step_s - sum(named.values())}


if __name__ == "__main__":
    run(Case.from_json(sys.argv[1]), Path(sys.argv[2]))
