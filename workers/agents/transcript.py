"""Transcript: the tokens of an episode as they came to be. It only grows at its end, so that the
policy is trained on exactly what it sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One reply of the policy: Turn(start=12, length=5) are tokens 12 to 16."""

    start: int
    length: int
    number: int = 0
    """Replies of the episode before this one, in all of its segments."""


class Transcript:
    """transcript = Transcript()
    transcript.observe([5, 6])
    transcript.reply([7, 2], [-0.1, -0.3], [0, 0])

    The prompt is all before the first reply.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.sampled: list[bool] = []
        """Whether the policy drew the token."""
        self.log_probs: list[float] = []
        """Those of the sampled tokens, in order."""
        self.weight_versions: list[int] = []
        """The version of the weights that drew each of them."""
        self.turns: list[Turn] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_sampled(self) -> int:
        return len(self.log_probs)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first reply; all of them where there is none."""
        if not self.turns:
            return len(self.ids)
        return self.turns[0].start

    def observe(self, ids: Sequence[int]) -> None:
        """Adds tokens that the policy did not draw."""
        self.ids += ids
        self.sampled += [False] * len(ids)

    def reply(
        self,
        ids: Sequence[int],
        log_probs: Sequence[float],
        weight_versions: Sequence[int],
        number: int = 0,
    ) -> None:
        """Adds a turn of the policy: its tokens as they were drawn, the one that ended it
        included."""
        assert len(ids) == len(log_probs), "one log-prob for every token"
        self.turns.append(
            Turn(
                start=len(self.ids),
                length=len(ids),
                number=number,
            )
        )
        self.ids += ids
        self.sampled += [True] * len(ids)
        self.log_probs += log_probs
        self.weight_versions += weight_versions

    def drop_observation(self, longest: int) -> None:
        """Drops what was observed since the last reply; a prompt is cut to `longest` tokens."""
        length = longest
        if self.turns:
            length = self.turns[-1].start + self.turns[-1].length
        del self.ids[length:]
        del self.sampled[length:]
