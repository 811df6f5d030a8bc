"""A training engine, a generation engine and a policy loss from a package outside the
repository, which declares them as entry points: nothing of ours is edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridflow.registry import Registry
from recipes.python_settings import make_settings
from recipes.run import run
from tests.extending.outside import write_package
from tests.tiny import make_data, make_model
from workers.engines import ENGINES, engine_class
from workers.engines.base import Outputs
from workers.generation import generation_engine_class
from workers.losses.config import PolicyLossConfig
from workers.losses.policy import policy_loss
from workers.losses.surrogates import surrogate
from workers.sequences import Sequences

REFUSALS = {
    "actor.train.tp=2": "actor: train.tp is 2, but engine whole has data ranks only",
    "actor.generation.prefix_caching=true": "prefix_caching is true, but engine loud has none",
    "actor.train.engine=outside.engine:FromALibrary": "but a_library_that_nobody_has is not installed",
    "actor.loss.name=outside.losses:moody": "reads mood, and grpo does not write it; use one of ppo_clip",
    "actor.loss.name=outside.losses:unmarked": "is no policy loss",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("site"))


@pytest.fixture
def importable(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    model, data = make_model(directory / "model"), make_data(directory / "prompts.jsonl")
    return [
        f"model.path={model}",
        f"data.train={data}",
        "data.batch_size=4",
        "reward.function=tests.runtime.rewards:count",
        "actor.train.precision=fp32",
        "actor.train.optimizer.learning_rate=1e-3",
        "actor.generation.precision=fp32",
        "actor.generation.prefix_caching=false",
        "actor.generation.sampling.max_response_tokens=8",
        "algorithm.samples_per_prompt=2",
        "algorithm.num_mini_batches=2",
        "loop.num_steps=2",
    ]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("importable")
def test_a_run_takes_all_three_by_their_entry_points(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine computes what fsdp computes, step for step; the loss reads its setting. As a
    command, and in Ray's workers, by module and name: test_algorithms_and_rewards.py."""
    loss = ["actor.loss.name=one_sided", "actor.loss.clip_low=0.01", "runtime=local"]
    own = ["actor.train.engine=whole", "actor.generation.engine=loud"]
    run(make_settings("grpo", [*common, *own, *loss, f"output_dir={tmp_path / 'own'}"]))
    assert "LOUD 8 prompts" in capsys.readouterr().out
    ours = ["actor.train.engine=fsdp", "actor.generation.engine=hf"]
    run(make_settings("grpo", [*common, *ours, *loss, f"output_dir={tmp_path / 'ours'}"]))
    assert "LOUD" not in capsys.readouterr().out
    for step, (left, right) in enumerate(
        zip(metrics(tmp_path / "own"), metrics(tmp_path / "ours"), strict=True)
    ):
        for name in ("actor/loss", "actor/grad_norm", "actor/below_fraction", "reward/mean"):
            assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.usefixtures("importable")
def test_a_dry_run_predicts_and_checks(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mapper asks the engine for its layouts, and every refusal is the engine's own."""
    outside = [
        "actor.train.engine=whole",
        "actor.generation.engine=loud",
        "num_devices=2",
        "dry_run=true",
    ]

    def dry_run(*arguments: str) -> str:
        run(make_settings("grpo", [*common, *outside, *arguments, f"output_dir={tmp_path}"]))
        return capsys.readouterr().out

    assert "update_actor" in dry_run()
    assert "update_actor" in dry_run("placement=auto")
    for argument, message in REFUSALS.items():
        with pytest.raises(ValueError, match=message):
            dry_run(argument)


@pytest.mark.usefixtures("importable")
def test_names_that_stand_for_nothing_say_what_there_is() -> None:
    for name, message in {
        "megatron": "engine is 'megatron'; known: fsdp, threed, deepspeed, whole, or package.module:Name",
        "outside.engine:Missing": "outside.engine has no 'Missing'",
        "outside.nowhere:Engine": "module 'outside.nowhere' can't be imported",
        "outside/engine.py:WholeEngine": "names a file; name the module: outside.engine:WholeEngine",
        "outside.generation:LoudEngine": "no subclass of workers.engines.base.TrainingEngine",
        "outside.engine:Unfinished": "a class without __init__, check, forward, limit",
    }.items():
        with pytest.raises(ValueError, match=message):
            engine_class(name)
    with pytest.raises(ValueError, match="known: vllm, hf, loud"):
        generation_engine_class("sglang")
    with pytest.raises(ValueError, match="policy_gradient, one_sided, or package"):
        surrogate("hinge")
    with pytest.raises(ValueError, match="which is no policy loss; mark the function with @reads"):
        surrogate("outside.losses:unmarked")


@pytest.mark.usefixtures("importable")
def test_a_name_of_two_packages_is_an_error() -> None:
    clashing = Registry(
        group=ENGINES.group, builtin={"whole": "workers.engines.fsdp.engine:FsdpEngine"}
    )
    with pytest.raises(
        ValueError, match=r"whole is outside.engine:WholeEngine and workers.engines.fsdp"
    ):
        list(clashing)


@pytest.mark.usefixtures("importable")
def test_the_loss_by_hand() -> None:
    """Ratios 2 and 1/2 with the bound 0.8 and advantages 1 and 3: -(2 * 1 + 0.8 * 3) / 2."""
    old = torch.tensor([-1.0, -1.0])
    sequences = Sequences(
        token_ids=torch.zeros(3, dtype=torch.int64),
        lengths=torch.tensor([3]),
        scored_lengths=torch.tensor([2]),
        per_token={
            "advantages": torch.tensor([1.0, 3.0]),
            "old_log_probs": old,
            "weights": torch.tensor([0.5, 0.5]),
        },
    )
    log_probs = old + torch.tensor([2.0, 0.5]).log()
    config = PolicyLossConfig(name="outside.losses:one_sided", clip_low=0.2)
    loss, measured = policy_loss(config)(Outputs(log_probs=log_probs), sequences)
    assert float(loss) == pytest.approx(-(2.0 + 0.8 * 3.0) / 2)
    assert float(measured["below_fraction"]) == pytest.approx(0.5)
