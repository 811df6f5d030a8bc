"""Streams: what a step may draw besides the prompts that it is given. An entry of ALGORITHMS names
the ones that its page asks for.

Positions are part of the loop's checkpoint, so that a resumed run draws what the undisturbed one
would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from controllers.data import RowLoader
from controllers.data.config import DataConfig
from controllers.data.rows import RowDataset
from controllers.rollout_queue import RolloutQueue
from controllers.window import Window
from hybridflow.batch import Batch
from hybridflow.columns import Ragged
from hybridflow.waiting import CALLS


class Stream(Protocol):
    """self.prompts.take(3)"""

    def take(self, num_rows: int = 0) -> Batch:
        """The next rows; 0: as many as the settings say."""


class RowSource(Protocol):
    """Where the loop takes its rows from: a RowLoader, or rows whose responses are drawn ahead."""

    @property
    def dataset(self) -> RowDataset:
        """All rows."""

    @property
    def config(self) -> DataConfig:
        """data.*"""

    @property
    def position(self) -> int:
        """Rows of the stream that steps have used so far."""

    def take(self, num_rows: int) -> Batch:
        """The next rows."""

    def end_step(self) -> None:
        """The step that took them has ended."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data, between two steps."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""


class PromptStream:
    """The prompts of the run: a step's are next(prompts), and a step that needs further ones
    (DAPO) goes on where that ended."""

    def __init__(self, loader: RowSource, samples_per_prompt: int) -> None:
        self.loader, self.samples_per_prompt = loader, samples_per_prompt

    def take(self, num_rows: int = 0) -> Batch:
        """The next num_rows prompts, each samples_per_prompt times."""
        return self.loader.take(num_rows or self.loader.config.batch_size).repeat(
            self.samples_per_prompt
        )

    def __iter__(self) -> PromptStream:
        return self

    def __next__(self) -> Batch:
        """The rows of one step; the stream has no end."""
        return self.take()


class TextStream:
    """Text of the pretraining distribution: rows whose prompt is their first token and whose
    response is the rest."""

    def __init__(self, loader: RowLoader) -> None:
        self.loader = loader

    def take(self, num_rows: int = 0) -> Batch:
        rows = (
            self.loader.take(num_rows or self.loader.config.batch_size)
            .ragged("prompt_ids")
            .unbind()
        )
        prompts = [row[:1] for row in rows]
        responses = [row[1:] for row in rows]
        return Batch.of(prompt_ids=Ragged.of(prompts), response_ids=Ragged.of(responses))


class EmptyStream:
    """The stream of a setting that is not used: no rows."""

    def take(self, num_rows: int = 0) -> Batch:
        return Batch.of()


class NoStream:
    """For tracing, which draws nothing."""

    def take(self, num_rows: int = 0) -> Batch:
        raise ValueError(
            "the step draws from a stream while it is traced; put what depends on numbers into a "
            "function marked @on_controller"
        )


class DrawsAhead(Protocol):
    """An actor whose responses are drawn ahead (workers/streaming_actor.py)."""

    before_direct: Any
    overlaps: bool

    @property
    def num_in_flight(self) -> int: ...

    @property
    def is_outdated(self) -> bool: ...

    def sync(self) -> None: ...

    def submit(self, prompts: Batch, *, do_sample: bool = True) -> None: ...

    def poll(self) -> list[int]: ...

    def wait(self) -> None: ...

    def discard(self) -> None: ...

    def forget(self, uids: Sequence[int]) -> None: ...

    def export(self, uids: Sequence[int]) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> list[int]: ...


