"""Games of textarena: environment=workers.agents.packages.textarena:TextArena

A row of data names the game: {"env_id": "GuessTheNumber-v0", "seed": 3}, and where it is for
several, num_players and the policy's seat, `player`. The others' moves come from a method:

    class Nim(TextArena):
        def opponent(self, player, observation):
            return self.random.choice(["[0 1]", "[1 1]", "[2 1]"])

Each observation has what the game said since the policy's last move; a game's whole history, which
textarena's own wrappers repeat every time, stands in the conversation already. Leaves out play
against the policy itself.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from workers.agents.outcome import EnvironmentMistake

GLOBAL_CHANCE = threading.Lock()
"""Games draw from the module random, which they share."""


class TextArena:
    """One game; the policy has one seat of it."""

    def reset(self, task: dict[str, Any]) -> str:
        """The rules, and whatever happened before the policy's first move."""
        import textarena

        for name in ("env_id", "seed"):
            if name not in task:
                raise EnvironmentMistake(
                    f"environment=...textarena: a row of data has no {name!r}; name the game as "
                    'in {"env_id": "GuessTheNumber-v0", "seed": 3}'
                )
        self.player = int(task.get("player", 0))
        self.random = random.Random(task["seed"])
        """Chance for opponents: the same in every episode of a group."""
        self._chance = self.random.getstate()
        with self._own_chance():
            self.game = _without_history(textarena.make(task["env_id"]))
            self.game.reset(num_players=int(task.get("num_players", 1)), seed=int(task["seed"]))
        return self._until_the_turn(done=False)[0]

    def step(self, action: str) -> tuple[str, bool, float]:
        """The policy's move, and the others' behind it."""
        with self._own_chance():
            done, _ = self.game.step(action)
        observation, done = self._until_the_turn(done=done)
        if not done:
            return observation, False, 0.0
        rewards, _ = self.game.close()
        if rewards is None:
            raise RuntimeError("the game ended without rewards")
        return "", True, float(rewards[self.player])

    def opponent(self, player: int, observation: str) -> str:
        """The move of another player, who has seen `observation` since the last one."""
        raise EnvironmentMistake(
            f"the game needs a move of player {player}; write a subclass of TextArena with "
            "opponent(player, observation) and name it in environment="
        )

    def _until_the_turn(self, *, done: bool) -> tuple[str, bool]:
        """Lets the others move until it is the policy's turn or the game is over."""
        while not done:
            player, said = self.game.get_observation()
            observation = "\n".join(_line(self.game, *message[:2]) for message in said)
            if player == self.player:
                return observation, False
            move = self.opponent(player, observation)
            with self._own_chance():
                done, _ = self.game.step(move)
        return "", True

    @contextmanager
    def _own_chance(self) -> Iterator[None]:
        """The module random as if this game were alone: two episodes of one seed are alike, however
        many others run beside them."""
        with GLOBAL_CHANCE:
            before = random.getstate()
            random.setstate(self._chance)
            try:
                yield
            finally:
                self._chance = random.getstate()
                random.setstate(before)


def _without_history(game: Any) -> Any:
    """The game below the wrappers that change what is observed; those of actions stay."""
    import textarena

    if not isinstance(game, textarena.Wrapper):
        return game
    if isinstance(game, textarena.ObservationWrapper):
        return _without_history(game.env)
    game.env = _without_history(game.env)
    return game


def _line(game: Any, sender: int, text: str) -> str:
    """A message with the name of who sent it."""
    if sender == -1:
        return text
    return f"[{game.state.role_mapping.get(sender, f'Player {sender}')}] {text}"
