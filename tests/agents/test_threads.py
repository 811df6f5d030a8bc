"""In which threads the methods of environments and tools run."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import sys
import threading
from typing import Any

import pytest

from tests.agents.chat import conversation, saying
from tests.agents.test_executor import run
from workers.agents.config import EpisodeConfig
from workers.agents.interfaces import as_episode
from workers.agents.threads import Caller
from workers.agents.tools import toolbox


class Table:
    """A database that sqlite3 gives to one thread alone, and the threads of its methods."""

    def __init__(self) -> None:
        self.threads = [threading.get_ident()]
        self.database = sqlite3.connect(":memory:")
        self.database.execute("create table numbers (value int)")

    def reset(self, task: dict[str, Any]) -> str:
        task["environments"].append(self)
        self.threads.append(threading.get_ident())
        self.database.execute("insert into numbers values (3)")
        return "Go"

    def close(self) -> None:
        self.threads.append(threading.get_ident())
        self.database.close()


class Asks(Table):
    def step(self, action: str) -> tuple[str, bool, int]:
        self.threads.append(threading.get_ident())
        (value,) = self.database.execute("select value from numbers").fetchone()
        return "Again", len(self.threads) == 4, value


class Queries(Table):
    def query(self, statement: str) -> list[Any]:
        """Runs a statement.

        Args:
            statement: In SQL.
        """
        self.threads.append(threading.get_ident())
        return self.database.execute(statement).fetchall()

    def reward(self, answer: str) -> float:
        return len(self.database.execute("select value from numbers").fetchall())


def played(kind: type, replies: list[str]) -> tuple[Any, Table]:
    task: dict[str, Any] = {"environments": []}
    model = conversation(saying(replies), reply_tokens=200)
    outcome = asyncio.run(as_episode(kind).episode(model, task))
    (environment,) = task["environments"]
    return outcome, environment


def test_the_methods_of_one_environment_run_in_one_thread() -> None:
    """Which ends with the episode."""
    outcome, asks = played(Asks, ["a", "b"])
    assert outcome.turn_rewards == [3.0, 3.0]
    call = '<tool_call>{"name": "query", "arguments": {"statement": "select 1"}}</tool_call>'
    outcome, queries = played(Queries, [call, "3"])
    assert outcome.reward == 1
    for environment in (asks, queries):
        assert len(environment.threads) >= 4
        (thread,) = set(environment.threads)
        assert thread != threading.get_ident()
        gc.collect()
        for each in threading.enumerate():
            if each.ident == thread:
                each.join(10)
                assert not each.is_alive()


def test_what_hangs_holds_no_later_method() -> None:
    """A method behind one that was given up has a thread of its own, until that one returns."""
    hangs, threads = threading.Event(), []

    async def main() -> None:
        call = Caller()
        threads.append(await call(threading.get_ident))
        with_timeout = asyncio.wait_for(call(hangs.wait), 0.05)
        assert isinstance(
            (await asyncio.gather(with_timeout, return_exceptions=True))[0], TimeoutError
        )
        threads.append(await asyncio.wait_for(call(threading.get_ident), 10))
        hangs.set()
        while threads[-1] != threads[0]:
            threads.append(await call(threading.get_ident))

    asyncio.run(asyncio.wait_for(main(), 10))
    assert threads[1] != threads[0]


def test_a_parameter_may_have_any_name() -> None:
    class Plots:
        def plot(self, function: str) -> str:
            """Plots a function.

            Args:
                function: In x.
            """
            return f"a plot of {function}"

    assert asyncio.run(toolbox(Plots()).call("plot", {"function": "x"})) == "a plot of x"


@pytest.mark.parametrize(("way", "status"), [("exits", 3), ("raises", 1), ("returns", 0)])
def test_a_forked_process_ends_where_its_code_does(way: str, status: int) -> None:
    """It has none of the episodes, and would wait for a loop that it does not have."""

    class Forks:
        def reset(self, task: dict[str, Any]) -> str:
            return "Go"

        def step(self, action: str) -> tuple[str, bool, float]:
            child = os.fork()
            if child:
                return "", True, float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            if way == "exits":
                sys.exit(3)
            if way == "raises":
                raise ConnectionError("gone")
            return "", True, 7.0

    finished, _ = run(as_episode(Forks).episode, 2, EpisodeConfig(step_timeout_s=20, retries=0))
    assert [episode.outcome and episode.outcome.reward for episode in finished] == [status] * 2


def test_a_forked_process_of_an_async_method_ends_where_it_exits() -> None:
    class Forks:
        def reset(self, task: dict[str, Any]) -> str:
            return "Go"

        async def step(self, action: str) -> tuple[str, bool, float]:
            child = os.fork()
            if not child:
                sys.exit(3)
            return "", True, float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    finished, _ = run(as_episode(Forks).episode, 2, EpisodeConfig(step_timeout_s=20, retries=0))
    assert [episode.outcome and episode.outcome.reward for episode in finished] == [3.0] * 2
