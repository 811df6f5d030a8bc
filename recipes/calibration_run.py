"""run_steps: a few steps of recipes.ppo with a small model, predicted and measured, for the
overheads that the engines alone do not have."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

from hybridflow.mapping.answer.device_mapping import DeviceMapping
from hybridflow.mapping.calibrate.compare import Run
from recipes.calibration_config import CalibrateConfig
from recipes.config import register
from recipes.forecast import MAPPING, measured_run
from recipes.main import to_settings
from recipes.quickstart.model import ModelShape, make_model, make_tokenizer
from recipes.run import run

SHAPE = ModelShape(hidden_size=256, intermediate_size=768, num_layers=4, max_tokens=128)
TRAINERS = ("actor", "critic", "reference")
NUM_STEPS, NUM_PROMPTS, RESPONSE_TOKENS = 9, 32, 48


def run_steps(calibrated: Path, num_devices: int, config: CalibrateConfig) -> Run:
    """Steps in a pool of `num_devices`, predicted with the constants and the cluster in
    `calibrated`."""
    with tempfile.TemporaryDirectory() as directory:
        _prepare(Path(directory))
        overrides = [
            f"model.path={directory}",
            f"data.train={directory}/prompts.jsonl",
            f"data.batch_size={NUM_PROMPTS}",
            "reward.function=recipes.quickstart.reward:exact_match",
            f"device={'cuda' if torch.cuda.is_available() else 'cpu'}",
            f"num_devices={num_devices}",
            f"threads_per_device={config.threads_per_process}",
            f"actor.generation.precision={config.precision}",
            f"actor.generation.sampling.max_response_tokens={RESPONSE_TOKENS}",
            "actor.generation.sampling.ignore_eos=true",
            f"loop.num_steps={NUM_STEPS}",
            "loop.resume=never",
            "metrics.console=false",
            "cluster.address=local",
            f"plan.calibration={calibrated / 'calibration.json'}",
            f"plan.cluster={calibrated / 'cluster.json'}",
            f"output_dir={directory}/run",
        ]
        for role in TRAINERS:
            overrides.append(f"{role}.train.engine={config.engine}")
            overrides.append(f"{role}.train.precision={config.precision}")
        register()
        with initialize_config_module("recipes", version_base="1.3"):
            settings = to_settings(compose("ppo", overrides))
        outcome = run(settings)
        assert outcome is not None
        mapping = DeviceMapping.load(Path(settings.output_dir) / MAPPING)
        return measured_run(f"whole steps on {num_devices}", mapping, outcome)


def _prepare(directory: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer, SHAPE, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    lines = []
    for number in range(NUM_PROMPTS * NUM_STEPS):
        lines.append(json.dumps({"prompt": f"{number:08d}", "answer": str(number)}))
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
