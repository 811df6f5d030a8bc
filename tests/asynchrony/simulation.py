"""A run with asynchronous generation in virtual time: the real Window and RolloutQueue, a generator
and a trainer that only let time pass, and faults drawn from a seed.

simulate(Scenario(seed=7)) -> Outcome. No Ray, no torch, no wall clock: thousands of runs take
seconds. `check` holds an outcome against the rules; every rule is an invariant of the design.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from controllers.rollout_queue import RolloutQueue
from controllers.window import Window


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that decides a run."""

    seed: int = 0
    groups_per_step: int = 4
    staleness: int = 1
    look_ahead: float = 1.0
    drains: bool = False
    num_steps: int = 12
    sigma: float = 1.0
    """Spread of the log-normal durations of a group, whose mean is 1."""
    longest: float = 6.0
    train_s: float = 0.5
    slice_s: float = 0.0
    """The generator reports groups at multiples of this; 0: at once."""
    filtered: float = 0.0
    """The probability that a step can't use a group (DAPO): it then takes another one."""
    most_rounds: int = 4
    given_up: float = 0.0
    """The probability that a group ends without responses."""
    kills: tuple[float, ...] = ()
    """Times at which the whole run dies and goes on from the last commit."""
    commit_every: int = 1
    resumes_with: tuple[int, float] | None = None
    """Another staleness and look_ahead, with which the run goes on after its first death."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A group in the step that took it."""

    number: int
    drawn_by: int
    """The version of the weights that its first token was drawn by."""
    trained_at: int
    """The version that the step began with."""


