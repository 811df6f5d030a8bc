"""Whole runs: resume and placements in this process and a cluster that stays; SIGKILL and Ctrl-C
through the real command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from hybridflow import WorkerError, run
from tests.tiny import make_data, make_model

ROOT = Path(__file__).parents[2]
COUNT = "reward.function=tests.runtime.rewards:count"
TIMES = re.compile(r"seconds|tokens_per_s|time_s|sync/.*_s$|memory")


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    model, data = make_model(directory / "model"), make_data(directory / "prompts.jsonl")
    return [
        f"model.path={model}",
        f"data.train={data}",
        f"data.validation={data}",
        "data.batch_size=7",
        "actor.train.precision=fp32",
        "critic.train.precision=fp32",
        "reference.train.precision=fp32",
        "actor.generation.precision=fp32",
        "actor.generation.max_model_len=64",
        "actor.generation.kv_cache_bytes=16777216",
        "actor.generation.sampling.max_response_tokens=8",
        "actor.train.optimizer.learning_rate=1e-3",
        "algorithm.samples_per_prompt=2",
        "algorithm.num_mini_batches=2",
        "loop.validate_every=2",
        "loop.num_steps=4",
        "threads_per_device=1",
    ]


HF = "actor.generation.engine=hf"
"""Where the engine does not matter: it starts in a third of vLLM's time."""
PPO = [
    COUNT,
    "critic.num_epochs=2",
    "loop.checkpoint_every=2",
    "loop.keep_last=3",
    "metrics.console=false",
    "metrics.tensorboard=false",
]


@pytest.fixture(scope="module", autouse=True)
def killed(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[psutil.Process]:
    """The processes of a run whose driver was killed with SIGKILL, before the other tests."""
    return stopped_run(signal.SIGKILL, [*common, HF], tmp_path_factory.mktemp("killed"))


def numbers(output: Path) -> list[dict[str, float]]:
    """The metrics that a run logged, without those that a clock decides."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not TIMES.search(name)} for row in rows]


def policy(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(
        output / "checkpoints" / f"step-{step:08d}" / "huggingface" / "model.safetensors"
    )


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> str:
    """The generation engine of the runs that are compared. Layouts with vLLM:
    tests/e2e/test_layouts_agree.py."""
    return f"actor.generation.engine={request.param}"


@pytest.fixture(scope="module")
def whole(common: list[str], engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an undisturbed run in one process, with checkpoints after steps 2 and 4."""
    output = tmp_path_factory.mktemp("whole")
    run("ppo", [*common, *PPO, engine, "runtime=local", f"output_dir={output}"])
    return output


def test_resume_is_bit_identical_and_works_on_other_ranks(
    common: list[str], engine: str, whole: Path, tmp_path: Path, ray_cluster: None
) -> None:
    half, wide = tmp_path / "half", tmp_path / "wide"
    for output in (half, wide):
        shutil.copytree(whole, output)
        shutil.rmtree(output / "checkpoints" / "step-00000004")
    run("ppo", [*common, *PPO, engine, "runtime=local", f"output_dir={half}"])
    assert numbers(half) == numbers(whole)
    for name, weight in policy(whole, 4).items():
        assert torch.equal(policy(half, 4)[name], weight), name

    run("ppo", [*common, *PPO, engine, "num_devices=2", f"output_dir={wide}"])
    for name, weight in policy(whole, 4).items():
        assert (policy(wide, 4)[name] - weight).abs().max() < 2e-5, name


def unmoved(output: Path) -> list[dict[str, float]]:
    """The numbers of a run without the bytes that it moved."""
    return [
        {name: value for name, value in row.items() if not name.endswith("_bytes")}
        for row in numbers(output)
    ]


def test_separate_pools_equal_one_process(
    common: list[str], engine: str, whole: Path, tmp_path: Path, ray_cluster: None
) -> None:
    pools = [
        "placement=custom",
        "pools.policy.roles=[actor,reference]",
        "pools.values.roles=[critic,reward]",
        "pools.samples.roles=[generation]",
    ]
    run("ppo", [*common, *PPO, engine, f"output_dir={tmp_path}", *pools])
    assert unmoved(tmp_path) == unmoved(whole), "all but the bytes that were moved"


@pytest.mark.slow
def test_a_computed_placement_equals_one_process(
    common: list[str], engine: str, whole: Path, tmp_path: Path, ray_cluster: None
) -> None:
    """The quick tests of placement=auto end before the run starts
    (tests/recipes/test_forecast.py)."""
    auto = ["placement=auto", "num_devices=2", f"output_dir={tmp_path / 'auto'}"]
    run("ppo", [*common, *PPO, engine, "loop.num_steps=2", *auto])
    mapping = json.loads((tmp_path / "auto" / "mapping.json").read_text())
    assert sorted(role["role"] for role in mapping["roles"]) == ["actor", "critic", "reference"]
    assert {call["call"] for call in mapping["calls"]} >= {
        "actor.generate_sequences",
        "critic.update_critic",
        "actor.update_actor",
    }
    # Its layouts and micro-batches may differ: equal within rounding.
    first = [row for row in numbers(whole) if row["step"] <= 2]
    for row, expected in zip(numbers(tmp_path / "auto"), first, strict=True):
        learned = {
            name: value
            for name, value in expected.items()
            if name.startswith(("reward/", "kl/", "critic/", "actor/"))
        }
        assert {name: row[name] for name in learned} == pytest.approx(learned, rel=1e-3, abs=1e-4)


def test_a_reward_that_raises_stops_the_run_with_the_row(
    common: list[str], tmp_path: Path, ray_cluster: None
) -> None:
    settings = [*common, HF, "reward.function=tests.runtime.rewards:broken"]
    with pytest.raises(
        WorkerError,
        match=r"reward rank 0 in compute_reward .*raised KeyError: 'answer' on prompt '",
    ):
        run("grpo", [*settings, f"output_dir={tmp_path}"])
    assert no_process_of(tmp_path)


def test_nothing_is_left_behind_after_ctrl_c(common: list[str], tmp_path: Path) -> None:
    _, alive = psutil.wait_procs(stopped_run(signal.SIGINT, [*common, HF], tmp_path), timeout=240)
    assert not alive, described(alive)


def test_nothing_is_left_behind_after_kill_9(killed: list[psutil.Process]) -> None:
    """Last in this file: Ray takes about a minute to see that its driver is gone, and the other
    tests run meanwhile."""
    _, alive = psutil.wait_procs(killed, timeout=400)
    assert not alive, described(alive)


def stopped_run(how: signal.Signals, common: list[str], output: Path) -> list[psutil.Process]:
    """The processes below a run that was stopped in its training."""
    command = [
        sys.executable,
        "-m",
        "recipes.grpo",
        *common,
        COUNT,
        "cluster.address=local",
        "loop.num_steps=100000",
        f"output_dir={output}",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_steps(process, output / "metrics.jsonl")
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(
            title.startswith("ray::") and "IDLE" not in title for title in described(family)
        ), "hosts run"
        os.kill(process.pid, how)
        process.wait(timeout=240)
    finally:
        if process.poll() is None:
            process.kill()
    return family


def described(processes: list[psutil.Process]) -> list[str]:
    return [" ".join(member.cmdline())[:200] for member in processes]


def wait_for_steps(process: subprocess.Popen[bytes], metrics: Path) -> None:
    deadline = time.monotonic() + 600
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "no step within 600 s"
        time.sleep(0.5)


def no_process_of(output: Path) -> bool:
    """Whether no process still names the run's output directory."""
    return not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(output) in " ".join(p.info["cmdline"] or [])
    ]
