"""How an episode ends: its outcome, a limit, or a failure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.rewards.values import STATISTICS

LARGEST = float(np.finfo(np.float32).max)
PARTS = ("environment", "further")
"""Names of the episode's own reward, and of that of a reward function or model beside it."""
RESERVED = STATISTICS.union(PARTS)
"""Names under which the reward's own numbers are logged."""
FAILED = "failed"
"""finish_reason of the rows of a group that was given up: nothing of them is trained on."""


@dataclass(kw_only=True)
class Outcome:
    """The result of an episode where one number does not say it all.

    Outcome(reward=1.5, turn_rewards=[0.5, 0.0, 1.0], metrics={"searches": 2})
    """

    reward: float
    """The whole episode's, the rewards of its turns included."""
    turn_rewards: Sequence[float] | None = None
    """The part of the reward that each reply of the policy earned; critics learn from it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, logged as reward/<name>."""
    abandoned: bool = False
    """Whether the agent gave up, which the finish reason then says."""


class LimitReached(Exception):
    """Raised by Model.reply where the episode has no turn, token or context left.

    An episode that does not catch it ends with reward 0; Environment and Tools end with the rewards
    so far. `reason`: turns, length or context.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the episode has reached its limit of {reason}")
        self.reason = reason


class RequestRefused(RuntimeError):
    """The last request of an agent to its Endpoint got no answer, and the agent went on as if it had
    one: a failure, never a reward."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed: Failure("TimeoutError", "timed out (shop.py, line 9) ...")"""

    kind: str
    """The error's class, or "timeout" for one that took too long."""
    text: str


class EnvironmentMistake(ValueError):
    """A mistake that a fresh environment would only repeat: it stops the run."""


def checked_outcome(returned: Any, num_turns: int, name: str) -> Outcome:
    """The outcome, or an EnvironmentMistake that says what is wrong with it."""
    outcome = returned
    if not isinstance(returned, Outcome):
        outcome = Outcome(reward=_number(returned, "a reward", name))
    reward = _number(outcome.reward, "reward", name)
    turn_rewards = outcome.turn_rewards
    if turn_rewards is not None:
        if not isinstance(turn_rewards, Iterable):
            raise EnvironmentMistake(
                f"environment={name}: the outcome has turn_rewards of {shortened(turn_rewards)}; give "
                "a list with one number for each reply"
            )
        turn_rewards = [_number(value, "a turn's reward", name) for value in turn_rewards]
        if len(turn_rewards) != num_turns:
            raise EnvironmentMistake(
                f"environment={name}: the outcome has {len(turn_rewards)} turn_rewards, and the "
                f"policy had {num_turns} turns; give one for each reply"
            )
    if not isinstance(outcome.metrics, Mapping):
        raise EnvironmentMistake(
            f"environment={name}: the outcome has metrics of {outcome.metrics!r}; give a dict of "
            "numbers"
        )
    metrics = {}
    for key, value in outcome.metrics.items():
        if key in RESERVED:
            raise EnvironmentMistake(
                f"environment={name}: the outcome has metrics[{key!r}], and reward/{key} is the reward's "
                "own; give it another name"
            )
        metrics[str(key)] = _number(value, f"metrics[{key!r}]", name)
    return Outcome(
        reward=reward, turn_rewards=turn_rewards, metrics=metrics, abandoned=outcome.abandoned
    )


def _number(value: Any, what: str, name: str) -> float:
    """The value as a float that is finite in single precision, which columns have."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise EnvironmentMistake(
            f"environment={name}: the episode returned {what} of {shortened(value)}; return a finite "
            "number or an Outcome"
        )
    return number


def shortened(value: Any) -> str:
    """The value as a message shows it."""
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of thousands of digits"
    except Exception:  # the user's code
        return f"a {type(value).__name__} without a text"


def text_of(error: BaseException) -> str:
    """The error's own text, which its code may not know."""
    try:
        return str(error)
    except Exception:  # the user's code
        return "an error without a text"