@dataclass(kw_only=True)
class Outcome:
    """The timeline that was committed."""

    scenario: Scenario
    window: Window
    steps: list[list[Trained]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    """Of staleness, in each step."""
    given_up: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Rules that a moment of the run broke."""
    seconds: float = 0.0
    trainer_waits_s: float = 0.0
    num_kills: int = 0

    @property
    def staleness(self) -> list[int]:
        """Updates between drawing and training, of every group."""
        return [group.trained_at - group.drawn_by for step in self.steps for group in step]


class Killed(Exception):
    """The run died at its time."""


def duration(scenario: Scenario, number: int) -> float:
    """How long the group takes, whenever it is drawn."""
    sigma = scenario.sigma
    return min(scenario.longest, math.exp(sigma * normal(scenario.seed, number) - sigma**2 / 2))


@cache
def normal(seed: int, number: int) -> float:
    return random.Random(seed * 1_000_003 + number).gauss(0, 1)


def chance(scenario: Scenario, number: int, salt: int) -> float:
    """A number in [0, 1) that belongs to the group."""
    if not (scenario.filtered or scenario.given_up):
        return 0.5
    return random.Random((scenario.seed * 1_000_003 + number) * 7 + salt).random()


class VirtualRollouts:
    """Groups end after their duration, however many are in flight."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now, self.version, self.trainer_version = 0.0, -1, 0
        self.ends: dict[int, float] = {}
        self.drawn_by: dict[int, int] = {}
        self.deaths = sorted(scenario.kills)
        self.given_up: list[int] = []
        self.problems: list[str] = []
        self.num_polls = 0

    @property
    def num_in_flight(self) -> int:
        return len(self.ends)

    @property
    def is_outdated(self) -> bool:
        return self.version != self.trainer_version

    def sync(self) -> None:
        if self.scenario.drains and self.ends:
            self.problems.append("weights came while groups were in flight")
        self.version = self.trainer_version

    def submit(self, numbers: Sequence[int]) -> None:
        if self.scenario.drains and self.ends:
            self.problems.append("groups came while others were in flight")
        if self.is_outdated:
            self.problems.append("groups start before the weights are there")
        for number in numbers:
            self.ends[number] = self.now + duration(self.scenario, number)
            self.drawn_by[number] = self.version

    def seen_at(self, number: int) -> float:
        """When the slice ends in which the group does."""
        end, length = self.ends[number], self.scenario.slice_s
        return math.ceil(end / length) * length if length else end

    def poll(self) -> Mapping[int, str]:
        self.num_polls += 1
        ended = [number for number in self.ends if self.seen_at(number) <= self.now]
        answers = {}
        for number in sorted(ended, key=lambda number: (self.ends[number], number)):
            del self.ends[number]
            failed = chance(self.scenario, number, 1) < self.scenario.given_up
            answers[number] = ""
            if failed:
                answers[number] = "its environment died"
                self.given_up.append(number)
        return answers

    def wait(self) -> None:
        self.pass_until(min(map(self.seen_at, self.ends)))

    def pass_until(self, time: float) -> None:
        if self.deaths and self.deaths[0] <= time:
            self.now = max(self.now, self.deaths.pop(0))
            raise Killed
        self.now = max(self.now, time)

    def discard(self) -> None:
        self.ends, self.drawn_by = {}, {}

    def export(self, numbers: Sequence[int]) -> dict[str, Any]:
        drawn = [number for number in numbers if number in self.drawn_by]
        return {str(number): self.drawn_by[number] for number in drawn}

    def restore(self, responses: dict[str, Any], numbers: Sequence[int]) -> list[int]:
        self.drawn_by = {int(number): version for number, version in responses.items()}
        return list(self.drawn_by)


MakeWindow = Callable[..., Window]


class Run:
    """The controller's loop over the queue, with commits."""

    def __init__(self, scenario: Scenario, make_window: MakeWindow) -> None:
        self.scenario, self.make_window = scenario, make_window
        self.staleness, self.look_ahead = scenario.staleness, scenario.look_ahead
        self.rollouts = VirtualRollouts(scenario)
        self.queue = self.new_queue()
        self.outcome = Outcome(scenario=scenario, window=self.queue.window)
        self.commit: dict[str, Any] = {}
        self.take_commit()

    def new_queue(self) -> RolloutQueue:
        scenario = self.scenario
        window = self.make_window(
            groups_per_step=scenario.groups_per_step,
            staleness=self.staleness,
            look_ahead=self.look_ahead,
        )
        num_groups = scenario.num_steps * scenario.groups_per_step
        return RolloutQueue(window, self.rollouts, num_groups=num_groups, drains=scenario.drains)

    def take_commit(self) -> None:
        """As files would hold it: nothing of it is shared with the run."""
        state = self.queue.state_dict()  # first: groups may end while it is taken
        self.commit = {
            "queue": json.loads(json.dumps(state)),
            "version": self.rollouts.trainer_version,
            "steps": len(self.outcome.steps),
            "given_up": list(self.rollouts.given_up),
        }

    def go_back(self) -> None:
        """A new process from the last commit."""
        self.outcome.num_kills += 1
        if self.scenario.resumes_with is not None:
            self.staleness, self.look_ahead = self.scenario.resumes_with
        self.queue = self.new_queue()
        self.outcome.window = self.queue.window
        self.rollouts.trainer_version, self.rollouts.version = self.commit["version"], -1
        self.queue.load_state_dict(self.commit["queue"])
        del self.outcome.steps[self.commit["steps"] :], self.outcome.bounds[self.commit["steps"] :]
        self.rollouts.given_up = list(self.commit["given_up"])

    def run(self) -> Outcome:
        outcome, rollouts = self.outcome, self.rollouts
        while len(outcome.steps) < self.scenario.num_steps:
            try:
                self.step()
                if len(outcome.steps) % self.scenario.commit_every == 0:
                    self.take_commit()
            except Killed:
                self.go_back()
            if rollouts.num_polls > 100_000:
                outcome.problems.append("no end")
                break
        outcome.seconds, outcome.given_up = rollouts.now, rollouts.given_up
        outcome.problems += rollouts.problems
        return outcome

    def step(self) -> None:
        scenario, rollouts, version = self.scenario, self.rollouts, self.rollouts.trainer_version
        self.check_places()
        taken = self.take(scenario.groups_per_step)
        used = self.usable(taken)
        for _ in range(scenario.most_rounds - 1):
            if len(used) == scenario.groups_per_step:
                break
            further = self.take(scenario.groups_per_step - len(used))
            taken, used = taken + further, used + self.usable(further)
        self.train()
        step = []
        for number in taken:
            drawn_by = rollouts.drawn_by[number]
            step.append(Trained(number=number, drawn_by=drawn_by, trained_at=version))
        rollouts.trainer_version += 1
        self.queue.end_step()
        self.outcome.steps.append(step)
        self.outcome.bounds.append(self.bound())
        self.check_ledger()

    def take(self, number: int) -> list[int]:
        began = self.rollouts.now
        numbers = self.queue.take(number)
        self.outcome.trainer_waits_s += self.rollouts.now - began
        if numbers != sorted(numbers):
            self.outcome.problems.append(f"batch {numbers} is not in order")
        return numbers

    def bound(self) -> int:
        """The most staleness that the settings allow; that of the real window."""
        if self.scenario.drains:
            return self.staleness
        return Window(
            groups_per_step=self.scenario.groups_per_step,
            staleness=self.staleness,
            look_ahead=self.look_ahead,
        ).bound

    def usable(self, numbers: Sequence[int]) -> list[int]:
        share = self.scenario.filtered
        return [number for number in numbers if chance(self.scenario, number, 2) >= share]

    def train(self) -> None:
        """The controller looks at slices that end meanwhile."""
        rollouts, end = self.rollouts, self.rollouts.now + self.scenario.train_s
        while rollouts.ends and (first := min(map(rollouts.seen_at, rollouts.ends))) <= end:
            rollouts.pass_until(first)
            self.queue.poll()
        rollouts.pass_until(end)

    def check_places(self) -> None:
        """At the start of a step, all active groups are those that no step has taken."""
        window = self.queue.window
        if window.num_active != len(window.waiting):
            self.outcome.problems.append("places are held by groups of earlier steps")

    def check_ledger(self) -> None:
        """started = trained + waiting + given up."""
        window, outcome = self.queue.window, self.outcome
        trained = sum(map(len, outcome.steps))
        total = trained + len(window.waiting) + self.queue.num_given_up
        if total != window.next_number:
            outcome.problems.append(
                f"{window.next_number} groups started, {trained} were trained, "
                f"{len(window.waiting)} wait, {self.queue.num_given_up} were given up"
            )


def simulate(scenario: Scenario, make_window: MakeWindow = Window) -> Outcome:
    """Runs the scenario to its end."""
    return Run(scenario, make_window).run()


def check(outcome: Outcome) -> list[str]:
    """The rules that the run broke; empty where it is right."""
    scenario, problems = outcome.scenario, list(outcome.problems)
    numbers = Counter(group.number for step in outcome.steps for group in step)
    numbers.update(outcome.given_up)
    numbers.update(outcome.window.waiting)
    twice = [number for number, count in numbers.items() if count > 1]
    missing = [number for number in range(outcome.window.next_number) if number not in numbers]
    if twice:
        problems.append(f"groups {twice} come twice")
    if missing:
        problems.append(f"groups {missing} are lost")
    for number, step in enumerate(outcome.steps):
        if len(step) < scenario.groups_per_step:
            problems.append(f"step {number} took {len(step)} groups")
    for bound, step in zip(outcome.bounds, outcome.steps, strict=True):
        most = max(group.trained_at - group.drawn_by for group in step)
        if most > bound:
            problems.append(f"staleness {most} is over the bound {bound}")
    problems += check_lengths(outcome)
    return problems


def check_lengths(outcome: Outcome) -> list[str]:
    """Without a look-ahead that is left over, the durations trained on are those of the groups
    that started, whatever their length."""
    if outcome.window.waiting or outcome.given_up:
        return []
    scenario = outcome.scenario
    trained = sorted(duration(scenario, group.number) for step in outcome.steps for group in step)
    number = outcome.window.next_number
    started = sorted(duration(scenario, group) for group in range(number))
    return [] if trained == started else ["lengths trained on differ from lengths drawn"]


def undisturbed(scenario: Scenario) -> Scenario:
    """The same run without kills."""
    return replace(scenario, kills=())
