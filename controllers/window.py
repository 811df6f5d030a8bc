"""Window: which groups of responses may be under way, and which of the finished ones a step takes.

A group is the responses to one prompt; groups are numbered in the order in which they start.
(staleness + 1) * groups_per_step of them are active: started and not given back. A step takes
finished groups that are less than `width` numbers after the oldest one that was not taken, and gives
their places back when it ends. So staleness is bounded when a group starts, nothing is discarded
for its age, and no long response is overtaken for ever (TitanRL's windowed FIFO, after MiniMax-M1,
section 6.2.4).

The bound, in updates between a group's first token and its training, is
staleness + ceil((width - 1) / groups_per_step): when a group starts, at most capacity - 1 others are
active; at most width - 1 younger ones are taken before it; and each step in between takes at least
groups_per_step of those.

Pure bookkeeping: no clock, no Ray, no tensors. Who draws the responses is left to rollout_queue.py.
"""

from __future__ import annotations

import math
from typing import Any


class Window:
    """window = Window(groups_per_step=32, staleness=1)
    numbers = window.start(window.room())
    window.finish(numbers[7])                        # in any order
    while (batch := window.take(32)) is None: ...    # until more have finished
    window.end_step()                                # the step has trained: its places are free
    """

    def __init__(self, *, groups_per_step: int, staleness: int, look_ahead: float = 1.0) -> None:
        """`look_ahead`: the window's width as a share of the active groups; 0 takes them strictly
        in the order in which they started. A ValueError for values out of range."""
        if groups_per_step < 1:
            raise ValueError(f"window: groups_per_step is {groups_per_step}; use at least 1")
        if staleness < 0:
            raise ValueError(f"asynchrony.staleness is {staleness}; use 0 or more")
        if not (look_ahead >= 0 and math.isfinite(look_ahead)):
            raise ValueError(
                f"asynchrony.look_ahead is {look_ahead}; use 0 (strict order) or more, such as 1 "
                "for a window as wide as the active groups"
            )
        self.groups_per_step, self.staleness = groups_per_step, staleness
        self.capacity = (staleness + 1) * groups_per_step
        """Most active groups while no step takes more than groups_per_step."""
        self.width = max(1, math.floor(look_ahead * self.capacity))
        self.next_number = 0
        """The number of the next group that starts."""
        self._waiting: dict[int, bool] = {}
        """The groups that no step has taken, in order -> whether they are finished."""
        self._claimed: list[int] = []
        """Set aside for the take that is under way."""
        self._taken: list[int] = []
        """By takes of the present step that are complete."""
        self._wanted = 0
        """The size of the take that is under way."""

    @property
    def bound(self) -> int:
        """Most updates between the weights that draw a group's first token and those that train
        on it."""
        if self.staleness == 0:
            return 0  # Only the step's own groups are active.
        return self.staleness + -(-(self.width - 1) // self.groups_per_step)

    @property
    def num_active(self) -> int:
        """Groups that have started and were not given back."""
        return len(self._waiting) + len(self._claimed) + len(self._taken)

    @property
    def waiting(self) -> list[int]:
        """The groups that no step has taken, the oldest first; those set aside are not among
        them."""
        return list(self._waiting)

    @property
    def num_finished(self) -> int:
        """Finished groups that wait for a step to take them, those set aside included."""
        return sum(self._waiting.values()) + len(self._claimed)

    @property
    def num_taken(self) -> int:
        """Groups that the present step has taken."""
        return len(self._taken)

    def room(self, num_idle: int = 0) -> int:
        """How many groups may start now. A step that takes more than groups_per_step starts as
        many in their place at once, and gives all of them back at its end. `num_idle`: active
        groups whose responses are not being drawn yet."""
        further = len(self._taken) + self._wanted - self.groups_per_step
        return max(0, self.capacity + max(0, further) - self.num_active + num_idle)

    def start(self, num_groups: int) -> list[int]:
        """The numbers of the groups that start now; their responses are drawn from here on."""
        assert num_groups <= self.room(), f"{num_groups} groups start, {self.room()} may"
        numbers = list(range(self.next_number, self.next_number + num_groups))
        self._waiting |= dict.fromkeys(numbers, False)
        self.next_number += num_groups
        return numbers

    def finish(self, number: int) -> None:
        """All responses of the group are there."""
        assert not self._waiting[number], f"group {number} finishes twice"
        self._waiting[number] = True

    def give_up(self, number: int) -> None:
        """The group will not be finished: its place is free at once."""
        assert not self._waiting[number], f"group {number} is finished and is given up"
        del self._waiting[number]

    def take(self, num_groups: int) -> list[int] | None:
        """The step's next groups in the order of their numbers; None where they are not all there.
        It sets aside what is there: called again after more have finished, it goes on."""
        assert self._wanted in (0, num_groups), "a take of another size is under way"
        self._wanted = num_groups
        while len(self._claimed) < num_groups:
            number = self._next()
            if number is None:
                return None
            del self._waiting[number]
            self._claimed.append(number)
        batch = sorted(self._claimed)
        self._taken += batch
        self._claimed, self._wanted = [], 0
        return batch

    def _next(self) -> int | None:
        """The oldest finished group inside the window."""
        oldest = next(iter(self._waiting), 0)
        for number, finished in self._waiting.items():
            if number >= oldest + self.width:
                return None
            if finished:
                return number
        return None

    def missing(self) -> int:
        """How many groups the take that is under way needs beyond those that have started."""
        return max(0, self._wanted - len(self._claimed) - len(self._waiting))

    def end_step(self) -> list[int]:
        """The step has ended: the places of all groups that it took, used or not, are free."""
        assert not self._wanted, "the step ends while it waits for groups"
        taken, self._taken = self._taken, []
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data, between two steps."""
        assert not self._wanted and not self._taken, "a step is under way"
        return {"waiting": self.waiting, "next_number": self.next_number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict returned; no group counts as finished."""
        self._waiting = dict.fromkeys(state["waiting"], False)
        self._claimed, self._taken, self._wanted = [], [], 0
        self.next_number = state["next_number"]
