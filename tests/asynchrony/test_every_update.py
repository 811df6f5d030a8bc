"""The bound on staleness holds in every algorithm that answers prompts, however it trains its actor, and
the versions that it counts are those of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controllers import ALGORITHMS
from hybridflow import open_session
from tests.asynchrony.runs import TRUNCATE, tiny_settings
from workers.streaming_actor import StreamingActor

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5
ALONE = {"algorithm.samples_per_prompt": 1}
FURTHER: dict[str, dict[str, Any]] = {
    "generative_reward": {
        "judge.verdict": "written",
        "judge.template": "{prompt} {response}",
        "judge.generation.engine": "hf",
        "judge.generation.precision": "fp32",
        "judge.generation.sampling.max_response_tokens": 1,
        "judge.pattern": r"\b\d*[02468]\b",
        "judge.unreadable_reward": -1,
    }
    | TRUNCATE,
    "online_dpo": {
        "judge.train.precision": "fp32",
        "judge.yes": "3",
        "judge.no": "4",
        "judge.template": "{prompt} {response} 5",
    },
    "pass_at_k": {"algorithm.k": 2} | TRUNCATE,
    "ppo": {"critic.train.precision": "fp32"} | ALONE | TRUNCATE,
    "rejection_sampling": {"algorithm.min_reward": 2.0},
    "reinforce_plus_plus": ALONE | TRUNCATE,
    "remax": ALONE | TRUNCATE,
    "safe_rlhf": {"critic.train.precision": "fp32", "cost_critic.train.precision": "fp32"}
    | ALONE
    | TRUNCATE,
}
REFUSED = ("distillation",)
ANSWERING = [
    name
    for name, entry in ALGORITHMS.items()
    if entry.answers_prompts and "actor" in entry.roles and name not in REFUSED
]
QUICK = ("grpo", "online_dpo", "rejection_sampling", "ppo")


def by_length(*, response: str, **columns: object) -> float:
    return float(len(response) % 4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ANSWERING],
)
def test_versions_are_the_trainers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At every step: what a row is held to is the number of updates that the worker has made, and what
    is logged is the difference to the version that drew it."""
    settings = tiny_settings(tmp_path) | {"asynchrony.staleness": 1, "loop.num_steps": STEPS}
    settings |= FURTHER.get(name, TRUNCATE) | {"output_dir": tmp_path / "run"}
    functions: dict[str, Any] = {"reward": by_length}
    if name == "safe_rlhf":
        functions["cost"] = by_length
    if "judge" in ALGORITHMS[name].roles:
        settings |= {"judge.model.path": settings["model.path"]}
        functions = {}
    seen: list[tuple[int, int]] = []
    check = StreamingActor._check_versions

    def counted(actor: StreamingActor, names: Any) -> None:
        updates = actor.current_version()
        seen.extend((updates - actor._versions[row][0], updates) for row in names)
        check(actor, names)

    monkeypatch.setattr(StreamingActor, "_check_versions", counted)
    logged = []
    with open_session(name, settings, **functions) as session:
        for _ in range(STEPS):
            begun = len(seen)
            metrics = session.step()
            ages = [age for age, _ in seen[begun:]]
            assert metrics["staleness/max"] == max(ages)
            assert metrics["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
            logged.append(metrics["staleness/max"])
        newest = session.roles["actor"].current_version()
    assert newest > 0
    assert max(updates for _, updates in seen) >= newest - 1
    assert 1 <= max(logged) <= 2
