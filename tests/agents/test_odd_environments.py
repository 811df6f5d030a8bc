"""Environments and agents as people write them: each works, or is refused in one line that names the
fix; none hangs, and none takes others with it."""

from __future__ import annotations

import asyncio
import functools
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.agents.chat import conversation, drawn, saying
from tests.agents.test_executor import ONCE_MORE, run
from workers.agents.config import EpisodeConfig
from workers.agents.environment import messages_of, play, step_of
from workers.agents.executor import Episodes, Executor
from workers.agents.heartbeat import Heartbeat
from workers.agents.interfaces import as_episode
from workers.agents.model import Drawn, Model, Request
from workers.agents.outcome import EnvironmentMistake, Outcome


class Steps:
    """Returns what it was made with from its only step."""

    def __init__(self, returned: Any, opening: Any = "Go") -> None:
        self.returned, self.opening = returned, opening

    def reset(self, task: dict[str, Any]) -> Any:
        return self.opening

    def step(self, action: str) -> Any:
        if isinstance(self.returned, BaseException):
            raise self.returned
        return self.returned


@pytest.mark.parametrize(
    "returned, reward",
    [
        (("", np.True_, np.float32(-2.5)), -2.5),
        (("", torch.tensor(True).numpy()[()], np.array([3])[0]), 3.0),
        ((None, True, torch.tensor(1.5)), 1.5),
        ((None, np.float64(2), np.True_, np.False_, {}), 2.0),
        ({"observation": None, "done": np.True_, "reward": -1}, -1.0),
        (["", True, True], 1.0),
        (("", torch.tensor(True), 1.0), 1.0),
        (("", torch.tensor([True]), torch.tensor([[2.0]])), 2.0),
        (("", np.array([True]), 1.0), 1.0),
        ({"observation": "", "done": 1, "reward": 0.5}, 0.5),
        (("", 0.5, torch.tensor(False), np.array(True), {}), 0.5),
    ],
)
def test_numbers_of_numpy_and_torch(returned: Any, reward: float) -> None:
    outcome = asyncio.run(play(Steps(returned), conversation(saying(["a"])), {}))
    assert outcome.turn_rewards == [reward]


@pytest.mark.parametrize(
    "returned, fix",
    [
        (
            ("", True, None),
            "a reward of None; return one finite number, 0 where nothing was earned",
        ),
        (("", True, "good"), "a reward of 'good'; return one finite"),
        (("", True, float("nan")), "step returned a reward of nan; return one finite"),
        (("", True, torch.tensor(float("inf"))), r"a reward of tensor\(inf\); return one finite"),
        (None, "step returned None; return"),
        (("", True, 10**400), "a reward of 10000+; return one finite number"),
        (("", True, 10**5000), "a reward of an integer of thousands of digits; return one finite"),
        (("", True, torch.tensor([1.0, 2.0])), r"a reward of tensor\(\[1., 2.\]\); return one"),
        (("", True, np.array([1.0, 2.0])), r"a reward of array\(\[1., 2.\]\); return one finite"),
        ({"observation": "", "done": "false", "reward": 0}, "done='false'; return True or False"),
        ({"observation": "", "done": None, "reward": 0}, "done=None; return True or False"),
        (("", 0.0, "no", False, {}), "terminated='no'; return True or False"),
        (("", torch.tensor([True, False]), 1.0), "return .observation, done, reward"),
        (("", 1.0, True), "return .observation, done, reward"),
        (("", "yes", 1.0), "return .observation, done, reward"),
        ((3, False, 0.0), "observation is 3; return text, a message"),
        (({"role": "user"}, False, 0.0), "with text as content"),
        ((np.zeros(3), False, 0.0), "observation is .* return text, a message"),
    ],
)
def test_what_step_must_not_return(returned: Any, fix: str) -> None:
    with pytest.raises(EnvironmentMistake, match=fix):
        asyncio.run(play(Steps(returned), conversation(saying("ab")), {}))


def test_observations() -> None:
    message = {"role": "user", "content": "a"}
    assert messages_of((message, message), {}) == [message, message]
    assert step_of(("a", np.False_, 0)) == ("a", False, 0)
    with pytest.raises(EnvironmentMistake, match="text"):
        messages_of(None, {})


def test_huge_and_odd_texts() -> None:
    """Text is text: other scripts, control characters, line ends; what does not fit ends with the
    limit and the rewards so far."""
    odd = "日本語 👩‍👩‍👧 \x00 \r\n ﷽"
    model = conversation(saying(["naïve 👍"] * 16), context_tokens=4000)
    outcome = asyncio.run(play(Steps((odd, False, 1.0), opening=odd), model, {}))
    assert odd in model.renderer.tokenizer.decode(model.ids)
    assert outcome.reward > 1
    huge = conversation(saying("ab"), context_tokens=100)
    outcome = asyncio.run(play(Steps(("x" * 2_000_000, False, 0.5)), huge, {}))
    assert (outcome.turn_rewards, huge.finish_reason) == ([0.5], "context")


