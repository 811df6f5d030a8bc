"""PPO steps of the real recipe in several configurations, predicted before and measured after, for
benchmarks.mapping --measured.

    python -m recipes.calibrate output=calibration
    python -m benchmarks.mapping.measured calibration FILE [--only NAME ...]

PPO with four models that the calibration did not see, on one and two ranks, colocated and apart.
Every rank is one thread. Medians over the steps after the first, from the run's own metrics. Runs
of one group share their workload, so that their order counts.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas
from hydra import compose, initialize_config_module

from benchmarks.step.case import SHAPES
from cluster.connect import ClusterConfig, connect
from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.calibrate.compare import Run, load_runs, save_runs, side_by_side
from recipes.config import RunConfig, register
from recipes.forecast import MAPPING, measured_run
from recipes.main import join_pools, to_settings
from recipes.preparation import foresee
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.run import run

MODELS = {
    **SHAPES,
    "12m": {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_layers": 6,
        "num_heads": 6,
        "num_key_value_heads": 6,
    },
}
"""Qwen2 with 3, 12 and 32 million parameters."""
NUM_PROMPTS = 640
STEPS = {"3m": 11, "12m": 7, "30m": 5}
"""Short steps need more of them: what disturbs a machine lasts seconds."""
APART = (
    "placement=custom",
    "pools.policy.roles=[actor,reference]",
    "pools.values.roles=[critic,reward]",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration of recipes.ppo."""

    name: str
    model: str
    placement: tuple[str, ...] = ("num_devices=2",)
    batch: int = 32
    prompt: int = 8
    response: int = 64
    settings: tuple[str, ...] = ()
    group: str = ""


CASES = (
    Case(name="3M, colocated on 2", model="3m", group="3M"),
    Case(name="3M, critic and reward apart", model="3m", placement=APART, group="3M"),
    Case(name="3M, on 1", model="3m", placement=("num_devices=1",), group="3M"),
    Case(name="12M, colocated on 2, 64 rows of 32 tokens", model="12m", batch=64, response=32),
    Case(
        name="12M, colocated on 2, prompts of 32 tokens, 2 updates",
        model="12m",
        prompt=32,
        settings=("algorithm.num_mini_batches=2",),
    ),
    Case(name="30M, colocated on 2", model="30m", group="30M"),
    Case(name="30M, critic and reward apart", model="30m", placement=APART, group="30M"),
    Case(name="30M, on 1", model="30m", placement=("num_devices=1",), group="30M"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path, help="what recipes.calibrate wrote")
    parser.add_argument("output", type=Path, help="where the runs go (JSON)")
    parser.add_argument(
        "--only", nargs="*", default=[], help="words of the names of the cases to run"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="keep the seconds measured in FILE, predict anew from CALIBRATION",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if arguments.again:
        runs = predicted_again(arguments.output, arguments.calibration)
        print("\n\n".join(f"{each.configuration}\n{side_by_side(each)}" for each in runs))
        save_runs(runs, arguments.output)
        return
    chosen = [case for case in CASES if all(word in case.name for word in arguments.only)]
    runs = []
    with (
        tempfile.TemporaryDirectory() as directory,
        connect(ClusterConfig(address="local", worker_logs=False), cpu_slots=4),
    ):
        prepare(Path(directory))
        for case in chosen:
            runs.append(measure(case, Path(directory), arguments.calibration))
            print(f"{case.name}\n{side_by_side(runs[-1])}\n", flush=True)
            save_runs(runs, arguments.output)


def prepare(directory: Path) -> None:
    """Random models with a byte tokenizer; prompts of 8 and of 32 digits, a token each."""
    tokenizer = make_tokenizer()
    for name, shape in MODELS.items():
        model = make_model(tokenizer, ModelShape(**shape, max_tokens=128), seed=0)
        model.save_pretrained(directory / name)  # type: ignore[arg-type]
        tokenizer.save_pretrained(directory / name)
    for length in (8, 32):
        digits = np.random.default_rng(0).integers(0, 10, (NUM_PROMPTS, length))
        prompts = ["".join(map(str, row)) for row in digits]
        pandas.DataFrame({"prompt": prompts}).to_parquet(directory / f"prompts{length}.parquet")


def measure(case: Case, directory: Path, calibration: Path) -> Run:
    """A run of recipes.ppo: its prediction, then its steps."""
    config = settings(case, directory, calibration)
    outcome = run(config)
    assert outcome is not None
    mapping = DeviceMapping.load(Path(config.output_dir) / MAPPING)
    return measured_run(case.name, mapping, outcome, case.group or case.name)


def predicted_again(measured: Path, calibration: Path) -> list[Run]:
    """The same runs with the predictions of other constants."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        cases = {case.name: case for case in CASES}
        runs = []
        for each in load_runs(measured):
            config = settings(cases[each.configuration], Path(directory), calibration)
            runs.append(replace(each, mapping=foresee(config)))
        return runs


def settings(case: Case, directory: Path, calibration: Path) -> RunConfig:
    register()
    overrides = [
        f"model.path={directory / case.model}",
        f"data.train={directory / f'prompts{case.prompt}.parquet'}",
        "data.answer_column=null",
        f"data.batch_size={case.batch}",
        f"reward.model.path={directory / case.model}",
        "reward.model.new_head=true",  # its scores mean nothing, and nobody looks at them
        f"actor.generation.sampling.max_response_tokens={case.response}",
        "actor.generation.sampling.ignore_eos=true",
        "actor.generation.max_model_len=128",
        "threads_per_device=1",
        f"loop.num_steps={STEPS[case.model]}",
        "loop.resume=never",
        "metrics.console=false",
        f"plan.calibration={calibration / 'calibration.json'}",
        f"plan.cluster={calibration / 'cluster.json'}",
        f"output_dir={directory / 'run'}",
        *case.placement,
        *case.settings,
    ]
    with initialize_config_module("recipes", version_base="1.3"):
        return to_settings(compose("ppo", join_pools(overrides)))


if __name__ == "__main__":
    main()
