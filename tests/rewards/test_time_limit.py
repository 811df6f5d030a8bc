"""reward.timeout_s and cost.timeout_s in one process (runtime=local) end a function that takes too
long, wherever it waits, and leave every other one alone."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hybridflow import Batch, Ragged, RankContext
from hybridflow.errors import UserCodeError
from tests.tiny import make_model
from workers.config import ModelConfig
from workers.reward import FunctionCostWorker, FunctionRewardWorker
from workers.role_config import ScorerConfig
from workers.time_limit import OutOfTime, limited

TOO_LONG = (
    r"^reward\.function='.*' took over timeout_s=0\.3 for 2 rows, the first with prompt '5' and "
    r"response '67'; make it faster, give it a timeout of its own, or raise reward\.timeout_s$"
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(make_model(tmp_path_factory.mktemp("model"), layers=1)))


@pytest.fixture
def batch() -> Batch:
    return Batch.of(
        prompt_ids=Ragged.of([[5], [5]]),
        response_ids=Ragged.of([[6, 7], [8, 9]]),
        finish_reason=["stop", "stop"],
    )


def sleeps(**columns: object) -> float:
    time.sleep(60)
    return 1.0


def sleeps_and_catches(**columns: object) -> float:
    try:
        time.sleep(60)
    except Exception:
        return 0.0
    return 1.0


def computes(**columns: object) -> float:
    while True:
        pass


async def waits(**columns: object) -> float:
    await asyncio.sleep(60)
    return 1.0


async def waits_in_the_loop(**columns: object) -> float:
    time.sleep(60)
    return 1.0


def has_an_alarm_of_its_own(**columns: object) -> float:
    """As math-verify's timeouts do: they take the place of the run's own."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    time.sleep(0.2)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return 1.0


@pytest.mark.parametrize(
    "function",
    [
        sleeps,
        sleeps_and_catches,
        computes,
        waits,
        waits_in_the_loop,
        has_an_alarm_of_its_own,
    ],
)
def test_a_function_that_takes_too_long_ends_the_run(
    policy: ModelConfig, batch: Batch, function: Any
) -> None:
    before = signal.getsignal(signal.SIGALRM)
    worker = FunctionRewardWorker(
        ScorerConfig(function=function, policy=policy, timeout_s=0.3), RankContext()
    )
    started = time.monotonic()
    with pytest.raises(UserCodeError, match=TOO_LONG):
        worker.compute_reward(batch)
    assert time.monotonic() - started < 10
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_cost_alike(policy: ModelConfig, batch: Batch) -> None:
    config = ScorerConfig(function=sleeps, policy=policy, timeout_s=0.3)
    with pytest.raises(UserCodeError, match=r"^cost\.function=.*raise cost\.timeout_s$"):
        FunctionCostWorker(config, RankContext()).compute_cost(batch)


def test_the_limit_is_each_tasks(policy: ModelConfig, batch: Batch) -> None:
    """As on Ray: with num_tasks=2 both rows have it for themselves. A run of the function in time
    changes nothing."""

    def scores(*, response: str, **columns: object) -> float:
        time.sleep(0.4)
        return float(response)

    config = ScorerConfig(function=scores, policy=policy, timeout_s=0.7, num_tasks=2)
    worker = FunctionRewardWorker(config, RankContext())
    assert worker.compute_reward(batch).tensor("rewards").tolist() == [67.0, 89.0]
    config = ScorerConfig(function=scores, policy=policy, timeout_s=0.7)
    with pytest.raises(UserCodeError, match=r"timeout_s=0\.7 for 2 rows"):
        FunctionRewardWorker(config, RankContext()).compute_reward(batch)


def outcome_in_a_thread(call: Callable[[], object]) -> list[object]:
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(call())
        except OutOfTime as error:
            outcome.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    return outcome


def test_a_session_in_another_thread_is_limited_too() -> None:
    """No signal reaches it. The thread of a function that goes on ends with the process."""
    assert outcome_in_a_thread(lambda: limited(lambda: time.sleep(60), 0.2)) == [OutOfTime]
    assert outcome_in_a_thread(lambda: limited(lambda: 7, 5)) == [7]
    left = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert all(thread.daemon for thread in left)


def test_a_debugger_has_all_the_time_that_it_wants() -> None:
    def held() -> int:
        before = sys.gettrace()
        sys.settrace(lambda *_: None)
        time.sleep(0.5)
        sys.settrace(before)
        return 3

    assert limited(held, 0.2) == 3


def test_what_the_function_raises_is_raised() -> None:
    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        limited(fails, 5)


def test_coroutines_in_a_notebook(policy: ModelConfig, batch: Batch) -> None:
    """The loop runs already, so theirs has a thread of its own."""
    config = ScorerConfig(function=waits, policy=policy, timeout_s=0.3)

    async def cell() -> None:
        FunctionRewardWorker(config, RankContext()).compute_reward(batch)

    with pytest.raises(UserCodeError, match=TOO_LONG):
        asyncio.run(cell())