def test_halves_of_surrogate_pairs(caplog: pytest.LogCaptureFixture) -> None:
    """Two halves are their character, as JSON writes it; one alone is what decoders put there, and
    the log says so once."""
    model = conversation(saying("ab"), context_tokens=4000)
    with caplog.at_level("WARNING"):
        asyncio.run(model.reply([{"role": "user", "content": "a\ud83d\ude00b\ud800c"}]))
        asyncio.run(model.reply([{"role": "user", "content": "\udfff"}]))
    text = model.renderer.tokenizer.decode(model.ids)
    assert "a😀b\ufffdc" in text and text.count("\ufffd") == 2
    assert caplog.text.count("half of a surrogate pair") == 1
    plain = conversation(saying("ab"), context_tokens=4000)
    asyncio.run(plain.reply("x\ud800"))
    asyncio.run(plain.reply("y\ud800"))
    assert plain.renderer.tokenizer.decode(plain.ids).count("\ufffd") == 2


def test_every_attempt_has_the_task_of_the_data() -> None:
    """An attempt that changes its task, also deep within, changes nobody else's."""
    seen = []

    async def episode(model: Model, task: dict[str, Any]) -> float:
        seen.append((task["row"], list(task["shared"])))
        task["shared"].append(task.pop("row"))
        if len(seen) <= 3:
            raise ConnectionError("again")
        return 1.0

    shared = ["a"]
    tasks = [{"row": row, "shared": shared} for row in range(3)]
    config = EpisodeConfig(retries=1)
    executor = Executor(
        lambda: Episodes(episode, "test", config, lambda row, draw: conversation(draw, row=row)),
        lambda asked: [],
        lockstep=True,
    )
    finished = executor.run(tasks)
    assert [episode.outcome is not None for episode in finished] == [True] * 3
    assert sorted(seen) == sorted([(row, ["a"]) for row in range(3)] * 2)
    assert shared == ["a"] and tasks[0]["row"] == 0


def test_a_mistake_names_its_environment() -> None:
    async def image(model: Model, task: dict[str, Any]) -> float:
        await model.reply([{"role": "user", "content": [{"type": "image"}]}])
        return 0.0

    with pytest.raises(EnvironmentMistake, match=r"^environment=test: a message .* type 'image'"):
        run(image, 2)


@pytest.mark.parametrize(
    "returned, what",
    [
        (10**400, "a reward of 10000"),
        pytest.param(10**5000, "a reward of an integer of thousands of digits", id="huge"),
        (torch.tensor([1.0, 2.0]), "a reward of tensor"),
        (np.array([1.0, 2.0]), "a reward of array"),
        (Outcome(reward=1.0, turn_rewards=[10**400]), "a turn's reward of 10000"),
        (Outcome(reward=1.0, metrics={"a": float("inf")}), "metrics.'a'. of inf"),
        (float("nan"), "a reward of nan"),
    ],
)
def test_what_an_episode_must_not_return(returned: Any, what: str) -> None:
    async def episode(model: Model, task: dict[str, Any]) -> Any:
        await model.reply([{"role": "user", "content": "a"}])
        return returned

    with pytest.raises(EnvironmentMistake, match=f"environment=test: .* {what}.*; return a finite"):
        run(episode, 1)


class Exits(BaseException):
    """An error that is no Exception, as of a library that unwinds with one."""


@pytest.mark.parametrize(
    "error", [SystemExit(2), KeyboardInterrupt(), Exits("bye"), StopIteration(), GeneratorExit()]
)
@pytest.mark.parametrize("kind", ["step", "function"])
def test_no_error_takes_the_others_with_it(error: BaseException, kind: str) -> None:
    """sys.exit in an environment fails its own episode, and the loop of all goes on."""

    async def episode(model: Model, task: dict[str, Any]) -> Any:
        if task["row"] != 1:
            await asyncio.sleep(0.05)
            return await play(Steps(("", True, 1.0)), model, task)
        if kind == "function":
            raise error
        return await play(Steps(error), model, task)

    finished, _ = run(episode, 3)
    assert finished[1].outcome is None and len(finished[1].failures) == 2
    assert finished[0].outcome == finished[2].outcome == Outcome(reward=1.0, turn_rewards=[1.0])


