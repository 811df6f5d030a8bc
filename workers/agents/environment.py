"""Environment: reset and step, as an episode.

    class Guess:
        def reset(self, task):
            self.number = task["answer"]
            return "Guess a number from 1 to 9."

        def step(self, action):
            if action.strip() == self.number:
                return "Right.", True, 1.0
            return "No.", False, 0.0

    python -m recipes.grpo environment=my_module:Guess ...

A fresh object is made for every episode, and closed whatever happens where it has a method close.
Methods may be async; the others of one environment run in one thread.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from workers.agents.model import Model
from workers.agents.outcome import EnvironmentMistake, LimitReached, Outcome, shortened
from workers.agents.renderer import Message
from workers.agents.threads import Caller


@runtime_checkable
class Environment(Protocol):
    """The methods of an environment; nothing needs to inherit from this class."""

    def reset(self, task: dict[str, Any]) -> Any:
        """Begins an episode about a row of data (its columns, and `prompt` where it has one).

        Returns the first observation: text, a message or a list of messages, or (observation,
        info) as Gymnasium does.
        """

    def step(self, action: str) -> Any:
        """Takes the policy's reply. Returns (observation, done, reward), Gymnasium's (observation,
        reward, terminated, truncated, info), or a dict with observation, done and reward."""


@runtime_checkable
class Closes(Protocol):
    """An environment that holds something."""

    def close(self) -> Any:
        """Called once at the end of an episode, also of one that failed."""


async def play(
    environment: Environment, model: Model, task: dict[str, Any], call: Caller | None = None
) -> Outcome:
    """The episode: replies and steps in turn until the environment is done or a limit is
    reached. The reward is the sum of the steps', each of which its reply earned. `call`: the one that
    made the environment, whose methods then run in the same thread."""
    call = call or Caller()
    rewards: list[float] = []
    async with closing(environment, call):
        observation = messages_of(without_info(await call(environment.reset, task)), task)
        done = False
        while not done:
            try:
                reply = await model.reply(observation)
            except LimitReached:
                break
            stepped = await call(environment.step, reply.text)
            following, done, reward = step_of(stepped)
            rewards.append(number_of(reward))
            if not done:
                observation = messages_of(following, {})
    return Outcome(reward=sum(rewards), turn_rewards=rewards)


@asynccontextmanager
async def closing(owner: Any, call: Caller) -> AsyncIterator[None]:
    """Closes an object that has a method close, whatever happens inside. Of two errors the first
    says why the episode failed."""
    try:
        yield
    except BaseException:
        if isinstance(owner, Closes):
            with suppress(Exception):
                await call(owner.close)
        raise
    if isinstance(owner, Closes):
        await call(owner.close)


def without_info(returned: Any) -> Any:
    """The observation of Gymnasium's (observation, info)."""
    match returned:
        case (observation, dict() as info) if not is_message(info):
            return observation
    return returned


def step_of(returned: Any) -> tuple[Any, bool, float]:
    """(observation, done, reward) of what step returned."""
    match returned:
        case {"observation": observation, "done": done, "reward": reward}:
            return observation, flag_of(done, "done"), reward
        case (observation, done, reward) if is_flag(done):
            return observation, flag_of(done, "done"), reward
        case (observation, reward, terminated, truncated, dict()):
            ends = flag_of(terminated, "terminated"), flag_of(truncated, "truncated")
            return observation, any(ends), reward
    raise EnvironmentMistake(
        f"the environment's step returned {shortened(returned)}; return (observation, done, "
        "reward), Gymnasium's five values, or a dict with observation, done and reward"
    )


def is_flag(value: Any) -> bool:
    """Whether it is a bool, or an array or tensor of one."""
    if isinstance(value, bool | np.bool):
        return True
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.dtype in (np.bool, torch.bool) and math.prod(value.shape) == 1
    return False


def flag_of(value: Any, name: str) -> bool:
    """True or False, as a bool, an array or tensor of one, or the number 0 or 1."""
    if is_flag(value) or (isinstance(value, int | np.integer) and value in (0, 1)):
        return bool(value)
    raise EnvironmentMistake(
        f"the environment's step returned {name}={shortened(value)}; return True or False"
    )


def number_of(reward: Any) -> float:
    """A step's reward: a number, or an array or tensor of one."""
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        number = float(reward)
        if math.isfinite(number):
            return number
    raise EnvironmentMistake(
        f"the environment's step returned a reward of {shortened(reward)}; return one finite "
        "number, 0 where nothing was earned"
    )


def messages_of(observation: Any, task: dict[str, Any]) -> list[Message]:
    """The observation as messages; one that is None at the start is the data's prompt."""
    if observation is None and "prompt" in task:
        observation = task["prompt"]
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    if is_message(observation):
        return [observation]
    if isinstance(observation, list | tuple) and observation and all(map(is_message, observation)):
        return list(observation)
    raise EnvironmentMistake(
        f"the environment's observation is {shortened(observation)}; return text, a message "
        "{role, content} with text as content, or a list of messages"
    )


def is_message(value: Any) -> bool:
    if not isinstance(value, dict) or "role" not in value:
        return False
    return isinstance(value.get("content"), str | list)
