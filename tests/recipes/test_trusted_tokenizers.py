"""B28: a tokenizer that needs trust_remote_code, or stands in another revision, is loaded alike by
every role: data, generation engine, rewards, costs, judges and the export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from recipes.python_api import evaluate, run
from tests.tiny import make_data, make_model
from workers.config import ModelConfig
from workers.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
RUN = {
    "runtime": "local",
    "actor.generation.engine": "hf",
    "actor.generation.precision": "fp32",
    "actor.train.precision": "fp32",
    "actor.generation.sampling.max_response_tokens": 4,
    "actor.generation.sampling.stop_strings": ["7"],
    "data.batch_size": 2,
    "loop.num_steps": 1,
    "loop.validate_every": 0,
    "algorithm.samples_per_prompt": 2,
    "metrics.console": False,
}


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and in tokenizer/ below it one whose class is in that directory: with the model's
    configuration beside it transformers would take Qwen2's class without a word."""
    model = make_model(tmp_path_factory.mktemp("own") / "model", layers=1)
    directory = model / "tokenizer"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).rename(directory / name)
    (directory / "tokenization_own.py").write_text(CODE)
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["tokenizer_class"] = "OwnTokenizer"
    content["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    path.write_text(json.dumps(content))
    return model


def settings(model: Path, tmp_path: Path) -> dict[str, object]:
    data = make_data(tmp_path / "prompts.jsonl", rows=4)
    return {
        **RUN,
        "model.path": model,
        "model.tokenizer": model / "tokenizer",
        "model.trust_remote_code": True,
        "data.train": data,
        "output_dir": tmp_path / "out",
    }


def test_b28_rewards_costs_and_export_trust_what_the_model_does(
    own_code: Path, tmp_path: Path
) -> None:
    of_cost = {
        "cost.function": "tests.recipes.rewards:plain",
        "critic.train.precision": "fp32",
        "cost_critic.train.precision": "fp32",
    }
    outcome = run(
        "safe_rlhf",
        settings(own_code, tmp_path) | of_cost,
        reward="tests.recipes.rewards:plain",
    )
    assert outcome.num_steps == 1
    exported = next((tmp_path / "out" / "checkpoints").glob("*/huggingface/tokenizer_config.json"))
    assert "OwnTokenizer" in exported.read_text()


@pytest.mark.parametrize("verdict", ["probability", "written"])
def test_b28_a_judge_reads_the_policys_text(own_code: Path, tmp_path: Path, verdict: str) -> None:
    of_judge: dict[str, object] = {
        "judge.model.path": own_code,
        "judge.model.tokenizer": own_code / "tokenizer",
        "judge.model.trust_remote_code": True,
        "judge.verdict": verdict,
        "judge.train.precision": "fp32",
        "judge.template": "{prompt} {response}",
        "judge.generation.precision": "fp32",
    }
    if verdict == "written":
        of_judge |= {
            "judge.unreadable_reward": 0.0,
            "judge.generation.engine": "hf",
            "judge.generation.sampling.max_response_tokens": 2,
        }
    else:
        of_judge |= {"judge.yes": "5", "judge.no": "6"}
    outcome = run("generative_reward", settings(own_code, tmp_path) | of_judge)
    assert outcome.num_steps == 1


def test_b28_without_trust_it_is_one_line(own_code: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trust_remote_code") as raised:
        evaluate(
            {
                **RUN,
                "model.path": own_code,
                "model.tokenizer": own_code / "tokenizer",
                "data.validation": make_data(tmp_path / "prompts.jsonl", rows=2),
                "output_dir": tmp_path / "out",
                "algorithm.samples_per_prompt": 1,
            },
            reward="tests.recipes.rewards:plain",
        )
    assert "\n" not in str(raised.value)


def test_b28_another_revision_is_every_roles(tmp_path: Path) -> None:
    """A hub cache that knows revision v2 only: whoever asks for the default one finds nothing."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    commit = "a" * 40
    (repository / "refs" / "v2").write_text(commit)
    (repository / "snapshots").mkdir()
    shutil.move(make_model(tmp_path / "model", layers=1), repository / "snapshots" / commit)
    data = make_data(tmp_path / "prompts.jsonl", rows=4)
    arguments = []
    for name, value in RUN.items():
        arguments.append(f"{name}={json.dumps(value)}")
    command = [
        *(sys.executable, "-m", "recipes.grpo"),
        *arguments,
        "model.path=owner/tiny",
        "model.revision=v2",
        f"data.train={data}",
        f"output_dir={tmp_path}/out",
        "reward.function=tests.recipes.rewards:plain",
    ]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "out" / "checkpoints").glob("*/huggingface/tokenizer.json"))


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    """transformers makes one that knows no token from the model's type."""
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows no tokens; set model"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