def test_many_failures_are_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """The first ones of a place are named, in a line each, whatever the error's text is."""

    async def episode(model: Model, task: dict[str, Any]) -> float:
        raise ConnectionError("refused\n  by " + "a" * 2000)

    finished, _ = run(episode, 20, ONCE_MORE)
    assert all(len(episode.failures) == 2 for episode in finished)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 and "further failures there are not named" in lines[3]
    assert all("\n" not in line and len(line) < 700 for line in lines)
    assert "ConnectionError: refused by aaa" in lines[0] and __file__ in lines[0]


def test_an_episode_that_cancels_itself_has_failed() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        if task["row"] == 0:
            part = asyncio.create_task(asyncio.sleep(60))
            part.cancel()
            await part
        await model.reply("a")
        return 1.0

    finished, _ = run(episode, 2)
    assert [failure.kind for failure in finished[0].failures] == ["cancelled"] * 2
    assert finished[1].outcome is not None


def test_replies_that_are_asked_for_side_by_side() -> None:
    """They are drawn one after the other, with noise of their own, in one conversation and in
    several."""
    asked: list[Request] = []

    def answer(requests: Any) -> list[Drawn]:
        asked.extend(requests)
        return [drawn(f"{len(request.ids)}") for request in requests]

    async def episode(model: Model, task: dict[str, Any]) -> float:
        same = [model.reply([{"role": "user", "content": f"{number}"}]) for number in range(2)]
        others = [model.fork().reply("x") for _ in range(3)]
        return float(len(await asyncio.gather(*same, *others)))

    config = EpisodeConfig(step_timeout_s=20)
    finished = Executor(
        lambda: Episodes(episode, "test", config, lambda row, draw: conversation(draw, row=row)),
        answer,
        lockstep=True,
    ).run([{}, {}])
    assert [episode.outcome.reward for episode in finished if episode.outcome] == [5.0, 5.0]
    for row in range(2):
        drawn_before = [request.num_drawn for request in asked if request.row == row]
        assert len(set(drawn_before)) == 5, "no two share their noise"


def test_a_loop_of_its_own_is_named() -> None:
    """A thread that runs model.reply in a loop of its own would wait for ever, or in vain."""

    async def episode(model: Model, task: dict[str, Any]) -> float:
        await asyncio.to_thread(lambda: asyncio.run(model.reply("a")))
        return 1.0

    with pytest.raises(EnvironmentMistake, match=r"a loop of its own .*the URL of an Endpoint"):
        run(episode, 2)


def test_a_loop_that_stands_still_is_named() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    heartbeat = Heartbeat(loop, thread, "my_module:Slow", limit_s=0.3)
    for _ in range(4):
        heartbeat.check()
        time.sleep(0.1)
    loop.call_soon_threadsafe(time.sleep, 2.0)
    with pytest.raises(
        EnvironmentMistake, match=r"my_module:Slow.* stood still .*asyncio.*await there"
    ):
        for _ in range(15):
            heartbeat.check()
            time.sleep(0.1)
    assert heartbeat.is_late


def test_many_that_block_for_a_while_are_a_standstill() -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    heartbeat = Heartbeat(loop, thread, "my_module:Slow", limit_s=0.4)
    for _ in range(20):
        loop.call_soon_threadsafe(time.sleep, 0.1)
    with pytest.raises(EnvironmentMistake, match="stood still"):
        for _ in range(20):
            heartbeat.check()
            time.sleep(0.05)


STOPPED = """
import asyncio, sys, threading, time
from workers.agents.heartbeat import Heartbeat

def work():
    print("works", flush=True)
    while time.thread_time() < 0.5:
        pass

loop = asyncio.new_event_loop()
thread = threading.Thread(target=loop.run_forever, daemon=True)
thread.start()
loop.call_soon_threadsafe(work)
heartbeat = Heartbeat(loop, thread, "my_module:Slow", limit_s=1.0)
until = time.monotonic() + 2.2
while time.monotonic() < until:
    heartbeat.check()
    time.sleep(0.05)
"""


def test_a_machine_without_time_is_no_standstill() -> None:
    """A process that is stopped for longer than the limit, while its loop is at work."""
    child = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "works\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    child.send_signal(signal.SIGCONT)
    assert child.wait(timeout=60) == 0


@pytest.mark.slow
def test_an_episode_that_blocks_all_ends_the_run() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        await model.reply("a")
        time.sleep(40)
        return 1.0

    began = time.perf_counter()
    with pytest.raises(EnvironmentMistake, match=rf"stood still for 1\d s at {__file__}, line"):
        run(episode, 2, EpisodeConfig(step_timeout_s=1.0))
    assert time.perf_counter() - began < 30


