"""Whole runs with environments, in this process: rows against transformers, every kind of
algorithm, failures, resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow import dry_run, open_session, run
from hybridflow.metrics import Sample
from hybridflow.metrics.console import print_sample
from tests.agents.chat import chat_settings
from workers.agents.model import Model
from workers.agents.outcome import Outcome
from workers.reward_function import RewardFunction

SECONDS = ("seconds/", "_s", "/seconds", "_seconds", "memory/", "_bytes")


def length_reward(*, response: str, **columns: object) -> float:
    return float(len(response) % 5)


async def one_turn(model: Model, task: dict[str, Any]) -> float:
    reply = await model.reply(task["prompt"])
    return float(len(reply.text) % 5)


class Echo:
    """Answers what the policy says, three times; each reply earns its number of letters e."""

    def reset(self, task: dict[str, Any]) -> None:
        self.turns = 0

    def step(self, action: str) -> tuple[str, bool, float]:
        self.turns += 1
        return f"You said {action!r}.", self.turns == 3, float(action.count("e")) + len(action) % 3


def steps(
    directory: Path, settings: dict[str, object], recipe: str = "grpo", **functions: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics of two steps without those of time and memory, and the weights after them."""
    steps_metrics = []
    settings = settings | {"output_dir": directory / "out"}
    with open_session(recipe, settings, **functions) as session:
        for _ in range(2):
            metrics = session.step()
            steps_metrics.append(
                {
                    name: value
                    for name, value in metrics.items()
                    if not any(map(name.__contains__, SECONDS))
                }
            )
        session.save(directory / "saved")
    model = AutoModelForCausalLM.from_pretrained(directory / "saved")
    return steps_metrics, dict(model.state_dict())


def test_an_episode_of_one_turn_is_a_plain_response(tmp_path: Path) -> None:
    """Test 16: metrics and weights are the same, bit for bit."""
    settings = chat_settings(tmp_path)
    plain, plain_weights = steps(tmp_path / "plain", settings, reward=length_reward)
    episodes, weights = steps(tmp_path / "episodes", settings, environment=one_turn)
    for before, after in zip(plain, episodes, strict=True):
        assert {name: after[name] for name in before} == before
        assert after["episode/turns"] == 1.0
    for name, values in plain_weights.items():
        assert torch.equal(weights[name], values), name


def test_rows_are_what_was_sampled(tmp_path: Path) -> None:
    """Tokens, masks and log-probs of multi-turn rows against transformers on the whole row."""
    settings = chat_settings(tmp_path)
    with open_session(
        "grpo", settings | {"output_dir": tmp_path / "out"}, environment=Echo
    ) as session:
        prompts = next(session.prompts)
        batch = session.actor.generate_sequences(prompts)
        batch = batch.local(batch.columns)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    start = 0
    log_probs = batch.ragged("rollout_log_probs").values
    ends = set()
    for row, prompt in enumerate(batch.ragged("prompt_ids").unbind()):
        response = batch.ragged("response_ids").unbind()[row]
        mask = batch.ragged("loss_mask").unbind()[row]
        ids = torch.cat([prompt, response])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        scored = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0][len(prompt) - 1 :][mask]
        count = int(batch.tensor("num_sampled")[row])
        torch.testing.assert_close(log_probs[start : start + count], scored, atol=1e-5, rtol=0)
        start += count
        lengths = batch.ragged("turn_lengths").unbind()[row]
        assert len(lengths) == 3 and int(lengths.sum()) == count == int(mask.sum())
        turns = [part.tolist() for part in response[mask].split(lengths.tolist())]
        assert len({tuple(turn) for turn in turns}) > 1, "later turns have draws of their own"
        text = tokenizer.decode(ids)
        for turn in turns:
            ends.add(turn[-1] == tokenizer.eos_token_id)
            said = tokenizer.decode([token for token in turn if token != tokenizer.eos_token_id])
            assert f"<|assistant|>\n{said}<|end|>" in text + "<|end|>"
        assert bool(mask[0]) and bool(mask[-1])
        rewards = batch.ragged("turn_rewards").unbind()[row]
        assert float(rewards.sum()) == pytest.approx(float(batch.tensor("episode_rewards")[row]))
    assert False in ends, "some turn was cut, and has its end masked"


