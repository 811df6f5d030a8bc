"""A loss from outside may read what update_actor reads where it is there: the rollout's and the
reference's log-probs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow import open_session
from tests.tiny import by_length, tiny_grpo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return tiny_grpo(tmp_path_factory.mktemp("columns"))


def test_the_rollouts_log_probs(tiny: dict[str, object], tmp_path: Path) -> None:
    """Both engines compute in fp32 with the same weights, so the ratio is 1 at every step."""
    settings = {
        **tiny,
        "output_dir": tmp_path,
        "actor.loss.name": "tests.extending.losses:against_the_rollout",
    }
    with open_session("grpo", settings, reward=by_length) as session:
        steps = [session.step(), session.step()]
    for numbers in steps:
        assert numbers["actor/rollout_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert numbers["actor/grad_norm"] > 0


def test_the_references_log_probs(tiny: dict[str, object], tmp_path: Path) -> None:
    """The policy is the reference until the first update has changed it."""
    settings = {
        **tiny,
        "output_dir": tmp_path,
        "actor.loss.name": "tests.extending.losses:against_the_reference",
        "actor.loss.kl_coefficient": 0.01,
    }
    with open_session("grpo", settings, reward=by_length) as session:
        first, second = session.step(), session.step()
    assert first["actor/reference_log_ratio_mean"] == pytest.approx(0.0, abs=1e-5)
    assert abs(second["actor/reference_log_ratio_mean"]) > 1e-4


def test_a_column_that_this_step_does_not_have_is_named(
    tiny: dict[str, object], tmp_path: Path
) -> None:
    """Without a KL there is no reference, and nobody writes ref_log_probs."""
    settings = {
        **tiny,
        "output_dir": tmp_path,
        "actor.loss.name": "tests.extending.losses:against_the_reference",
        "actor.loss.kl_coefficient": 0.0,
    }
    with (
        pytest.raises(ValueError, match="which reads ref_log_probs, and grpo does not write it"),
        open_session("grpo", settings, reward=by_length),
    ):
        raise AssertionError("the session must not open")
