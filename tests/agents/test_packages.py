"""Adapters to other people's packages, against the package where it is installed and against a
small local implementation of the same interface everywhere."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.agents.chat import conversation, saying
from workers.agents.environment import play
from workers.agents.model import Model
from workers.agents.outcome import EnvironmentMistake, Outcome
from workers.agents.packages.mcp import McpTools
from workers.agents.packages.reasoning_gym import ReasoningGym, answer_of, puzzles
from workers.agents.packages.textarena import TextArena
from workers.agents.packages.verifiers import verifiers_episode


def model_saying(texts: Sequence[str]) -> Model:
    return conversation(saying(texts), reply_tokens=300, context_tokens=20_000)


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


# textarena: games whose chance is the module random.


class Wrapper:
    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: str) -> Any:
        return self.env.step(action)


class ObservationWrapper(Wrapper):
    """Repeats all that was said, as textarena's LLMObservationWrapper does."""

    def get_observation(self) -> Any:
        raise AssertionError("the conversation has the history already")


class Brackets(Wrapper):
    """A wrapper of actions, which stays."""

    def step(self, action: str) -> Any:
        return self.env.step(f"[{action}]")


class Race:
    """The players say numbers in turn; who first says the one that was drawn wins. Draws at every
    step, as dice do."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        random.seed(seed)
        self.state = SimpleNamespace(
            role_mapping={player: f"Player {player}" for player in range(num_players)}
        )
        self.number, self.turn, self.players = random.randint(1, 9), 0, num_players
        self.new: dict[int, list[Any]] = {
            player: [(-1, "Go", None)] for player in range(num_players)
        }
        self.rewards: dict[int, int] | None = None

    def get_observation(self) -> tuple[int, list[Any]]:
        said, self.new[self.turn] = self.new[self.turn], []
        return self.turn, said

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        for said in self.new.values():
            said.append((self.turn, action, None))
            said.append((-1, f"dice {random.randint(1, 99)}", None))
        if action == f"[{self.number}]":
            self.rewards = dict.fromkeys(range(self.players), -1) | {self.turn: 1}
            return True, {}
        self.turn = (self.turn + 1) % self.players
        return False, {}

    def close(self) -> tuple[dict[int, int] | None, dict[str, Any]]:
        return self.rewards, {}


FAKE_TEXTARENA = module(
    "textarena",
    make=lambda env_id: Brackets(ObservationWrapper(Race())),
    Wrapper=Wrapper,
    ObservationWrapper=ObservationWrapper,
)


class Follows(TextArena):
    """An opponent who says 0, and remembers what it saw."""

    def opponent(self, player: int, observation: str) -> str:
        self.seen = observation
        return "0"


def test_textarena_by_a_local_game(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two players, the policy second; a game's chance does not depend on others beside it."""
    monkeypatch.setitem(sys.modules, "textarena", FAKE_TEXTARENA)
    task = {"env_id": "Race-v0", "seed": 3, "num_players": 2, "player": 1}
    number = random.Random(3).randint(1, 9)
    alone = Follows()
    first = alone.reset(task)
    assert first.startswith("Go\n[Player 0] [0]\ndice ")
    wrong = alone.step("77")
    assert wrong[1:] == (False, 0.0)
    assert "[Player 1] [77]" in wrong[0] and "[Player 0] [0]" in wrong[0]
    assert alone.seen.startswith("[Player 0] [0]"), "the opponent sees what is new to it"
    assert alone.step(str(number)) == ("", True, 1.0)
    state = random.getstate()
    games = [Follows(), Follows()]
    assert [game.reset(task) for game in games] == [first, first]
    assert [game.step("77") for game in games] == [wrong, wrong]
    assert random.getstate() == state
    with pytest.raises(EnvironmentMistake, match=r"opponent\(player, observation\)"):
        TextArena().reset(task)
    with pytest.raises(EnvironmentMistake, match="env_id"):
        TextArena().reset({"seed": 3})


def test_textarena_with_one_player() -> None:
    """GuessTheNumber by bisection."""
    pytest.importorskip("textarena")

    class Bisects:
        low, high = 1, 20

        def says(self, observation: str) -> str:
            if "is higher" in observation:
                self.low = self.guess + 1
            elif "is lower" in observation:
                self.high = self.guess - 1
            self.guess = (self.low + self.high) // 2
            return f"I say [{self.guess}]"

    for seed in range(3):
        game, player = TextArena(), Bisects()
        observation = game.reset({"env_id": "GuessTheNumber-v0", "seed": seed})
        assert "Guess The Number" in observation
        for _ in range(6):
            observation, done, reward = game.step(player.says(observation))
            assert "Guess The Number" not in observation, "only what is new"
            if done:
                break
        assert (done, reward) == (True, 1.0)


