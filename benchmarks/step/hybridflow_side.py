"""One run of recipes.grpo for benchmarks.step: CASE OUTPUT [setting=value ...]

Built from the recipe's parts, as recipes/session.py does; the algorithm is GRPO behind a step that
reads the clock and, for sampled lengths, gives every row its limit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module

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
from controllers import create_algorithm
from controllers.data import PromptDataset, RowLoader, load_tokenizer
from controllers.loop import Loop
from hybridflow.batch import Batch
from hybridflow.checkpoint import CheckpointStore
from hybridflow.group import spawn
from hybridflow.results import Metrics
from recipes.config import RunConfig, register
from recipes.main import to_settings
from recipes.placing import place
from recipes.roles import NoReference
from recipes.session import connect_cluster, start_pool, start_tracker


class Observed:
    """An algorithm whose steps are timed and whose rows have limits."""

    def __init__(self, algorithm: Any, case: Case, clock: StepClock) -> None:
        self.algorithm, self.case, self.clock, self.number = algorithm, case, clock, 0
        self.config = algorithm.config

    def step(self, prompts: Batch) -> Metrics:
        self.clock.mark()
        if self.case.lengths != "fixed":
            prompts |= Batch.of(max_response_tokens=torch.from_numpy(self.case.response_tokens(self.number)))
        self.number += 1
        return self.algorithm.step(prompts)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def settings(case: Case, directory: str) -> RunConfig:
    """recipes.grpo with the case's model, data and lengths, and nothing tuned beyond it."""
    register()
    overrides = [
        f"model.path={case.model_path}",
        f"data.train={case.data_path}",
        "data.answer_column=null",
        f"data.batch_size={PROMPTS}",
        f"algorithm.samples_per_prompt={SAMPLES}",
        "reward.function=benchmarks.step.reward:score",
        "num_devices=2",
        f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
        "actor.generation.sampling.ignore_eos=true",
        f"loop.num_steps={case.warm_up + case.steps}",
        "loop.resume=never",
        "metrics.console=false",
        f"output_dir={directory}",
        *(f"{name}={value}" for name, value in case.settings.items()),
    ]
    with initialize_config_module("recipes", version_base="1.3"):
        return to_settings(compose("grpo", overrides))


def run(case: Case, output: Path) -> None:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as directory, PeakMemory() as memory:
        config = settings(case, directory)
        train(config, case, clock)
        lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
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
    roles = place(config)
    dataset = PromptDataset.load(config.data, config.data.train, load_tokenizer(config.model))
    with ExitStack() as stack:
        cluster = stack.enter_context(connect_cluster(config))
        store = CheckpointStore(
            Path(config.output_dir) / "checkpoints", keep_last=1, keep_best=0, metric="reward"
        )
        tracker = stack.enter_context(start_tracker(config, Path(config.output_dir), store))
        pool = stack.enter_context(start_pool(config, cluster, "main", roles))
        handles: dict[str, Any] = {
            role.name: spawn(role.worker, pool, role.config, role=role.name) for role in roles
        }
        handles.setdefault("reference", NoReference())
        loop = Loop(
            Observed(create_algorithm("grpo", handles, config.algorithm), case, clock),
            trained={"actor": handles["actor"]},
            data=RowLoader(dataset, config.data),
            validate=None,
            tracker=tracker,
            store=store,
            config=config.loop,
        )
        for _ in range(case.warm_up + case.steps):
            loop.train_one_step()
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