def plain(model: Model, task: dict[str, Any]) -> float:
    return 1.0


async def yields(model: Model, task: dict[str, Any]) -> Any:
    yield 1.0


class OnlyReset:
    def reset(self, task: dict[str, Any]) -> str:
        return "Go"


async def takes_one(model: Model) -> float:
    return 1.0


class Gymnasium:
    """Its reset has no parameter for the task."""

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        return "Go", {}

    def step(self, action: str) -> Any:
        return "", 1.0, True, False, {}


@pytest.mark.parametrize(
    "environment, fix",
    [
        (takes_one, r"the function takes \(model.*called with \(model, task\)"),
        (functools.partial(takes_one), r"called with \(model, task\)"),
        (Gymnasium, r"its method reset takes .*called with \(task\)"),
        (Steps, r"the class takes \(returned.*called with \(\)"),
        (Steps(1), "is a Steps; name an async function"),
        (len, "name an async function"),
        (plain, "plain' is a function without async; name an async function"),
        (yields, "an async generator .return the reward, yield nothing.; name"),
        (OnlyReset, "is a class with reset alone; name .* a class with reset and step"),
    ],
)
def test_what_can_not_be_called_is_known_before_the_run(environment: Any, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        as_episode(environment)


@pytest.mark.parametrize(
    "returned, fix",
    [
        (Outcome(reward=1.0, metrics=None), "metrics of None; give a dict"),  # type: ignore[arg-type]
        (Outcome(reward=1.0, metrics={"a": "b"}), "metrics\\['a'\\] of 'b'"),
        (Outcome(reward=None), "reward of None"),  # type: ignore[arg-type]
        (Outcome(reward=1.0, turn_rewards=[1.0, 2.0]), "has 2 turn_rewards"),
        (Outcome(reward=1.0, turn_rewards=0.5), "turn_rewards of 0.5; give a list"),  # type: ignore[arg-type]
        ((1.0, {}), "a reward of"),
        (1e300, "a reward of 1e.300; return a finite number"),
        (10**400, "a reward of 1000"),
        (np.float32("nan"), "a reward of .*nan"),
    ],
)
def test_outcomes_that_are_none(returned: Any, fix: str) -> None:
    async def episode(model: Model, task: dict[str, Any]) -> Any:
        await model.reply("a")
        return returned

    with pytest.raises(EnvironmentMistake, match=fix):
        run(episode, 2, ONCE_MORE)


def test_an_episode_without_end_meets_the_limit_of_turns() -> None:
    async def episode(model: Model, task: dict[str, Any]) -> float:
        while True:
            await model.reply("a")

    finished, rounds = run(episode, 2, EpisodeConfig(max_turns=5))
    assert len(rounds) == 5
    assert [episode.segments.finish_reason for episode in finished] == ["turns", "turns"]


class Hard(Steps):
    """Needs an argument, and keeps it."""

    def __init__(self, *, most: int) -> None:
        super().__init__(("", True, float(most)))


class Adder:
    """A tool with an argument."""

    def __init__(self, plus: int) -> None:
        self.plus = plus

    def add(self, a: int) -> int:
        """Adds.

        Args:
            a: The number.
        """
        return a + self.plus

    def reward(self, answer: str) -> float:
        return float(self.plus)


hard = functools.partial(Hard, most=99)


def test_arguments_of_a_class() -> None:
    """A partial of it, by name or as it is; without them the line names it."""
    for environment in (hard, "tests.agents.test_odd_environments:hard"):
        interface = as_episode(environment)
        finished, _ = run(interface.episode, 1)
        assert finished[0].outcome is not None and finished[0].outcome.reward == 99.0
    assert as_episode(hard).name == "tests.agents.test_odd_environments:Hard"
    tools = as_episode(functools.partial(Adder, 3))
    assert (
        tools.roles == ("tool",) and tools.rewards and tools.tools[0]["function"]["name"] == "add"
    )
    with pytest.raises(ValueError, match=r"takes .*most.*, and is called with .. .*a partial"):
        as_episode(Hard)
    with pytest.raises(ValueError, match=r"functools\.partial of it"):
        as_episode(Hard(most=1))
    for wrong in (functools.partial(Hard, mots=1), functools.partial(Hard, 1, 2, 3)):
        with pytest.raises(ValueError, match=r"gives other arguments .*; correct the partial"):
            as_episode(wrong)


def test_a_module_that_exits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without a guard would end the run without a word."""
    (tmp_path / "script_that_exits.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = r"^environment='script_that_exits:A': module .* can't be imported \(SystemExit: 3\)"
    with pytest.raises(ValueError, match=told):
        as_episode("script_that_exits:A")
