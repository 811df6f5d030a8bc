"""A group that is given up counts nowhere: the step is the one whose prompts never had it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from controllers.given_up import GivenUp, WatchedRole
from hybridflow import open_session
from hybridflow.batch import Batch
from hybridflow.errors import UserCodeError
from hybridflow.results import Metrics
from recipes.evaluate import evaluate
from recipes.python_settings import make_settings
from tests.agents.chat import chat_settings
from tests.agents.test_runs import SECONDS
from workers.agents.config import EpisodeConfig
from workers.agents.model import Model

FAILS: set[str] = set()
"""Answers of the tasks whose episodes fail."""
FAILS_AFTER = 0
"""Episodes of such a task that still work."""
BEGUN: Counter[str] = Counter()


async def fragile(model: Model, task: dict[str, Any]) -> float:
    BEGUN[task["answer"]] += 1
    if task["answer"] in FAILS and BEGUN[task["answer"]] > FAILS_AFTER:
        raise ConnectionError(f"no sandbox for {task['answer']}")
    reply = await model.reply(task["prompt"])
    return float(sum(map(ord, reply.text)) % 7)


def cost(*, response: str, **columns: object) -> float:
    return float(len(response) % 3)


def needs(recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    fp32 = {f"{role}.train.precision": "fp32" for role in ("critic", "cost_critic", "reference")}
    text = settings["data.train"].with_name("text.jsonl")
    text.write_text(json.dumps({"text": "one two three four five"}) + "\n")
    further: dict[str, dict[str, Any]] = {
        "grpo": {},
        "dr_grpo": {},
        "ppo": {"algorithm.kl.target": 6.0, "algorithm.kl.horizon": 10, "critic": fp32},
        "remax": {},
        "dapo": {"algorithm.max_rounds": 1},
        "rejection_sampling": {},
        "distillation": {
            "teacher.model.path": settings["model.path"],
            "teacher.train.precision": "fp32",
        },
        "safe_rlhf": {
            "data.pretraining": text,
            "data.pretraining_column": "text",
            "data.pretraining_batch_size": 2,
            "data.pretraining_tokens": 8,
        },
    }
    chosen = further[recipe]
    if recipe in ("ppo", "remax", "safe_rlhf"):
        used = {"ppo": ("critic", "reference"), "remax": ("reference",)}.get(
            recipe, ("critic", "cost_critic", "reference")
        )
        chosen |= {name: value for name, value in fp32.items() if name.split(".")[0] in used}
    chosen.pop("critic", None)
    return chosen


def one_step(
    directory: Path, recipe: str, settings: dict[str, Any], rows: list[int], **functions: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    BEGUN.clear()
    here = settings | {"output_dir": directory}
    with open_session(recipe, here, environment=fragile, **functions) as session:
        prompts = next(session.prompts)
        uids = prompts.tensor("uid").unique()
        kept = torch.isin(prompts.tensor("uid"), uids[rows])
        metrics = session.step(prompts.rows(kept.numpy()))
        session.save(directory / "saved")
    model = AutoModelForCausalLM.from_pretrained(directory / "saved")
    numbers = {}
    for name, value in metrics.items():
        if not any(map(name.__contains__, SECONDS)) and not name.startswith("episode/"):
            numbers[name] = value
    return numbers | {"given_up": metrics["episode/given_up"]}, dict(model.state_dict())


RECIPES = (
    "grpo",
    "dr_grpo",
    "ppo",
    "remax",
    "dapo",
    "rejection_sampling",
    "distillation",
    "safe_rlhf",
)
EVERY = [
    pytest.param(recipe, late, marks=[] if (recipe, late) == ("remax", False) else pytest.mark.slow)
    for recipe in RECIPES
    for late in (False, True)
]


@pytest.mark.parametrize(("recipe", "late"), EVERY)
def test_the_step_is_that_of_the_other_prompts(recipe: str, late: bool, tmp_path: Path) -> None:
    """Every metric and weight, bit for bit. Late: only the last episode of the prompt fails, which
    is the greedy one for ReMax."""
    global FAILS, FAILS_AFTER
    settings = chat_settings(tmp_path) | {"data.shuffle": False, "episode.retries": 0}
    settings |= needs(recipe, settings)
    functions = {"cost": cost} if recipe == "safe_rlhf" else {}
    FAILS, FAILS_AFTER = {"1"}, (3 if recipe == "remax" else 1) if late else 0
    broken, weights = one_step(tmp_path / "broken", recipe, settings, [0, 1, 2, 3], **functions)
    FAILS = set()
    whole, same = one_step(tmp_path / "whole", recipe, settings, [0, 2, 3], **functions)
    assert broken.pop("given_up") == 2.0
    assert whole.pop("given_up") == 0.0
    if late:  # the engine's batch has a row more, whose sums are rounded differently
        assert broken == {name: pytest.approx(value, abs=1e-4) for name, value in whole.items()}
    else:
        assert broken == whole
        for name, values in weights.items():
            assert torch.equal(values, same[name]), name


@pytest.mark.parametrize("recipe", ["ppo", pytest.param("safe_rlhf", marks=pytest.mark.slow)])
def test_every_group_may_be_given_up(recipe: str, tmp_path: Path) -> None:
    """With max_given_up=1 a step that has nothing to learn from moves nothing, and says so."""
    global FAILS, FAILS_AFTER
    settings = chat_settings(tmp_path) | {"episode.retries": 0, "episode.max_given_up": 1.0}
    settings |= needs(recipe, settings) | {"algorithm.num_mini_batches": 2}
    functions = {"cost": cost} if recipe == "safe_rlhf" else {}
    FAILS, FAILS_AFTER = set(map(str, range(8))), 0
    numbers, weights = one_step(tmp_path / "out", recipe, settings, [0, 1, 2, 3], **functions)
    assert numbers["given_up"] == 8.0
    assert numbers["kl/coefficient"] == (0.05 if recipe == "ppo" else 0.02)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(weights[name], values) for name, values in before.items())


class Scripted:
    """An actor whose k-th generation fails for these uids."""

    def __init__(self, fails: list[set[int]]) -> None:
        self.fails, self.updates = fails, 0

    def generate_sequences(self, prompts: Batch, *, do_sample: bool = True) -> Batch:
        fails = self.fails.pop(0)
        failed = [uid in fails for uid in prompts.tensor("uid").tolist()]
        further = [{"failures": ["E"] * bad, "reason": f"broken {bad}"} for bad in failed]
        return Batch.of(
            finish_reason=["failed" if bad else "stop" for bad in failed], episode_metrics=further
        )

    def update_actor(self, batch: Batch) -> Metrics:
        self.updates += 1
        return Metrics({"rows": len(batch)})


def prompts(*uids: int) -> Batch:
    return Batch.of(uid=torch.tensor(uids)).repeat(2)


def test_groups_are_counted_over_all_rounds_of_a_step() -> None:
    """A further round of one group, which fails, is one of five; where the limit is passed nothing
    is updated, and the next step begins anew."""
    given_up = GivenUp("m:E", EpisodeConfig(max_given_up=0.25, retries=0))
    inner = Scripted([set(), {9}, {1}, {5}, set()])
    actor = WatchedRole(inner, given_up)
    given_up.begin()
    first, further = prompts(1, 2, 3, 4), prompts(9)
    batch = first | actor.generate_sequences(first)
    assert len(batch) == 8
    further |= actor.generate_sequences(further)
    assert len(further) == 0
    assert actor.update_actor(batch)["rows"] == 8
    assert given_up.metrics() == {"episode/given_up": 2.0, "episode/failed/E": 2.0}
    for uids in ((1, 2, 3, 4), (5,)):
        actor.generate_sequences(prompts(*uids))
    with pytest.raises(UserCodeError, match=r"^environment=m:E: 2 of 5 groups .* broken True$"):
        actor.update_actor(batch)
    assert inner.updates == 1
    whole = prompts(6, 7)
    assert len(whole | actor.generate_sequences(whole)) == 4
    actor.update_actor(batch)
    assert given_up.metrics() == {"episode/given_up": 0.0}


def test_validation_is_the_mean_of_whole_groups(tmp_path: Path) -> None:
    global FAILS, FAILS_AFTER
    settings = chat_settings(tmp_path) | {
        "data.validation": tmp_path / "tasks.jsonl",
        "episode.retries": 0,
        "output_dir": tmp_path / "out",
    }
    FAILS, FAILS_AFTER = {"1", "6"}, 0
    with open_session("grpo", settings, environment=fragile) as session:
        numbers = session.validate()
        rows = session.loop.validation().rows  # type: ignore[misc]
        FAILS = {"1", "6", "7"}
        with pytest.raises(UserCodeError, match="3 of 8 groups"):
            session.validate()
    assert rows is not None
    rewards = [
        value
        for value, reason in zip(
            rows.tensor("rewards").tolist(), rows.objects("finish_reason"), strict=True
        )
        if reason != "failed"
    ]
    assert len(rewards) == 6 and numbers["reward/mean"] == pytest.approx(sum(rewards) / 6)
    assert numbers["episode/given_up"] == 2.0


def test_an_evaluation_leaves_them_out(tmp_path: Path) -> None:
    """pass@1, the mean reward and the pass rates are those of the prompts that were answered."""
    global FAILS, FAILS_AFTER
    settings = chat_settings(tmp_path)
    FAILS, FAILS_AFTER = {"3"}, 0
    names = ("runtime", "model.path", "data.batch_size", "actor.generation.engine")
    here = {name: settings[name] for name in names} | {
        "data.validation": settings["data.train"],
        "actor.generation.precision": "fp32",
        "actor.generation.sampling.max_response_tokens": 6,
        "episode.retries": 0,
        "output_dir": tmp_path / "out",
        "metrics.console": False,
    }
    config = make_settings("evaluate", here, environment=fragile)
    numbers = evaluate(config)
    assert numbers is not None
    rates = [json.loads(line) for line in (tmp_path / "out" / "pass_rates.jsonl").open()]
    assert len(rates) == 7 and numbers["prompts"] == 7.0 and numbers["episode/given_up"] == 1.0
    rewards = [row["mean_reward"] for row in rates]
    assert numbers["reward/mean"] == pytest.approx(sum(rewards) / 7)
    assert numbers["pass@1"] == pytest.approx(sum(reward >= 1.0 for reward in rewards) / 7)
