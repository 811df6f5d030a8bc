"""The first step on fresh samples: what it says of metrics, and what a run with a wrong setting
does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.errors import WorkerError
from recipes.config import RunConfig
from recipes.run import run
from tests.tiny import make_model
from workers.config import Precision, TrainConfig
from workers.consistency import check_first_step, tolerance_of
from workers.generation.config import GenerationConfig
from workers.role_config import ActorConfig, Consistency

FINE = {
    "ratio_max": 1.0 + 1e-6,
    "ratio_min": 1.0,
    "ratio_mean": 1.0,
    "approx_kl_k1": 1e-7,
    "log_prob_gap_max": 2e-6,
    "log_prob_gap_mean": 1e-7,
}
NO_TOKENS = {
    "ratio_max": -float("inf"),
    "ratio_min": float("inf"),
    "ratio_mean": 0.0,
    "approx_kl_k1": 0.0,
    "log_prob_gap_max": -float("inf"),
}


def actor(
    precision: Precision = Precision.fp32,
    consistency: Consistency = Consistency.error,
    tolerance: float = -1.0,
) -> ActorConfig:
    return ActorConfig(
        train=TrainConfig(precision=precision),
        generation=GenerationConfig(precision=Precision.fp32),
        consistency=consistency,
        consistency_tolerance=tolerance,
    )


@pytest.mark.parametrize(
    ("precision", "wrong", "message"),
    [
        (Precision.fp32, {"ratio_max": 1.01}, r"largest \|ratio - 1\| is 0.01, over 0.0001"),
        (Precision.fp32, {"ratio_min": 0.9}, r"largest \|ratio - 1\| is 0.1"),
        (Precision.fp32, {"approx_kl_k1": -0.02}, r"\|approximate KL\| is 0.02"),
        (
            Precision.fp32,
            {"log_prob_gap_max": 0.3},
            "largest gap to the generation engine's log-probs is 0.3",
        ),
        (Precision.fp32, {"log_prob_gap_max": float("nan")}, "log-probs is nan"),
        (
            Precision.bf16,
            {"log_prob_gap_mean": 0.07},
            "mean gap to the generation engine's log-probs is 0.07, over 0.05",
        ),
        (Precision.bf16, {"ratio_mean": 1.2}, r"\|mean ratio - 1\| is 0.2, over 0.05"),
    ],
)
def test_every_kind_of_disagreement_is_named(
    precision: Precision, wrong: dict[str, float], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        check_first_step(FINE | wrong, actor(precision), reports=True)


def test_agreement_no_tokens_and_switched_off() -> None:
    for precision in (Precision.fp32, Precision.bf16):
        assert check_first_step(FINE, actor(precision), reports=True) == {
            "consistency_violations": 0.0
        }
        assert check_first_step(NO_TOKENS, actor(precision), reports=True) == {
            "consistency_violations": 0.0
        }
    assert (
        check_first_step(
            FINE | {"log_prob_gap_max": 0.9}, actor(consistency=Consistency.off), reports=True
        )
        == {}
    )
    assert tolerance_of(actor(tolerance=0.3)) == 0.3
    # One token in bfloat16 may be far off; the mean may not.
    assert check_first_step(
        FINE | {"log_prob_gap_max": 0.9, "ratio_max": 2.0}, actor(Precision.bf16), reports=True
    )


RUN = [
    "runtime=local",
    "loop.num_steps=1",
    "data.batch_size=4",
    "actor.generation.engine=hf",
    "actor.train.precision=fp32",
    "actor.generation.precision=bf16",
    "actor.num_epochs=2",
]
"""A generation engine that rounds to bfloat16, and a tolerance (below) that does not allow for
it: the deliberately wrong setting."""


def test_a_run_with_a_wrong_setting_warns_or_stops(
    settings: Callable[..., RunConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = f"model.path={make_model(tmp_path / 'model')}"
    wrong = [*RUN, model, "actor.consistency_tolerance=1e-5"]
    with caplog.at_level(logging.WARNING, logger="workers.consistency"):
        run(settings("grpo", *wrong, f"output_dir={tmp_path / 'warns'}"))
    assert (
        "first optimizer step on fresh samples: mean gap to the generation engine's log-probs is"
        in caplog.text
    )
    assert (
        '"actor/consistency_violations": 1.0' in (tmp_path / "warns" / "metrics.jsonl").read_text()
    )
    caplog.clear()
    with pytest.raises(
        (RuntimeError, WorkerError), match=r"over 1e-05.*raise actor\.consistency_tolerance"
    ):
        run(settings("grpo", *wrong, "actor.consistency=error", f"output_dir={tmp_path / 'stops'}"))
    assert not (tmp_path / "stops" / "checkpoints").exists() or not list(
        (tmp_path / "stops" / "checkpoints").glob("step-*")
    )
    run(settings("grpo", *RUN, model, "actor.consistency=error", f"output_dir={tmp_path / 'fine'}"))
    assert (
        '"actor/consistency_violations": 0.0' in (tmp_path / "fine" / "metrics.jsonl").read_text()
    )
