"""32 generating and 32 training devices in virtual time: the run's own Window and RolloutQueue, over
a generator whose decode steps cost more the more rows they have.

A decode step of a replica takes FIXED_S, in which weights are read, and ROW_S for every row, in
which its keys and values are. Leaves out prefills, weight transfers and the cost of slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from controllers.rollout_queue import RolloutQueue
from controllers.window import Window
from tests.asynchrony.simulation import Run, Scenario, VirtualRollouts, check

REPLICAS = 32
SAMPLES = 8
MEAN_TOKENS = 2000
FIXED_S, ROW_S = 0.0075, 0.00005
"""A model of 7 billion parameters in bf16 on a device that reads 2 TB/s; some 100 MB of keys and
values a row."""
BATCH = 128
MEASURED = (5, 20)
"""Steps between which seconds count: without the filling of the window, and its end."""
BALANCE_SHARE = 0.01
"""The share of a step by which training may be shorter where the pools count as balanced."""


class LoadedRollouts(VirtualRollouts):
    """Rows of log-normal lengths (sigma 1, at most 6 times the mean) on replicas that are evenly
    loaded; a group ends with its longest row."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.groups = np.empty(0, np.int64)
        self.left = np.empty(0)
        """Tokens left of every row in flight."""
        self.busy_s = 0.0

    def token_s(self) -> float:
        """Seconds of a decode step."""
        return FIXED_S + ROW_S * max(1.0, len(self.left) / REPLICAS)

    def submit(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            rng = np.random.default_rng([self.scenario.seed, number])
            lengths = MEAN_TOKENS * np.minimum(6, rng.lognormal(-0.5, 1, SAMPLES))
            self.groups = np.append(self.groups, np.full(SAMPLES, number))
            self.left = np.append(self.left, lengths)
            self.ends[number] = np.inf
            self.drawn_by[number] = self.version

    def draw_until(self, end: float) -> None:
        """Rows grow until `end`, or until the first of them ends."""
        if not len(self.left):
            self.now = end
            return
        token_s = self.token_s()
        tokens = min(self.left.min(), (end - self.now) / token_s)
        self.now += tokens * token_s
        self.busy_s += tokens * token_s
        self.left -= tokens
        ended = self.left <= 1e-9
        if not ended.any():
            self.now = end
            return
        touched = np.unique(self.groups[ended])
        self.groups, self.left = self.groups[~ended], self.left[~ended]
        for number in touched[~np.isin(touched, self.groups)].tolist():
            self.ends[number] = self.now

    def wait(self) -> None:
        while min(self.ends.values()) > self.now:
            self.draw_until(np.inf)


class LoadedRun(Run):
    """A run whose training takes `train_s` a step, while the generator goes on."""

    def __init__(self, scenario: Scenario) -> None:
        self.marks: list[list[float]] = []
        """Seconds at the steps MEASURED: of the run, of generation, of waiting for it."""
        super().__init__(scenario, Window)

    def new_queue(self) -> RolloutQueue:
        self.rollouts = LoadedRollouts(self.scenario)
        return super().new_queue()

    def step(self) -> None:
        rollouts = self.rollouts
        assert isinstance(rollouts, LoadedRollouts)
        if len(self.outcome.steps) in MEASURED:
            self.marks.append([rollouts.now, rollouts.busy_s, self.outcome.trainer_waits_s])
        super().step()

    def train(self) -> None:
        end = self.rollouts.now + self.scenario.train_s
        while self.rollouts.now < end:
            self.rollouts.draw_until(end)
            self.queue.poll()

    def take_commit(self) -> None:
        """Nothing dies here."""


def measure(staleness: int, look_ahead: float, drains: bool, train_s: float) -> dict[str, Any]:
    """A row of the table."""
    scenario = Scenario(
        groups_per_step=BATCH,
        staleness=staleness,
        look_ahead=look_ahead,
        drains=drains,
        num_steps=25,
        train_s=train_s,
    )
    run = LoadedRun(scenario)
    outcome = run.run()
    seconds, busy_s, waits_s = np.subtract(run.marks[1], run.marks[0]).tolist()
    assert not (problems := check(outcome)), problems
    ages = outcome.staleness
    mode = "recompute"
    if drains:
        mode = "drain"
    return {
        "where": "virtual 32+32",
        "mode": mode if staleness else "synchronous",
        "staleness": staleness,
        "look_ahead": look_ahead,
        "step_s": seconds / (MEASURED[1] - MEASURED[0]),
        "staleness_mean": float(np.mean(ages)),
        "staleness_max": max(ages),
        "bound": outcome.window.bound,
        "idle_generator": 1 - busy_s / seconds,
        "idle_trainer": waits_s / seconds,
        "train_s": train_s,
    }


def balanced_train_s() -> float:
    """Seconds of a step's training that a step of staleness 1 takes as well, within BALANCE_SHARE:
    the two pools are balanced. Longer training leaves finished groups waiting, so that fewer rows
    are drawn at a time and the step becomes longer, too: the fixed point is approached from below."""
    train_s = 0.0
    while True:
        step_s = measure(1, 1.0, False, train_s)["step_s"]
        if step_s - train_s <= BALANCE_SHARE * step_s:
            return float(step_s)
        train_s = step_s


def table() -> list[dict[str, Any]]:
    """Staleness 0, 1 and 2, with balanced pools."""
    train_s = balanced_train_s()
    rows = [measure(0, 1.0, False, train_s)]
    for staleness in (1, 2):
        rows.append(measure(staleness, 0.0, True, train_s))
        for look_ahead in (0.0, 0.3, 1.0):
            rows.append(measure(staleness, look_ahead, False, train_s))
    return rows
