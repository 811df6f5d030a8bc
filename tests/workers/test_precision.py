"""A10: precision=auto is bf16 where the device computes it, fp32 elsewhere, decided once and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.config import RunConfig
from recipes.preparation import dry_run_report, prepare
from recipes.python_settings import make_settings
from tests.tiny import make_data, make_model
from workers.config import ModelConfig, Precision, TrainConfig
from workers.precision import (
    automatic,
    computes_bf16,
    cpu_computes_bf16,
    explain,
    native_precision,
    precision_of,
    with_native_precision,
    with_precision,
)
from workers.role_config import ActorConfig

CPUS = {
    "laptop": ("flags\t\t: fpu sse4_2 fma avx avx2 f16c", False),
    "zen4": ("flags\t\t: avx2 avx512f avx512_bf16 avx512_vnni", True),
    "sapphire rapids": ("flags\t\t: avx2 avx512f amx_tile amx_bf16 amx_int8", True),
    "skylake": ("flags\t\t: avx2 avx512f avx512bw avx512vl", False),
    "neoverse v1": ("Features\t: fp asimd sve i8mm bf16", True),
    "neoverse n1": ("Features\t: fp asimd asimdhp", False),
    "no flags": ("model name\t: avx512_bf16", False),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_a10_a_cpu_is_known_by_its_flags(cpu: str) -> None:
    flags, expected = CPUS[cpu]
    text = f"processor\t: 0\nmodel name\t: A CPU\n{flags}\nbogomips\t: 4890\n"
    assert cpu_computes_bf16(text) is expected


def test_a10_auto_is_the_default_of_every_role() -> None:
    names = automatic(RunConfig())
    for role in ("actor", "critic", "reference", "reward", "judge", "policy", "teacher"):
        assert f"{role}.train.precision" in names
    assert "actor.generation.precision" in names
    assert "judge.generation.precision" in names


@pytest.mark.parametrize("computes", [True, False])
def test_a10_what_is_set_stays_and_auto_is_decided(computes: bool) -> None:
    config = ActorConfig(model=ModelConfig(path="m"), train=TrainConfig(precision=Precision.fp32))
    assert automatic(config) == ["generation.precision"]
    decided = with_precision(config, automatic(config), native_precision(computes))
    assert decided.train.precision is Precision.fp32
    assert precision_of(decided, "generation.precision") is (
        Precision.bf16 if computes else Precision.fp32
    )
    assert automatic(decided) == []


def test_a10_a_dry_run_says_what_auto_is_here(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "data.jsonl")
    arguments = [
        f"model.path={model}",
        f"data.train={data}",
        "reward.function=tests.recipes.rewards:plain",
        "actor.generation.engine=hf",
        "runtime=local",
        "actor.generation.sampling.max_response_tokens=8",
    ]
    prepared = prepare(make_settings("grpo", arguments))
    native = native_precision(computes_bf16("cpu"))
    assert prepared.config.actor.train.precision is native
    assert prepared.config.actor.generation.precision is native
    assert explain(native, "cpu") in dry_run_report(prepared)
    other = prepared.with_precision(Precision.bf16)
    assert other.config.actor.train.precision is Precision.bf16
    pinned = [
        *arguments,
        "actor.train.precision=fp32",
        "actor.generation.precision=fp32",
        "reference.train.precision=fp32",
    ]
    assert "precision=auto" not in dry_run_report(prepare(make_settings("grpo", pinned)))


def test_a10_a_worker_by_itself_decides_for_its_machine() -> None:
    config = with_native_precision(ActorConfig(model=ModelConfig(path="m")), "cpu")
    assert config.train.precision is native_precision(computes_bf16("cpu"))
    assert with_native_precision(None, "cpu") is None