class PromptRollouts:
    """An actor's rows as the groups of a RolloutQueue: a group is a place of the loader's stream,
    the samples of its prompt and, with `greedy`, as many of its most likely response."""

    def __init__(
        self, loader: RowLoader, actor: DrawsAhead, samples_per_prompt: int, *, greedy: bool = False
    ) -> None:
        self.loader, self.actor, self.samples_per_prompt = loader, actor, samples_per_prompt
        self.greedy = greedy
        self._number: dict[int, int] = {}
        """uid -> its group."""

    @property
    def num_in_flight(self) -> int:
        return self.actor.num_in_flight

    @property
    def is_outdated(self) -> bool:
        return self.actor.is_outdated

    def sync(self) -> None:
        self.actor.sync()

    def submit(self, numbers: Sequence[int]) -> None:
        prompts = self.loader.rows_at(numbers)
        self._number |= dict(zip(prompts.tensor("uid").tolist(), numbers, strict=True))
        rows = prompts.repeat(self.samples_per_prompt)
        self.actor.submit(rows)
        if self.greedy:
            self.actor.submit(rows, do_sample=False)

    def poll(self) -> Mapping[int, str]:
        return {self._number[uid]: "" for uid in self.actor.poll()}

    def wait(self) -> None:
        self.actor.wait()

    def discard(self) -> None:
        self._number.clear()
        self.actor.discard()

    def forget(self, numbers: Sequence[int]) -> None:
        """No step asks for these groups any more."""
        gone = set(numbers)
        uids = [uid for uid, number in self._number.items() if number in gone]
        for uid in uids:
            del self._number[uid]
        self.actor.forget(uids)

    def export(self, numbers: Sequence[int]) -> dict[str, Any]:
        chosen = set(numbers)
        return self.actor.export([uid for uid, number in self._number.items() if number in chosen])

    def restore(self, responses: dict[str, Any], numbers: Sequence[int]) -> list[int]:
        uids = self.actor.restore(responses)
        if not uids:
            return []
        known = self.loader.rows_at(numbers).tensor("uid").tolist()
        number_of = dict(zip(known, numbers, strict=True))
        self._number |= {uid: number_of[uid] for uid in uids}
        return [number_of[uid] for uid in uids]


class RowsAhead:
    """A loader's rows, whose responses are drawn ahead of the steps that take them.

    rows = RowsAhead(RowLoader(dataset, config), actor, window, samples_per_prompt=8, ...)
    prompts = rows.take(32).repeat(8)         # actor.generate_sequences(prompts) has their responses
    rows.end_step()
    """

    def __init__(
        self,
        loader: RowLoader,
        actor: DrawsAhead,
        window: Window,
        *,
        samples_per_prompt: int,
        num_rows: int,
        further_count: bool,
        drains: bool,
        greedy: bool = False,
    ) -> None:
        """`num_rows`, `further_count`: see RolloutQueue. `greedy`: steps ask for the most likely
        response to every row as well."""
        self.loader = loader
        self.rollouts = PromptRollouts(loader, actor, samples_per_prompt, greedy=greedy)
        self.queue = RolloutQueue(
            window, self.rollouts, num_groups=num_rows, further_count=further_count, drains=drains
        )
        self._overlaps = actor.overlaps
        actor.before_direct = self.queue.pause

    @property
    def dataset(self) -> RowDataset:
        return self.loader.dataset

    @property
    def config(self) -> DataConfig:
        return self.loader.config

    @property
    def position(self) -> int:
        return self.queue.position

    def take(self, num_rows: int) -> Batch:
        if self._overlaps:
            CALLS.while_waiting = self.queue.poll
        numbers = self.queue.take(num_rows)
        if self.queue.drains and not self._overlaps:
            self.queue.drain()  # Training, which is next, would bring new weights to what is left.
        return self.loader.rows_at(numbers)

    def end_step(self) -> None:
        self.rollouts.forget(self.queue.end_step())

    def state_dict(self) -> dict[str, Any]:
        ahead = self.queue.state_dict()
        return self.loader.state_dict() | {"position": self.position, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, or from what a plain RowLoader wrote."""
        position = state["position"]
        ahead = state.get("ahead", {"waiting": [], "next_number": position})
        plain = {name: value for name, value in state.items() if name != "ahead"}
        self.loader.load_state_dict(plain)
        self.queue.load_state_dict({"num_further": 0, "num_given_up": 0} | ahead)
