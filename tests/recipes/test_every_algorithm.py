"""Every algorithm trains two tiny steps through its own recipe, in this process: real models,
engines, losses and checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from controllers import ALGORITHMS
from hybridflow.metrics import read_jsonl
from recipes.config import RunConfig
from recipes.main import to_settings
from recipes.run import run
from tests.tiny import make_data, make_model

COUNT = "tests.runtime.rewards:count"
JUDGE = [
    "judge.model.path={other}",
    "judge.train.precision=fp32",
    "judge.yes=3",
    "judge.no=4",
    "judge.template='{prompt} {response} 5'",
]
NEEDS: dict[str, list[str]] = {
    "ppo": [
        "actor.critic_warmup_steps=1",
        "algorithm.kl.target=6",
        "actor.loss.rollout_correction.correction=truncate",
    ],
    "safe_rlhf": [
        f"cost.function={COUNT}",
        "data.pretraining_column=prompt",
        "data.pretraining_batch_size=3",
        "data.pretraining_tokens=4",
    ],
    "dapo": ["algorithm.overlong_buffer_tokens=2"],
    "pass_at_k": ["algorithm.k=2"],
    "distillation": ["teacher.model.path={other}", "teacher.train.precision=fp32"],
    "online_dpo": JUDGE,
    "generative_reward": [
        "judge.model.path={other}",
        "judge.verdict=written",
        "judge.template='{prompt} {response}'",
        "judge.generation.engine=hf",
        "judge.generation.precision=fp32",
        "judge.generation.sampling.max_response_tokens=1",
        r"judge.pattern='\b\d*[02468]\b'",
        "judge.unreadable_reward=-1",
    ],
}
"""Settings that a recipe cannot do without, or that are worth a step."""


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("tiny")
    model, data = make_model(directory / "model", layers=1), make_data(directory / "prompts.jsonl")
    make_model(directory / "other", layers=1, seed=1)
    yield [
        "runtime=local",
        f"model.path={model}",
        f"data.train={data}",
        "data.batch_size=3",
        f"reward.function={COUNT}",
        "actor.generation.engine=hf",
        "actor.generation.precision=fp32",
        "actor.generation.sampling.max_response_tokens=6",
        *(
            f"{role}.train.precision=fp32"
            for role in ("actor", "critic", "cost_critic", "reference")
        ),
        "actor.train.optimizer.learning_rate=1e-3",
        "algorithm.samples_per_prompt=4",
        "algorithm.num_mini_batches=2",
        "loop.num_steps=2",
        "metrics.console=false",
    ]
    torch.set_num_threads(threads)


def configured(
    name: str, common: list[str], composed: Callable[..., DictConfig], *further: str
) -> RunConfig:
    text = [
        argument.replace("data.train", "data.pretraining")
        for argument in common
        if argument.startswith("data.train")
    ]
    streams = text if "pretraining" in ALGORITHMS[name].streams else []
    other = (
        next(argument for argument in common if argument.startswith("model.path"))
        .partition("=")[2]
        .replace("/model", "/other")
    )
    needs = [need.replace("{other}", other) for need in NEEDS.get(name, [])]
    return to_settings(composed(name, [*common, *needs, *streams, *further]))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_steps(
    name: str, common: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    config = configured(name, common, composed, f"output_dir={tmp_path}")
    outcome = run(config)
    assert outcome is not None and outcome.num_steps == 2
    assert outcome.largest.get("actor/log_prob_gap_max", 0.0) < 1e-4  # only policy gradients log it
    steps = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert all(
        math.isfinite(value) or name == "critic/explained_variance"
        for row in steps
        for name, value in row.items()
        if name != "split"
    )
    last = steps[-1]
    assert last["actor/grad_norm"] > 0 and last.get("actor/ratio_mean", 1.0) == pytest.approx(
        1, abs=0.2
    )
    before = load_file(Path(config.model.path) / "model.safetensors")
    after = load_file(policy(tmp_path))
    assert any(not torch.equal(weight, after[key]) for key, weight in before.items())
    if name in CHECKS:
        CHECKS[name](steps)


@pytest.mark.parametrize("name", ["safe_rlhf", "dapo"])
def test_a_resumed_run_is_the_undisturbed_one(
    name: str, common: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """Those with most to lose: lambda and its window of costs, the position in the text;
    prompts drawn beyond a step's own."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    further = [
        "loop.num_steps=3",
        "loop.checkpoint_every=2",
        "loop.keep_last=2",
        "actor.critic_warmup_steps=1" if name == "safe_rlhf" else "seed=0",
    ]
    run(configured(name, common, composed, *further, f"output_dir={whole}"))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000003")
    run(configured(name, common, composed, *further, f"output_dir={cut}"))
    undisturbed, resumed = (load_file(policy(output, 3)) for output in (whole, cut))
    assert all(torch.equal(weight, resumed[key]) for key, weight in undisturbed.items())
    last = [read_jsonl(output / "metrics.jsonl")[-1] for output in (whole, cut)]
    assert last[0]["step"] == last[1]["step"] == 3
    names = [
        key
        for key in last[0]
        if key.startswith(("reward/", "cost/", "actor/", "dynamic_sampling/"))
        and "/memory/" not in key
    ]
    assert names and all(last[0][key] == last[1][key] for key in names)


