"""samples.jsonl of whole runs, against the reward function's own record of what it was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from hybridflow.metrics import read_samples
from recipes.main import to_settings
from recipes.run import run
from tests.recipes.conftest import yaml_files

COMMON = [
    "runtime=local",
    "actor.generation.engine=hf",
    "actor.generation.precision=fp32",
    "actor.train.precision=fp32",
    "reference.train.precision=fp32",
    "critic.train.precision=fp32",
    "reward.function=tests.recipes.rewards:recorded",
    "data.batch_size=4",
    "loop.num_steps=2",
    "loop.validate_every=1",
    "metrics.console=false",
    "metrics.samples.validation=3",
    "metrics.samples.train=2",
    "metrics.samples.train_every=2",
]


@pytest.mark.parametrize("recipe", ["remax", "dapo"])
def test_samples_are_what_the_reward_function_saw(
    recipe: str,
    composed: Callable[..., DictConfig],
    required: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert recipe in yaml_files()
    monkeypatch.setenv("RECORD", str(tmp_path / "record.jsonl"))
    data = next(setting for setting in required if setting.startswith("data.train")).partition("=")[
        2
    ]
    settings = [*required, *COMMON, f"data.validation={data}", f"output_dir={tmp_path / 'out'}"]
    if recipe == "dapo":
        settings += ["algorithm.samples_per_prompt=2", "algorithm.max_rounds=2"]
    run(to_settings(composed(recipe, settings)))

    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    known = {(row["prompt"], row["response"], row["finish_reason"]): row for row in record}
    texts = [json.loads(line)["prompt"] for line in Path(data).read_text().splitlines()]
    samples = read_samples(tmp_path / "out" / "samples.jsonl")
    counts = [(row["step"], row["split"]) for row in samples]
    assert (
        counts
        == [(0, "validation")] * 3
        + [(1, "validation")] * 3
        + [(2, "train")] * 2
        + [(2, "validation")] * 3
    )
    for sample in samples:
        text = texts[sample["uid"] % len(texts)].replace(" ", "")
        assert sample["prompt"] == text, "with its special tokens, which are 0 and 1"
        row = known[re.sub("[01]", "", text), sample["response"], sample["finish_reason"]]
        assert sample["reward"] == pytest.approx(row["reward"], rel=1e-6)
        assert sample["reward/words"] == row["reward/words"]
        before = sample["step"] - (sample["split"] == "train")
        assert sample["weight_version"] == before, "a step's responses are drawn before its update"
    prompts: dict[int, list[int]] = {}
    for row in samples:
        if row["split"] == "validation":
            prompts.setdefault(row["step"], []).append(row["uid"])
    assert prompts[0] == prompts[1] == prompts[2], "the same prompts every time"
