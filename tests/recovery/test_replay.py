"""python -m recipes.replay: a step of a run, trained again, against undisturbed and changed runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from controllers.ledger import LEDGER, line_difference, read_ledger
from hybridflow import open_session, run
from hybridflow.errors import UserCodeError
from hybridflow.snapshots.memory import MemoryPlace
from recipes.replay import main, replay
from tests.tiny import tiny_grpo

Make = Callable[..., dict[str, object]]


def by_answer(*, response: str, answer: str, **columns: object) -> float:
    return len(response) % 5 + 0.1 * int(answer)


def otherwise(*, response: str, answer: str, **columns: object) -> float:
    return len(response) % 5 - 0.1 * int(answer)


def ends_in_the_third_step(*, response: str, answer: str, **columns: object) -> float:
    """Eight prompts in order, two a step."""
    if answer == "4":
        raise RuntimeError("no reward")
    return float(len(response) % 5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Make:
    inputs = tiny_grpo(tmp_path_factory.mktemp("inputs"))

    def make(output: Path, **more: object) -> dict[str, object]:
        return inputs | {
            "output_dir": output,
            "data.batch_size": 2,
            "data.shuffle": False,
            "algorithm.samples_per_prompt": 2,
            "critic.train.precision": "fp32",
            "reward.function": "tests.recovery.test_replay:by_answer",
            "loop.num_steps": 4,
            "loop.checkpoint_every": 2,
            **more,
        }

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, settings: Make) -> Path:
    """A finished PPO run with checkpoints after steps 2 and 4."""
    output = tmp_path_factory.mktemp("runs") / "ppo"
    run("ppo", settings(output))
    return output


def test_a_step_is_as_recorded(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint and, before the first one, from the weights that the run began with; the
    run's directory stays as it is."""
    before = sorted(path.relative_to(trained) for path in trained.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main([str(trained), "--step", "4", "actor.train.micro_batch_tokens=512"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("step 4 is as recorded, bit for bit") and "step-00000002" in said
    first = replay(trained, 1)
    assert first.is_equal and first.source == "the weights that the run began with"
    assert before == sorted(path.relative_to(trained) for path in trained.rglob("*"))


def test_a_changed_role_is_named(trained: Path, settings: Make, tmp_path: Path) -> None:
    """A critic with another learning rate: the actor's tensors are equal, and the critic's first
    that differs is the one of a session by hand."""
    change = {"critic.train.optimizer.learning_rate": 0.5}
    result = replay(trained, 3, ["critic.train.optimizer.learning_rate=0.5"])
    resume = trained / "checkpoints" / "step-00000002"
    by_hand = settings(tmp_path / "by-hand", **change) | {"loop.resume": resume}
    with open_session("ppo", by_hand) as session:
        session.step()
        session.loop.snapshot()
        names = session.loop.ledger.names
    recorded = {line["step"]: line for line in read_ledger(trained / LEDGER)}[3]
    expected = line_difference(recorded, read_ledger(tmp_path / "by-hand" / LEDGER)[-1], names)
    assert expected.startswith("critic: ") and (result.step, result.difference) == (3, expected)
    assert result.tensors["actor"][0] == 0 < result.tensors["critic"][0]


def test_a_changed_reward_shows_in_the_step_that_it_came_in(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 is asked for, and step 3, trained again on the way to it, differs first."""
    change = "reward.function=tests.recovery.test_replay:otherwise"
    with pytest.raises(SystemExit) as ended:
        main([str(trained), change, "--step", "4"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert said.startswith("step 3 differs in actor: ") and "reward/mean: " in said


def test_a_run_that_failed_is_replayed_from_memory(tmp_path: Path, settings: Make) -> None:
    output = tmp_path / "failed"
    reward = "tests.recovery.test_replay:ends_in_the_third_step"
    failing = settings(output, **{"loop.checkpoint_every": 0, "reward.function": reward})
    with pytest.raises(UserCodeError):
        run("rloo", failing)
    commits = MemoryPlace.commits_of(output)
    assert [commit.step for commit in commits] == [2, 1]
    result = replay(output, 2)
    assert result.is_equal and result.source.startswith("step 1 (/dev/shm/")
    assert MemoryPlace.commits_of(output) == commits


def test_what_can_not_be_replayed(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--step is 9; .* digests of 4 steps from 1 to 4"):
        replay(trained, 9)
    with pytest.raises(ValueError, match="is no run's output_dir"):
        replay(tmp_path, 1)
    with pytest.raises(ValueError, match=r"no setting .actor.train.no_such"):
        replay(trained, 1, ["actor.train.no_such=1"])
