"""The bound on staleness holds in every algorithm that answers prompts, however it trains its actor, and
the versions that it counts are those of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controllers import ALGORITHMS
from controllers.algorithm_base import batch_metrics
from controllers.grpo import GRPO, GRPOConfig, compute_advantages
from hybridflow import open_session
from hybridflow.batch import Batch
from hybridflow.results import Metrics
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


class Twice(GRPO):
    """Trains twice on what it drew: as GRPO, and by imitation."""

    def step(self, prompts: Batch) -> Metrics:
        batch = prompts | self.actor.generate_sequences(prompts)
        batch |= self.reward.compute_reward(batch)
        batch |= compute_advantages(batch, self.config)
        metrics = batch_metrics(batch) | self.actor.update_actor(batch)
        return metrics | self.actor.update_supervised(batch)


class Hidden(Twice):
    """Imitates past the actor whose responses are drawn ahead."""

    def step(self, prompts: Batch) -> Metrics:
        actor = self.actor
        assert isinstance(actor, StreamingActor)
        batch = prompts | actor.generate_sequences(prompts)
        batch |= self.reward.compute_reward(batch)
        return batch_metrics(batch) | actor._trainer.update_supervised(batch)


def drawn_ahead(tmp_path: Path, algorithm: type[GRPO], num_steps: int) -> list[dict[str, float]]:
    """The metrics of steps of that algorithm, one step ahead."""
    settings = tiny_settings(tmp_path) | TRUNCATE | {"asynchrony.staleness": 1}
    settings |= {"loop.num_steps": num_steps, "output_dir": tmp_path / "run"}
    with open_session("grpo", settings, reward=by_length) as session:
        roles = {name: session.roles[name] for name in ("actor", "reference", "reward")}
        config = session.config.algorithm
        assert isinstance(config, GRPOConfig)
        session.loop.algorithm = algorithm(**roles, config=config)
        return [session.step() for _ in range(num_steps)]


def test_a_step_may_train_its_actor_twice(tmp_path: Path) -> None:
    """Staleness counts updates, so that it and its bound are twice those of one update a step."""
    once = drawn_ahead(tmp_path / "once", GRPO, STEPS)
    twice = drawn_ahead(tmp_path / "twice", Twice, STEPS)
    assert max(step["staleness/max"] for step in once) in (1, 2, 3)
    assert {step["staleness/max"] % 2 for step in twice} == {0}
    assert 2 <= max(step["staleness/max"] for step in twice) <= 6


def test_an_update_past_the_actor_ends_the_run(tmp_path: Path) -> None:
    """Generation would keep the weights of before, and the bound would be of no use."""
    with pytest.raises(RuntimeError, match=r"something trained the actor past Colocated"):
        drawn_ahead(tmp_path, Hidden, 2)
