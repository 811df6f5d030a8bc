"""RolloutQueue: draws groups of responses ahead of the steps that train on them, within a Window.

It decides when groups start and when new weights go to the generator; what a group is and how it is
drawn is the generator's business (`Rollouts`). It never discards a group. The same class runs a
training run and its simulation in virtual time (tests/asynchrony).

In drain mode the generator is empty whenever weights or groups come to it: a group is drawn by one
version of the weights, and together with the same others in every run. Its state then holds the
responses that wait for a step, so that a resumed run trains on the same ones. In the other modes
their groups are drawn anew.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from controllers.window import Window

LOGGER = logging.getLogger(__name__)
MOST_GIVEN_UP = 0.5
"""The share of groups given up above which the run stops: what is left says little of the data."""
FEWEST_GIVEN_UP = 10
"""Groups given up before that share counts."""


class Rollouts(Protocol):
    """A generator of groups, by number."""

    @property
    def num_in_flight(self) -> int:
        """Groups that were submitted and have not been reported as ended."""

    @property
    def is_outdated(self) -> bool:
        """Whether the weights were trained since the generator got them."""

    def sync(self) -> None:
        """Brings it the present weights, between two slices of its work."""

    def submit(self, numbers: Sequence[int]) -> None:
        """Starts these groups behind those in flight."""

    def poll(self) -> Mapping[int, str]:
        """Goes on with the work that is due without waiting for it. Returns the groups that ended
        since the last call: number -> "", or why it was given up."""

    def wait(self) -> None:
        """Returns when poll has something to do."""

    def discard(self) -> None:
        """Forgets every group, for a run that goes back to an earlier step."""

    def export(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The responses of these groups, which have ended, as plain JSON data."""

    def restore(self, responses: dict[str, Any], numbers: Sequence[int]) -> list[int]:
        """Takes them back; the numbers of their groups, which are among `numbers`."""


class RolloutQueue:
    """queue = RolloutQueue(Window(groups_per_step=32, staleness=1), rollouts, num_groups=3200)
    numbers = queue.take(32)          # waits, and keeps the generator at work
    queue.end_step()
    """

    def __init__(
        self,
        window: Window,
        rollouts: Rollouts,
        *,
        num_groups: int,
        further_count: bool = True,
        drains: bool = False,
    ) -> None:
        """`num_groups`: groups that the run needs, after which no look-ahead starts one.
        `further_count`: a step that takes more than groups_per_step adds to that number."""
        self.window, self.rollouts, self.drains = window, rollouts, drains
        self.num_given_up = 0
        self._num_groups, self._further_count = num_groups, further_count
        self._num_further = 0
        self._not_submitted: list[int] = []
        """Groups that have started according to the state that was loaded, and have to be drawn;
        more than may be active where the state was written with a larger staleness."""

    @property
    def position(self) -> int:
        """Groups that were taken or given up so far."""
        return self.window.next_number - len(self.window.waiting)

    def take(self, num_groups: int) -> list[int]:
        """The numbers of the step's next groups, in order; returns when all of them are
        finished."""
        self.update_weights()
        while (batch := self.window.take(num_groups)) is None:
            self._start_groups()
            if not self.rollouts.num_in_flight:
                raise RuntimeError(
                    f"a step needs {num_groups} groups, but none is under way and none may start"
                )
            self.rollouts.wait()
            self.poll()
        if self._further_count:
            over = self.window.num_taken - self.window.groups_per_step
            self._num_further += max(0, min(over, num_groups))
        self._start_groups()
        return batch

    def update_weights(self) -> None:
        """Sees to it that the generator has the present weights."""
        if self.rollouts.is_outdated:
            if self.drains:
                self.drain()
            self.rollouts.sync()

    def pause(self) -> None:
        """Before the generator draws something else: it has the present weights, and in drain mode
        nothing is in flight."""
        if self.drains:
            self.drain()
        self.update_weights()

    def poll(self) -> None:
        """Takes notice of groups that have ended, and goes on with what is due; does not wait."""
        for number, reason in self.rollouts.poll().items():
            if reason:
                self._give_up(number, reason)
            else:
                self.window.finish(number)

    def drain(self) -> None:
        """Returns when no group is in flight."""
        while self.rollouts.num_in_flight:
            self.rollouts.wait()
            self.poll()

    def end_step(self) -> list[int]:
        """The step has ended; the groups that it took."""
        return self.window.end_step()

    def _start_groups(self) -> None:
        if self.drains and self.rollouts.num_in_flight:
            return
        number = self.window.room(len(self._not_submitted))
        begun, self._not_submitted = self._not_submitted[:number], self._not_submitted[number:]
        left = max(0, self._num_groups + self._num_further - self.window.next_number)
        number = min(self.window.room(), max(left, self.window.missing()))
        if begun or number:
            self.rollouts.submit([*begun, *self.window.start(number)])

    def _give_up(self, number: int, reason: str) -> None:
        LOGGER.warning("prompt %d of the run is left out: %s", number, reason)
        self.window.give_up(number)
        self.num_given_up += 1
        started = self.window.next_number
        if self.num_given_up >= max(FEWEST_GIVEN_UP, MOST_GIVEN_UP * started):
            raise RuntimeError(
                f"{self.num_given_up} of {started} prompts were given up, the last because: {reason}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data, between two steps. In drain mode it waits for the groups in flight."""
        if self.drains:
            self.drain()
        state = self.window.state_dict()
        if self.drains:
            state["responses"] = self.rollouts.export(self.window.waiting)
        return state | {
            "num_further": self._num_further,
            "num_given_up": self.num_given_up,
            "staleness": self.window.staleness,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to that step; groups whose responses are not in the state are drawn anew."""
        self.rollouts.discard()
        self.window.load_state_dict(state)
        self._num_further = state["num_further"]
        self.num_given_up = state["num_given_up"]
        waiting, responses = self.window.waiting, state.get("responses", {})
        if state.get("staleness", self.window.staleness) > self.window.staleness:
            responses = {}  # some would be older than this run allows
        restored = set(self.rollouts.restore(responses, waiting))
        for number in restored:
            self.window.finish(number)
        self._not_submitted = [number for number in waiting if number not in restored]