def test_a_step_without_rows_moves_nothing(
    common: list[str], composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """No answer is good enough in either step; the optimizer's weight decay alone would change the
    weights."""
    further = [
        "algorithm.min_reward=1000",
        "actor.train.optimizer.weight_decay=0.5",
        f"output_dir={tmp_path}",
    ]
    config = configured("rejection_sampling", common, composed, *further)
    run(config)
    before = load_file(Path(config.model.path) / "model.safetensors")
    after = load_file(policy(tmp_path))
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())
    steps = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert [(row["best/rows"], row["actor/updates_without_rows"]) for row in steps] == [
        (0.0, 1.0)
    ] * 2


def policy(output: Path, step: int = 2) -> Path:
    return output / "checkpoints" / f"step-{step:08d}" / "huggingface" / "model.safetensors"


def ppo_warmed_up(steps: list[dict[str, float]]) -> None:
    assert (
        "actor/grad_norm" not in steps[0]
        and steps[0]["actor/critic_warmup_steps"] == 1
        and steps[0]["critic/grad_norm"] > 0
    )
    assert steps[1]["actor/rollout_ratio_mean"] == pytest.approx(1, abs=1e-3), (
        "the correction's metrics"
    )
    assert (
        steps[0]["kl/coefficient"] == 0.05 and 0 < abs(steps[1]["kl/coefficient"] - 0.05) < 1e-3
    ), "it adapts, and is logged"


def text_was_trained_on(steps: list[dict[str, float]]) -> None:
    assert steps[0]["actor/pretrain_nll"] == pytest.approx(math.log(128), rel=0.1), (
        "random weights and 128 words"
    )
    assert steps[0]["cost_critic/value_loss"] > 0 and steps[0]["cost/multiplier"] > 1


def dapo_filled_up(steps: list[dict[str, float]]) -> None:
    assert all(row["dynamic_sampling/prompts_kept"] == 3 for row in steps)


def odd_verdicts_were_counted(steps: list[dict[str, float]]) -> None:
    assert 0 < sum(row["reward/unreadable"] for row in steps) < 2
    assert all(row["reward/min"] == -1 or row["reward/unreadable"] == 0 for row in steps), (
        "never a 0 that nobody gave"
    )


CHECKS = {
    "ppo": ppo_warmed_up,
    "safe_rlhf": text_was_trained_on,
    "dapo": dapo_filled_up,
    "generative_reward": odd_verdicts_were_counted,
}