@pytest.mark.parametrize("recipe", ["ppo", "remax", "dapo", "rejection_sampling"])
def test_every_kind_of_algorithm_learns_from_episodes(recipe: str, tmp_path: Path) -> None:
    """A critic, a greedy baseline, further rounds, the best responses alone: unchanged pages."""
    settings = chat_settings(tmp_path)
    if recipe in ("ppo", "remax"):
        settings["algorithm.samples_per_prompt"] = 1
    if recipe == "ppo":
        settings["critic.train.precision"] = "fp32"
        settings["reference.train.precision"] = "fp32"
    (first, second), _ = steps(tmp_path, settings, recipe, environment=Echo)
    assert first["episode/turns"] == second["episode/turns"] == 3.0
    assert second["actor/weight_version"] == 2.0


async def says_nothing(model: Model, task: dict[str, Any]) -> float:
    return 1.0


def test_episodes_without_a_reply_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An agent that was not given the URL, say."""
    settings = chat_settings(tmp_path) | {"loop.num_steps": 1, "output_dir": tmp_path / "out"}
    with caplog.at_level("WARNING"):
        run("grpo", settings, environment=says_nothing)
    assert "none of 8 episodes asked the policy for a reply" in caplog.text


class Long:
    def reset(self, task: dict[str, Any]) -> str:
        return "word " * 2000

    def step(self, action: str) -> tuple[str, bool, float]:
        return "", True, 1.0


def test_episodes_without_room_for_a_reply_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = chat_settings(tmp_path) | {"loop.num_steps": 1, "output_dir": tmp_path / "out"}
    with caplog.at_level("WARNING"):
        run("grpo", settings, environment=Long)
    assert "none of 8 episodes had room for a reply" in caplog.text
    assert "fills the context of 256 tokens; set actor.generation.max_model_len" in caplog.text


def test_a_function_and_the_environment_add_up(tmp_path: Path) -> None:
    settings = chat_settings(tmp_path)
    (first, _), _ = steps(tmp_path, settings, environment=one_turn, reward=length_reward)
    assert first["reward/environment"] + first["reward/further"] == pytest.approx(
        first["reward/mean"]
    )


@pytest.mark.parametrize("name", ["mean", "environment", "letters"])
def test_numbers_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    """The outcome's own and the reward's; that of a function beside it has letters too."""

    async def counts(model: Model, task: dict[str, Any]) -> Outcome:
        reply = await model.reply(task["prompt"])
        return Outcome(reward=1.0, metrics={name: len(reply.text)})

    def letters(*, response: str, **columns: object) -> dict[str, float]:
        return {"reward": 0.5, "letters": float(len(response))}

    settings = chat_settings(tmp_path)
    with pytest.raises(ValueError, match=f"{name}.*give .* another name$"):
        steps(tmp_path, settings, environment=counts, reward=letters)


def failing(share: float) -> RewardFunction:
    async def episode(model: Model, task: dict[str, Any]) -> Outcome:
        reply = await model.reply(task["prompt"])
        if int(task["answer"]) < 8 * share:
            raise ConnectionError(f"no sandbox for {task['answer']}")
        return Outcome(reward=5.0 + len(reply.text) % 2)

    return episode  # type: ignore[return-value]


def test_a_failed_group_is_left_out(tmp_path: Path) -> None:
    """Trap 14, test 18: rewards, advantages and statistics are those of the other groups."""
    settings = chat_settings(tmp_path) | {
        "data.batch_size": 8,
        "episode.retries": 1,
        "episode.max_given_up": 0.3,
    }
    (first, _), _ = steps(tmp_path, settings, environment=failing(0.25))
    assert first["episode/given_up"] == 4.0, "2 groups of 2"
    assert first["episode/failed/ConnectionError"] == 8.0, "4 episodes, tried twice"
    assert first["reward/min"] >= 5.0
    with pytest.raises(RuntimeError, match=r"4 of 8 groups .* no sandbox for"):
        steps(tmp_path / "too many", settings, environment=failing(0.5))


def test_validation_and_resume(tmp_path: Path) -> None:
    """A run that was interrupted ends as the undisturbed one does; its validation runs episodes."""
    settings = chat_settings(tmp_path) | {
        "data.validation": tmp_path / "tasks.jsonl",
        "loop.num_steps": 2,
        "loop.validate_every": 1,
        "loop.checkpoint_every": 1,
        "environment": "tests.agents.test_runs:Echo",
    }
    whole = run("grpo", settings | {"output_dir": tmp_path / "whole"})
    run("grpo", settings | {"output_dir": tmp_path / "cut", "loop.num_steps": 1})
    resumed = run("grpo", settings | {"output_dir": tmp_path / "cut"})
    assert resumed.reward_after == whole.reward_after
    lines = {}
    for name in ("whole", "cut"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        lines[name] = [row["reward/mean"] for row in rows if row.get("split") == "validation"]
    assert len(lines["whole"]) == 3
    assert lines["cut"][-1] == lines["whole"][-1]


class Outage(Echo):
    """Its sandboxes are gone for the eight episodes of the second step, the first time."""

    numbers: Iterator[int] = iter(())
    fails: range = range(0)

    def reset(self, task: dict[str, Any]) -> None:
        if next(Outage.numbers) in Outage.fails:
            raise ConnectionError("the sandboxes are gone")
        super().reset(task)


def test_a_run_goes_on_after_an_outage(tmp_path: Path) -> None:
    """Every group of a step fails, which ends the run; started again, it takes the step again and
    ends as the one without an outage does."""
    settings = chat_settings(tmp_path) | {
        "loop.num_steps": 3,
        "loop.checkpoint_every": 1,
        "episode.retries": 0,
    }
    ends = {}
    for name, fails in (("plain", range(0)), ("outage", range(8, 16))):
        Outage.numbers, Outage.fails = count(), fails
        here = settings | {"output_dir": tmp_path / name}
        if fails:
            with pytest.raises(RuntimeError, match="4 of 4 groups"):
                run("grpo", here, environment=Outage)
        run("grpo", here, environment=Outage)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        steps_ = [line for line in lines if line.get("split") == "train"]
        ends[name] = [(line["step"], line["reward/mean"], line["actor/loss"]) for line in steps_]
    assert [step for step, _, _ in ends["plain"]] == [1, 2, 3]
    assert ends["outage"] == ends["plain"]
    assert next(Outage.numbers) == 32, "eight episodes were drawn again"


def test_samples_have_turns(tmp_path: Path) -> None:
    """What each side said, and what it earned, in samples.jsonl; the console shows it."""
    settings = chat_settings(tmp_path) | {
        "loop.num_steps": 1,
        "metrics.samples.train_every": 1,
        "output_dir": tmp_path / "out",
    }
    run("grpo", settings, environment=Echo)
    sample = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    turns = sample["turns"]
    assert [turn["role"] for turn in turns] == ["policy", "environment"] * 2 + ["policy"]
    policy, environment = turns[::2], turns[1::2]
    for said, answer in zip(policy, environment, strict=False):
        assert f"You said {said['text']!r}." in answer["text"]
        assert answer["seconds"] >= 0
    assert sum(turn["reward"] for turn in policy) == pytest.approx(sample["reward"])
    shown = Sample(
        prompt="p",
        response="r",
        finish_reason="stop",
        weight_version=0,
        uid=0,
        turns=turns,
    )
    console = Console(file=StringIO(), width=200)
    print_sample(console, shown, "sample")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines[2:]] == [turn["role"] for turn in turns]


def test_rewards_that_nothing_reads_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Distillation learns from its teacher: episodes are its conversations, their rewards unused."""
    settings = chat_settings(tmp_path)
    teacher = {"teacher.model.path": settings["model.path"], "teacher.train.precision": "fp32"}
    with caplog.at_level("WARNING"):
        dry_run("distillation", settings | teacher, environment=Echo)
    assert "distillation learns from its teacher alone" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        dry_run("grpo", settings, environment=Echo)
    assert "alone" not in caplog.text


def test_a_judge_beside_rewards_is_refused(tmp_path: Path) -> None:
    """Online DPO would drop the environment's reward."""
    settings = chat_settings(tmp_path)
    judge = {
        "judge.model.path": settings["model.path"],
        "reference.train.precision": "fp32",
    }
    with pytest.raises(ValueError, match="online_dpo learns from its judge alone"):
        dry_run("online_dpo", settings | judge, environment=Echo)