def test_textarena_with_two_players() -> None:
    """Nim with piles of 3, 4 and 5 against an opponent that takes one of the largest: the policy, which
    is second, evens out what is left and takes the last."""
    pytest.importorskip("textarena")

    class TakesOne(TextArena):
        def opponent(self, player: int, observation: str) -> str:
            lines = [line for line in observation.splitlines() if line.startswith("  pile ")]
            piles = [int(line.rpartition(": ")[2]) for line in lines[-3:]]
            return f"[{piles.index(max(piles))} 1]"

    task = {"env_id": "Nim-v0", "seed": 0, "num_players": 2, "player": 1}
    model = model_saying(["[0 3]", *["[2 1]"] * 4])
    outcome = asyncio.run(play(TakesOne(), model, task))
    assert outcome.reward == 1.0
    assert len(model.transcript.turns) == 5


# reasoning-gym


class Sums:
    def __init__(self, name: str, seed: int, size: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{self.seed} + {index}?", "answer": str(self.seed + index)}

    def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.01


@pytest.fixture
def fresh_puzzles() -> Any:
    puzzles.cache_clear()
    yield
    puzzles.cache_clear()


def test_reasoning_gym_by_a_local_dataset(
    monkeypatch: pytest.MonkeyPatch, fresh_puzzles: None
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", module("reasoning_gym", create_dataset=Sums))
    task = {"dataset": "sums", "seed": 30, "index": 12}
    outcome = asyncio.run(play(ReasoningGym(), model_saying(["<answer>42</answer>"]), task))
    assert outcome == Outcome(reward=1.0, turn_rewards=[1.0])
    assert asyncio.run(play(ReasoningGym(), model_saying(["43"]), task)).reward == 0.01
    with pytest.raises(EnvironmentMistake, match="'index'"):
        ReasoningGym().reset({"dataset": "sums"})


@pytest.mark.parametrize(
    "text, answer",
    [("42", "42"), ("<answer>1</answer> <answer> 2 </answer>", "2"), ("so <answer>3", "3")],
)
def test_the_last_answer_counts(text: str, answer: str) -> None:
    assert answer_of(text) == answer


def test_reasoning_gym(fresh_puzzles: None) -> None:
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", seed=5, size=10)[3]
    for said, reward in ((entry["answer"], 1.0), ("no", 0.0)):
        puzzle = ReasoningGym()
        task = {"dataset": "chain_sum", "seed": 5, "index": 3}
        assert puzzle.reset(task) == entry["question"]
        assert puzzle.step(f"<answer>{said}</answer>")[2] == pytest.approx(reward, abs=0.1)


# The Model Context Protocol

SERVER = '''
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("counter")
total = 0


@server.tool()
def count(number: int) -> int:
    """Adds to the total."""
    global total
    if number < 0:
        raise ToolError("no negative numbers")
    total += number
    return total


server.run()
'''


def test_a_server_of_mcp_as_tools(tmp_path: Path) -> None:
    """The policy's calls reach a real server over its standard input, with a server of its own for
    every episode; mistakes are answered, and the template is given the schema."""
    pytest.importorskip("mcp.server.mcpserver")
    script = tmp_path / "server.py"
    script.write_text(SERVER)

    def calling(name: str, argument: str) -> str:
        return f'<tool_call>{{"name": "{name}", "arguments": {{"number": {argument}}}}}</tool_call>'

    texts = [calling("count", "2"), calling("count", "3") + calling("count", "-1")]
    texts += [calling("sum", "1") + calling("count", '"many"'), "5"]

    async def episode() -> tuple[str, Model]:
        model = model_saying(texts)
        async with McpTools(sys.executable, str(script)) as tools:
            return await tools.answer(model, "Count."), model

    for _ in range(2):
        answer, model = asyncio.run(episode())
        assert answer == "5"
        said = [message["content"] for message in model.messages if message["role"] == "tool"]
        assert said[:2] == ["2", "5"]
        assert "no negative numbers" in said[2]
        assert "there is no tool 'sum'" in said[3]
        assert said[4].startswith("Error: ") and "number" in said[4]
        shown = model.renderer.tokenizer.decode(model.ids)
        assert '"name": "count"' in shown and "Adds to the total." in shown


# verifiers


class Guesses:
    """The interface of a verifiers 0.1 environment: two replies, of which the last counts."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    async def run_rollout(
        self, row: dict[str, Any], client: Any, model: str, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        messages = [*row["prompt"]]
        for _ in range(2):
            completion = await client.client.chat.completions.create(
                model=model, messages=messages, **sampling
            )
            said = completion.choices[0].message.content
            messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": "Sure?"},
            ]
        reward = float(said == row["answer"])
        return {"reward": reward, "metrics": {"num_turns": 2.0}, "error": self.error}


def test_verifiers_by_a_local_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reply is one of the policy's, and what verifiers calls an error is a failure."""
    pytest.importorskip("openai")
    clients = module(
        "verifiers.clients",
        OpenAIChatCompletionsClient=lambda client: SimpleNamespace(client=client),
    )
    monkeypatch.setitem(sys.modules, "verifiers", module("verifiers", clients=clients))
    monkeypatch.setitem(sys.modules, "verifiers.clients", clients)
    task = {"prompt": [{"role": "user", "content": "4?"}], "answer": "4"}
    model = model_saying(["3", "4"])
    outcome = asyncio.run(verifiers_episode(Guesses)(model, task))
    assert outcome == Outcome(reward=1.0, metrics={"num_turns": 2.0})
    assert len(model.transcript.turns) == 2
    with pytest.raises(RuntimeError, match="sandbox"):
        asyncio.run(verifiers_episode(lambda: Guesses("sandbox"))(model_saying(["3", "4"]), task))


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


@pytest.mark.skipif(find_spec("verifiers") is None, reason="verifiers is not installed")
def test_verifiers() -> None:
    """A single-turn environment and one with a tool, with verifiers' own classes."""
    verifiers = pytest.importorskip("verifiers")
    if "SingleTurnEnv" not in dir(verifiers):
        pytest.skip("verifiers 0.4 has no environments of 0.1")
    from datasets import Dataset

    def right(completion: Any, answer: str) -> float:
        return float(completion[-1]["content"] == answer)

    row = {"prompt": [{"role": "user", "content": "2 + 3?"}], "answer": "5"}
    settings = {"dataset": Dataset.from_list([row]), "rubric": verifiers.Rubric(funcs=[right])}
    single = verifiers_episode(lambda: verifiers.SingleTurnEnv(**settings))
    assert asyncio.run(single(model_saying(["5"]), row)).reward == 1.0
    assert asyncio.run(single(model_saying(["6"]), row)).reward == 0.0
    tools = verifiers_episode(lambda: verifiers.ToolEnv(tools=[add], **settings))
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    model = model_saying([call, "5"])
    outcome = asyncio.run(tools(model, row))
    assert outcome.reward == 1.0 and outcome.metrics["total_tool_calls"] == 1.0
    assert len(model.transcript.turns) == 2
    assert "<tool_response>\n5\n" in model.renderer.tokenizer.decode(model.ids)


# OpenEnv


class Remote:
    """An environment of docs/agents.md: OpenEnv's client and nothing else."""

    url = ""

    async def reset(self, task: dict[str, Any]) -> str:
        core = pytest.importorskip("openenv.core")
        self.client = core.GenericEnvClient(base_url=self.url)
        result = await self.client.reset(seed=task["seed"])
        return str(result.observation["text"])

    async def step(self, action: str) -> tuple[str, bool, float]:
        result = await self.client.step({"message": action})
        return str(result.observation["text"]), result.done, result.reward or 0.0

    async def close(self) -> None:
        await self.client.close()


def test_openenv() -> None:
    """A server of OpenEnv's own, in this process, whose number the policy finds."""
    core = pytest.importorskip("openenv.core", exc_type=ImportError)
    pytest.importorskip("openenv.core.generic_client", exc_type=ImportError)
    uvicorn = pytest.importorskip("uvicorn")

    class Says(core.Action):
        message: str

    class Text(core.Observation):
        text: str

    class Number(core.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, **kwargs: Any) -> Any:
            self.number = str(seed)
            return Text(text="Guess.")

        def step(self, action: Any, **kwargs: Any) -> Any:
            right = action.message == self.number
            return Text(text="Right." if right else "No.", done=right, reward=float(right))

        @property
        def state(self) -> Any:
            return core.State()

    application = core.create_fastapi_app(Number, Says, Text)
    config = uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    environment = Remote()
    environment.url = f"http://127.0.0.1:{port}"
    model = model_saying(["4", "7"])
    outcome = asyncio.run(play(environment, model, {"seed": 7}))
    server.should_exit = True
    thread.join(10)
    assert outcome.turn_rewards == [0.0, 1.0]
    assert "No." in model.renderer.tokenizer.decode(model.ids)
